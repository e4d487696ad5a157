#include "cuda/driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <mutex>

namespace fastdreamer {
namespace {

constexpr int kOldest = 12000;

struct Opened {
  cu::Api api;
  std::string path;
  int version = 0;
};

std::mutex opening;
Opened opened;
std::atomic<const cu::Api*> ready{nullptr};  // &opened.api, once it is initialised
std::atomic<bool> forked{false};             // from the process that initialised it
pid_t owner = 0;                             // that process
std::atomic<void (*)(const std::string&)> release_handler{nullptr};

std::string describe(const cu::Api& api, cu::Result result) {
  const char* name = nullptr;
  const char* text = nullptr;
  if (api.cuGetErrorName(result, &name) != cu::kSuccess || name == nullptr) {
    return "error " + std::to_string(result);
  }
  if (api.cuGetErrorString(result, &text) != cu::kSuccess || text == nullptr) return name;
  return std::string(name) + ": " + text;
}

void expect(const cu::Api& api, cu::Result result, const char* call) {
  if (result != cu::kSuccess) {
    throw DriverError(std::string(call) + ": " + describe(api, result));
  }
}

void refuse_fork() {
  if (forked.load(std::memory_order_relaxed)) {
    throw DriverError("CUDA was initialised in process " + std::to_string(owner) +
                      ", of which this one is a fork, and does not work here: start processes "
                      "with the method 'spawn' or 'forkserver'");
  }
}

const cu::Api& open_driver() {
  const std::lock_guard<std::mutex> lock(opening);
  if (const cu::Api* api = ready.load()) return *api;  // another thread was faster
  const char* asked = std::getenv("FASTDREAMER_LIBCUDA");
  const std::string path = asked != nullptr && *asked != '\0' ? asked : "libcuda.so.1";
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // never closed
  if (library == nullptr) {
    const char* why = dlerror();
    throw DriverError("no NVIDIA driver: " + std::string(why == nullptr ? path : why));
  }
  opened.path = path;
  std::string missing;
#define FASTDREAMER_FIND(symbol, arguments) \
  opened.api.symbol = reinterpret_cast<decltype(opened.api.symbol)>(dlsym(library, #symbol));
#define FASTDREAMER_NEED(symbol, arguments) \
  FASTDREAMER_FIND(symbol, arguments)       \
  if (opened.api.symbol == nullptr) missing += " " #symbol;
  FASTDREAMER_CUDA_REQUIRED(FASTDREAMER_NEED)
  FASTDREAMER_CUDA_VERSIONED(FASTDREAMER_NEED)
  FASTDREAMER_CUDA_OPTIONAL(FASTDREAMER_FIND)
#undef FASTDREAMER_FIND
#undef FASTDREAMER_NEED
  if (!missing.empty()) {
    throw DriverError("the NVIDIA driver " + path +
                      " is too old, CUDA 12.0 is the oldest that will do; it lacks" + missing);
  }
  expect(opened.api, opened.api.cuInit(0), "cuInit");
  expect(opened.api, opened.api.cuDriverGetVersion(&opened.version), "cuDriverGetVersion");
  if (opened.version < kOldest) {
    throw DriverError("the NVIDIA driver " + path + " is too old: it is of CUDA " +
                      std::to_string(opened.version / 1000) + "." +
                      std::to_string(opened.version % 1000 / 10) +
                      ", 12.0 is the oldest that will do");
  }
  owner = getpid();
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  ready = &opened.api;
  return opened.api;
}

}  // namespace

const cu::Api& driver() {
  const cu::Api* api = ready.load(std::memory_order_acquire);
  if (api == nullptr) return open_driver();
  refuse_fork();
  return *api;
}

void check(cu::Result result, const char* call) { expect(*ready.load(), result, call); }

const cu::Api* driver_of_this_process() noexcept { return forked.load() ? nullptr : ready.load(); }

void set_release_handler(void (*handler)(const std::string& message)) { release_handler = handler; }

void report_release(const char* call, cu::Result result) noexcept {
  const auto handler = release_handler.load();
  if (handler == nullptr) return;
  try {
    handler(std::string(call) + ": " + describe(*ready.load(), result));
  } catch (...) {  // no memory for the message
  }
}

int driver_version() {
  driver();
  return opened.version;
}

DriverInfo driver_info() {
  int devices = 0;
  FASTDREAMER_CUDA(cuDeviceGetCount, &devices);
  return {opened.path, opened.version, devices};
}

Device::Device(int ordinal) : ordinal_(ordinal) {
  FASTDREAMER_CUDA(cuDeviceGet, &device_, ordinal);
  int major = 0, minor = 0;
  FASTDREAMER_CUDA(cuDeviceGetAttribute, &major, cu::kComputeCapabilityMajor, device_);
  FASTDREAMER_CUDA(cuDeviceGetAttribute, &minor, cu::kComputeCapabilityMinor, device_);
  FASTDREAMER_CUDA(cuDeviceGetAttribute, &max_shared_, cu::kMaxSharedOptin, device_);
  capability_ = 10 * major + minor;
  FASTDREAMER_CUDA(cuDevicePrimaryCtxRetain, &context_, device_);
}

Device::~Device() { FASTDREAMER_CUDA_RELEASE(cuDevicePrimaryCtxRelease_v2, device_); }

std::string Device::name() const {
  char text[256] = "";
  FASTDREAMER_CUDA(cuDeviceGetName, text, sizeof(text), device_);
  return text;
}

void Device::enter() const { FASTDREAMER_CUDA(cuCtxPushCurrent_v2, context_); }

void Device::leave() const {
  cu::Context before = nullptr;
  FASTDREAMER_CUDA(cuCtxPopCurrent_v2, &before);
}

bool Device::enter_quietly() const noexcept {
  const cu::Api* api = driver_of_this_process();
  if (api == nullptr) return false;
  const cu::Result result = api->cuCtxPushCurrent_v2(context_);
  if (result == cu::kSuccess) return true;
  if (result != cu::kDeinitialized) report_release("cuCtxPushCurrent_v2", result);
  return false;
}

void Device::leave_quietly() const noexcept {
  cu::Context before = nullptr;
  FASTDREAMER_CUDA_RELEASE(cuCtxPopCurrent_v2, &before);
}

}  // namespace fastdreamer
