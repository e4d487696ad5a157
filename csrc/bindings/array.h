// Arrays from Python, and all that is checked of them.
//
// They come through the buffer protocol (for a tensor: tensor.detach().numpy(), no copy), so that
// neither torch nor numpy headers are needed and type, shape, strides and writability are read
// from the buffer itself.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/view.h"

namespace fastdreamer {

namespace py = pybind11;

// Holds an array's buffer as long as it lives. Made and destroyed with the GIL held.
class Array {
 public:
  Array(const char* op, const char* name, py::handle object) : op_(op), name_(name) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
      throw py::error_already_set();
    }
  }
  ~Array() { PyBuffer_Release(&view_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  int ndim() const { return view_.ndim; }
  Index size(int dimension) const { return view_.shape[dimension]; }
  bool is(char format) const {
    const char* own = view_.format == nullptr ? "B" : view_.format;
    return own[0] == format && own[1] == '\0';
  }

  // The whole array, which is to have that shape and format: 'f' float32, 'h' int16 (bfloat16 by
  // its bits), '?' bool, 'B' uint8.
  const void* in(std::initializer_list<Index> shape, char format = 'f') const {
    bool good = is(format) && view_.ndim == static_cast<int>(shape.size()) &&
                PyBuffer_IsContiguous(&view_, 'C');
    int i = 0;
    for (Index n : shape) good = good && view_.shape[i++] == n;
    if (!good) reject(shape, format);
    return view_.buf;
  }
  const float* floats(std::initializer_list<Index> shape) const {
    return static_cast<const float*>(in(shape));
  }
  void* out(std::initializer_list<Index> shape, char format = 'f') const {
    in(shape, format);
    if (view_.readonly) fail(prefix() + "be writable, got a read-only buffer");
    return view_.buf;
  }

  bool overlaps(const Array& other) const {
    return begin() < other.begin() + other.view_.len && other.begin() < begin() + view_.len;
  }
  const char* name() const { return name_; }

 private:
  std::string prefix() const { return std::string(op_) + ": " + name_ + " must "; }

  [[noreturn]] void reject(std::initializer_list<Index> shape, char format) const {
    const auto list = [](auto begin, auto end) {
      std::string text = "[";
      for (auto i = begin; i != end; ++i) text += (i == begin ? "" : ", ") + std::to_string(*i);
      return text + "]";
    };
    const char* type = format == 'f'   ? "float32"
                       : format == 'h' ? "bfloat16"
                       : format == 'B' ? "uint8"
                                       : "bool";
    std::string got = list(view_.shape, view_.shape + view_.ndim) + " of buffer format '" +
                      (view_.format == nullptr ? "B" : view_.format) + "'";
    if (!PyBuffer_IsContiguous(&view_, 'C')) {
      got += " with byte strides " + list(view_.strides, view_.strides + view_.ndim);
    }
    fail(prefix() + "be " + list(shape.begin(), shape.end()) + " " + type + " contiguous, got " +
         got);
  }

  const char* begin() const { return static_cast<const char*>(view_.buf); }

  const char* op_;
  const char* name_;
  Py_buffer view_;
};

// The arrays of one call, some of which may be None; kept as long as they may be used.
class Arrays {
 public:
  explicit Arrays(const char* op) : op_(op) {}

  const float* in(const char* name, py::handle object, std::initializer_list<Index> shape) {
    return take(inputs_, name, object).floats(shape);
  }
  float* out(const char* name, py::handle object, std::initializer_list<Index> shape) {
    return static_cast<float*>(take(outputs_, name, object).out(shape));
  }
  // The same, null for None.
  const float* maybe_in(const char* name, py::handle object, std::initializer_list<Index> shape) {
    return object.is_none() ? nullptr : in(name, object, shape);
  }
  float* maybe_out(const char* name, py::handle object, std::initializer_list<Index> shape) {
    return object.is_none() ? nullptr : out(name, object, shape);
  }
  // As `out` and `in`, of another format ('h', '?' or 'B').
  void* out_format(const char* name, py::handle object, std::initializer_list<Index> shape,
                   char format) {
    return take(outputs_, name, object).out(shape, format);
  }
  const void* in_format(const char* name, py::handle object, std::initializer_list<Index> shape,
                        char format) {
    return take(inputs_, name, object).in(shape, format);
  }

  // Throws if an output overlaps another array.
  void check_overlap() const {
    for (std::size_t i = 0; i < outputs_.size(); ++i) {
      for (const auto& in : inputs_) refuse(*outputs_[i], *in);
      for (std::size_t j = 0; j < i; ++j) refuse(*outputs_[i], *outputs_[j]);
    }
  }
  const char* op() const { return op_; }

 private:
  using List = std::vector<std::unique_ptr<Array>>;

  Array& take(List& list, const char* name, py::handle object) {
    list.push_back(std::make_unique<Array>(op_, name, object));
    return *list.back();
  }
  void refuse(const Array& out, const Array& other) const {
    if (out.overlaps(other)) {
      fail(std::string(op_) + ": " + out.name() + " overlaps " + other.name());
    }
  }

  const char* op_;
  List inputs_, outputs_;
};

}  // namespace fastdreamer
