#include "cuda/graph.h"

namespace fastdreamer {
namespace {

// A stream that captures from its construction to end(), or gives up in its destructor.
class Capture {
 public:
  Capture() {
    FASTDREAMER_CUDA(cuStreamCreate, &stream_, cu::kNonBlocking);
    try {
      // thread local: what other threads do meanwhile cannot spoil it
      FASTDREAMER_CUDA(cuStreamBeginCapture_v2, stream_, cu::kCaptureThreadLocal);
    } catch (...) {
      FASTDREAMER_CUDA_RELEASE(cuStreamDestroy_v2, stream_);
      throw;
    }
    active_ = true;
  }
  ~Capture() {
    if (active_) {
      cu::Graph graph = nullptr;
      driver().cuStreamEndCapture(stream_, &graph);  // after an error it returns one itself
      if (graph != nullptr) FASTDREAMER_CUDA_RELEASE(cuGraphDestroy, graph);
    }
    FASTDREAMER_CUDA_RELEASE(cuStreamDestroy_v2, stream_);
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;

  // Adds a launch behind the last and returns its node.
  cu::Node add(const Node& node) const {
    node.launch(stream_);
    int status = 0;
    const cu::Node* last = nullptr;
    std::size_t count = 0;
    FASTDREAMER_CUDA(cuStreamGetCaptureInfo_v2, stream_, &status, nullptr, nullptr, &last, &count);
    if (count != 1) {
      throw DriverError("cuStreamGetCaptureInfo_v2: the stream's last launch is " +
                        std::to_string(count) + " nodes, expected one");
    }
    return last[0];
  }

  cu::Graph end() {
    cu::Graph graph = nullptr;
    active_ = false;
    FASTDREAMER_CUDA(cuStreamEndCapture, stream_, &graph);
    return graph;
  }

 private:
  cu::Stream stream_ = nullptr;
  bool active_ = false;
};

}  // namespace

void Node::launch(cu::Stream stream) const {
  FASTDREAMER_CUDA(cuLaunchKernel, kernel->function(), grid[0], grid[1], grid[2], kernel->threads(),
                   1, 1, kernel->shared_bytes(), stream, params, nullptr);
}

void Graph::capture(const std::vector<Node>& nodes) {
  destroy();
  try {
    device_->run([&] {
      Capture stream;
      handles_.reserve(nodes.size());
      for (const Node& node : nodes) handles_.push_back(stream.add(node));
      graph_ = stream.end();
      FASTDREAMER_CUDA(cuGraphInstantiateWithFlags, &exec_, graph_, 0ULL);
    });
  } catch (...) {
    destroy();
    throw;
  }
}

void Graph::update(std::size_t i, const Node& node) {
  cu::KernelNodeParams params{};
  params.func = node.kernel->function();
  for (int d = 0; d < 3; ++d) params.grid[d] = node.grid[d];
  params.block[0] = node.kernel->threads();
  params.block[1] = params.block[2] = 1;
  params.shared_bytes = node.kernel->shared_bytes();
  params.params = node.params;
  FASTDREAMER_CUDA(cuGraphExecKernelNodeSetParams_v2, exec_, handles_[i], &params);
}

void Graph::launch(cu::Stream stream) const {
  device_->run([&] { FASTDREAMER_CUDA(cuGraphLaunch, exec_, stream); });
}

void Graph::destroy() noexcept {
  if (exec_ != nullptr || graph_ != nullptr) {
    device_->run_release([&] {
      if (exec_ != nullptr) FASTDREAMER_CUDA_RELEASE(cuGraphExecDestroy, exec_);
      if (graph_ != nullptr) FASTDREAMER_CUDA_RELEASE(cuGraphDestroy, graph_);
    });
  }
  exec_ = nullptr;
  graph_ = nullptr;
  handles_.clear();
}

}  // namespace fastdreamer
