// A chain of kernel launches as one CUDA graph.
#pragma once

#include <memory>
#include <vector>

#include "cuda/kernel.h"

namespace fastdreamer {

// One launch. `params` are pointers to the parameters' values, hidden ones included; they and the
// values are the caller's and are read during the call only.
struct Node {
  const Kernel* kernel;
  unsigned grid[3];
  void** params;

  void launch(cu::Stream stream) const;  // in the device's context
};

// Not thread-safe: the owner sees to it that calls come one after the other.
class Graph {
 public:
  explicit Graph(std::shared_ptr<const Device> device) : device_(std::move(device)) {}
  ~Graph() { destroy(); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  // Captures the launches, each after the one before, on a stream of its own, and instantiates
  // the graph. Nothing runs. Throws and then holds no graph.
  void capture(const std::vector<Node>& nodes);

  // Whether capture() has succeeded since the last destroy().
  bool captured() const { return exec_ != nullptr; }

  // Gives launch i new parameters, in the device's context. Launches already under way keep theirs.
  void update(std::size_t i, const Node& node);

  // Runs everything on the stream. The driver orders it behind what is on that stream and behind
  // every earlier launch of this graph on whatever stream, so that two never share scratch.
  void launch(cu::Stream stream) const;

  // What is running is not disturbed: the driver frees it afterwards.
  void destroy() noexcept;

 private:
  std::shared_ptr<const Device> device_;
  cu::Graph graph_ = nullptr;
  cu::Exec exec_ = nullptr;
  std::vector<cu::Node> handles_;  // in order; they belong to graph_
};

}  // namespace fastdreamer
