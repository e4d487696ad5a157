// NVIDIA's driver, opened when it is first used, with every call checked.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>

#include "cuda/api.h"

namespace fastdreamer {

// A driver call that failed ("cuGraphLaunch: CUDA_ERROR_...: text"), or a driver that is not there.
class DriverError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The driver's functions, initialised; the library is libcuda.so.1, or what the environment
// variable FASTDREAMER_LIBCUDA names. Thread-safe. Throws DriverError where there is none, where it
// is older than CUDA 12.0, and in a process forked after it was initialised: CUDA does not survive
// a fork.
const cu::Api& driver();

// Throws unless the result is success.
void check(cu::Result result, const char* call);
#define FASTDREAMER_CUDA(call, ...) \
  ::fastdreamer::check(::fastdreamer::driver().call(__VA_ARGS__), #call)

// For destructors, which cannot throw: a failure goes to the handler, once, and the rest goes on.
// Nothing is called in a forked child, whose driver objects are the parent's.
template <class Call, class... Args>
void release(const char* name, Call call, Args... args);

// Is told of each failed release, on any thread. Set once, by the bindings.
void set_release_handler(void (*handler)(const std::string& message));

struct DriverInfo {
  std::string path;  // as it was asked for
  int version;       // 12040 is CUDA 12.4
  int devices;
};
DriverInfo driver_info();
int driver_version();  // 12040 is CUDA 12.4

// A device's primary context, the one that torch uses, kept for as long as the object lives.
class Device {
 public:
  explicit Device(int ordinal);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  int ordinal() const { return ordinal_; }
  int capability() const { return capability_; }  // 90 is 9.0
  int max_shared() const { return max_shared_; }  // bytes that a block can ask for
  std::string name() const;

  // Runs body with the context current on this thread; what was current before is so again.
  template <class Body>
  void run(Body body) const {
    enter();
    try {
      body();
    } catch (...) {
      leave_quietly();
      throw;
    }
    leave();
  }

  // The same for destructors.
  template <class Body>
  void run_release(Body body) const noexcept {
    const bool entered = enter_quietly() || enter_quietly();  // the first may tell of old errors
    body();  // most calls that free something need no context
    if (entered) leave_quietly();
  }

 private:
  void enter() const;
  void leave() const;
  bool enter_quietly() const noexcept;
  void leave_quietly() const noexcept;

  int ordinal_;
  int capability_ = 0, max_shared_ = 0;
  cu::Device device_ = 0;
  cu::Context context_ = nullptr;
};

// ---------------------------------------------------------------- details

// Null in a forked child and where the driver was never opened.
const cu::Api* driver_of_this_process() noexcept;
void report_release(const char* call, cu::Result result) noexcept;

template <class Call, class... Args>
void release(const char* name, Call call, Args... args) {
  const cu::Api* api = driver_of_this_process();
  if (api == nullptr) return;
  const cu::Result result = (api->*call)(args...);
  if (result != cu::kSuccess && result != cu::kDeinitialized) report_release(name, result);
}
#define FASTDREAMER_CUDA_RELEASE(call, ...) \
  ::fastdreamer::release(#call, &::fastdreamer::cu::Api::call, __VA_ARGS__)

}  // namespace fastdreamer
