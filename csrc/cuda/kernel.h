// A compiled kernel on a device.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "common/view.h"
#include "cuda/driver.h"

namespace fastdreamer {

// How a kernel takes one of its parameters.
enum class Kind { pointer, i32, i64, f32, u8 };
std::size_t size_of(Kind kind);

// What the compiler made and said of a kernel.
struct KernelImage {
  std::string name;         // of the function
  std::string image;        // a cubin; read by the constructor only
  std::vector<Kind> kinds;  // of its parameters in order, the hidden ones at the end not counted
  int hidden;               // pointers after them; the loop gives null
  int threads;              // of a block
  int shared_bytes;         // of a block, dynamic
};

class Kernel {
 public:
  // Loads it. Throws DriverError, also where the driver sees other parameters than `kinds` and
  // `hidden` say (asked of drivers since CUDA 12.4), and invalid_argument where a block wants more
  // shared memory than the device has.
  Kernel(std::shared_ptr<const Device> device, const KernelImage& image);
  ~Kernel();  // waits until the device has done all work: some of it may be this kernel's
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  const Device& device() const { return *device_; }
  const std::string& name() const { return name_; }
  const std::vector<Kind>& kinds() const { return kinds_; }
  int hidden() const { return hidden_; }
  unsigned threads() const { return static_cast<unsigned>(threads_); }
  unsigned shared_bytes() const { return static_cast<unsigned>(shared_bytes_); }
  cu::Function function() const { return function_; }

 private:
  void load(const std::string& image);
  void check_parameters() const;

  std::shared_ptr<const Device> device_;
  std::string name_;
  std::vector<Kind> kinds_;
  int hidden_, threads_, shared_bytes_;
  cu::Module module_ = nullptr;
  cu::Function function_ = nullptr;
};

}  // namespace fastdreamer
