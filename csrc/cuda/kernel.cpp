#include "cuda/kernel.h"

#include "common/check.h"

namespace fastdreamer {
namespace {

constexpr int kSharedWithoutAsking = 48 * 1024;
constexpr int kMaxThreads = 1024;

std::string version_text(int number, int major) {
  return std::to_string(number / major) + "." + std::to_string(number % major);
}

}  // namespace

std::size_t size_of(Kind kind) {
  switch (kind) {
    case Kind::pointer:
    case Kind::i64:
      return 8;
    case Kind::i32:
    case Kind::f32:
      return 4;
    case Kind::u8:
      return 1;
  }
  fail("size_of: not a kind");
}

Kernel::Kernel(std::shared_ptr<const Device> device, const KernelImage& image)
    : device_(std::move(device)),
      name_(image.name),
      kinds_(image.kinds),
      hidden_(image.hidden),
      threads_(image.threads),
      shared_bytes_(image.shared_bytes) {
  if (hidden_ < 0 || threads_ < 1 || threads_ > kMaxThreads || shared_bytes_ < 0) {
    fail(name_ + ": hidden parameters, threads or shared bytes are out of range");
  }
  if (shared_bytes_ > device_->max_shared()) {
    fail(name_ + ": a block wants " + std::to_string(shared_bytes_) +
         " bytes of shared memory, the device has " + std::to_string(device_->max_shared()));
  }
  try {
    device_->run([&] { load(image.image); });
  } catch (...) {
    if (module_ != nullptr) {
      device_->run_release([&] { FASTDREAMER_CUDA_RELEASE(cuModuleUnload, module_); });
    }
    throw;
  }
}

Kernel::~Kernel() {
  device_->run_release([&] {
    release("cuCtxSynchronize", &cu::Api::cuCtxSynchronize);
    FASTDREAMER_CUDA_RELEASE(cuModuleUnload, module_);
  });
}

void Kernel::load(const std::string& image) {
  try {
    FASTDREAMER_CUDA(cuModuleLoadData, &module_, image.data());
  } catch (const DriverError& error) {  // most often the driver is older than the assembler
    throw DriverError(name_ + ": " + error.what() + " (compiled for compute capability " +
                      version_text(device_->capability(), 10) + ", the driver is of CUDA " +
                      version_text(driver_version() / 10, 100) + ")");
  }
  FASTDREAMER_CUDA(cuModuleGetFunction, &function_, module_, name_.c_str());
  check_parameters();
  if (shared_bytes_ > kSharedWithoutAsking) {
    FASTDREAMER_CUDA(cuFuncSetAttribute, function_, cu::kFuncMaxShared, shared_bytes_);
  }
}

void Kernel::check_parameters() const {
  if (driver().cuFuncGetParamInfo == nullptr) return;
  const std::size_t count = kinds_.size() + static_cast<std::size_t>(hidden_);
  std::size_t expected = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t size = size_of(i < kinds_.size() ? kinds_[i] : Kind::pointer);
    expected = (expected + size - 1) / size * size;  // each is aligned to its size
    std::size_t offset = 0, found = 0;
    FASTDREAMER_CUDA(cuFuncGetParamInfo, function_, i, &offset, &found);
    if (offset != expected || found != size) {
      throw DriverError(name_ + ": parameter " + std::to_string(i) + " is of " +
                        std::to_string(found) + " bytes at " + std::to_string(offset) +
                        ", expected " + std::to_string(size) + " at " + std::to_string(expected));
    }
    expected += size;
  }
  std::size_t offset = 0, found = 0;
  const cu::Result behind = driver().cuFuncGetParamInfo(function_, count, &offset, &found);
  if (behind == cu::kSuccess) {
    throw DriverError(name_ + ": has more than the " + std::to_string(count) +
                      " parameters expected");
  }
  if (behind != cu::kInvalidValue) check(behind, "cuFuncGetParamInfo");
}

}  // namespace fastdreamer
