// The Python module fastdreamer._native, and all validation of the buffers it is handed.
//
// Arrays come through the buffer protocol (for a tensor: tensor.detach().numpy(), no copy), so
// that neither torch nor numpy headers are needed and type, shape, strides and writability are
// read from the buffer itself.
#include <pybind11/pybind11.h>

#include <cstring>
#include <initializer_list>
#include <string>

#include "common/check.h"
#include "cpu/isa.h"
#include "cpu/scan.h"

namespace py = pybind11;

namespace fastdreamer {
namespace {

// Holds an array's buffer for the length of a call. Made and destroyed with the GIL held.
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

  // Both return the whole array, which is to have `rows` × `cols` elements.
  Matrix<const float> in(Index rows, Index cols) const {
    check(rows, cols);
    return {static_cast<const float*>(view_.buf), rows, cols};
  }
  Matrix<float> out(Index rows, Index cols) const {
    check(rows, cols);
    if (view_.readonly) reject("be writable", "a read-only buffer");
    return {static_cast<float*>(view_.buf), rows, cols};
  }

  // Sizes of a two-dimensional array.
  Index rows() const { return matrix()->shape[0]; }
  Index cols() const { return matrix()->shape[1]; }

  bool overlaps(const Array& other) const {
    return begin() < other.begin() + other.view_.len && other.begin() < begin() + view_.len;
  }
  const char* name() const { return name_; }

 private:
  const Py_buffer* matrix() const {
    if (view_.ndim != 2) {
      reject("have 2 dimensions", std::to_string(view_.ndim));
    }
    return &view_;
  }

  void check(Index rows, Index cols) const {
    const char* format = view_.format == nullptr ? "B" : view_.format;
    std::string got;
    if (std::strcmp(format, "f") != 0) {
      got = "elements of buffer format '" + std::string(format) + "'";
    } else if (matrix()->shape[0] != rows || view_.shape[1] != cols) {
      got = "[" + std::to_string(view_.shape[0]) + ", " + std::to_string(view_.shape[1]) + "]";
    } else if (!PyBuffer_IsContiguous(&view_, 'C')) {
      got = "byte strides [" + std::to_string(view_.strides[0]) + ", " +
            std::to_string(view_.strides[1]) + "]";
    } else {
      return;
    }
    reject("be [" + std::to_string(rows) + ", " + std::to_string(cols) + "] float32 contiguous",
           got);
  }

  [[noreturn]] void reject(const std::string& want, const std::string& got) const {
    fail(std::string(op_) + ": " + name_ + " must " + want + ", got " + got);
  }

  const char* begin() const { return static_cast<const char*>(view_.buf); }

  const char* op_;
  const char* name_;
  Py_buffer view_;
};

void check_outputs(const char* op, std::initializer_list<const Array*> inputs,
                   std::initializer_list<const Array*> outputs) {
  for (auto out = outputs.begin(); out != outputs.end(); ++out) {
    for (const Array* in : inputs) {
      if ((*out)->overlaps(*in)) {
        fail(std::string(op) + ": " + (*out)->name() + " overlaps " + in->name());
      }
    }
    for (auto other = outputs.begin(); other != out; ++other) {
      if ((*out)->overlaps(**other)) {
        fail(std::string(op) + ": " + (*out)->name() + " overlaps " + (*other)->name());
      }
    }
  }
}

void check_scan(const char* op, const Array& first, double lam, int threads) {
  if (first.rows() < 1 || first.cols() < 1) fail(std::string(op) + ": the arrays are empty");
  if (!(lam >= 0.0 && lam <= 1.0)) {
    fail(std::string(op) + ": lam must be in [0, 1], got " + std::to_string(lam));
  }
  if (threads < 1) fail(std::string(op) + ": threads must be at least 1");
}

void lambda_return_forward(py::handle reward, py::handle next_value, py::handle discount,
                           double lam, py::handle returns, int threads) {
  const char* op = "lambda_return_forward";
  const Array r(op, "reward", reward), v(op, "next_value", next_value), d(op, "discount", discount),
      g(op, "returns", returns);
  check_scan(op, r, lam, threads);
  const Index H = r.rows(), B = r.cols();
  const LambdaReturnForward args{r.in(H, B), v.in(H, B),       d.in(H, B),
                                 float(lam), float(1.0 - lam), g.out(H, B)};
  check_outputs(op, {&r, &v, &d}, {&g});
  py::gil_scoped_release release;
  lambda_return(args, threads);
}

void lambda_return_backward(py::handle grad, py::handle next_value, py::handle discount,
                            py::handle returns, double lam, py::handle grad_reward,
                            py::handle grad_next_value, py::handle grad_discount, int threads) {
  const char* op = "lambda_return_backward";
  const Array a(op, "grad", grad), v(op, "next_value", next_value), d(op, "discount", discount),
      g(op, "returns", returns), gr(op, "grad_reward", grad_reward),
      gv(op, "grad_next_value", grad_next_value), gd(op, "grad_discount", grad_discount);
  check_scan(op, a, lam, threads);
  const Index H = a.rows(), B = a.cols();
  const LambdaReturnBackward args{a.in(H, B),   v.in(H, B),   d.in(H, B),
                                  g.in(H, B),   float(lam),   float(1.0 - lam),
                                  gr.out(H, B), gv.out(H, B), gd.out(H, B)};
  check_outputs(op, {&a, &v, &d, &g}, {&gr, &gv, &gd});
  py::gil_scoped_release release;
  lambda_return(args, threads);
}

py::list host_isas() {
  py::list names;
  for (Isa isa : kIsas) {
    if (host_has(isa)) names.append(isa_name(isa));
  }
  return names;
}

py::dict build_info() {
  py::dict info;
  info["version"] = FASTDREAMER_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["architecture"] = FD_X86 ? "x86-64" : "other (scalar kernels only)";
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ core of fastdreamer. Import torch first: they share its OpenMP runtime.";
  m.def("lambda_return_forward", &lambda_return_forward,
        "Write the λ-return of [H, B] float32 arrays into `returns`; see fastdreamer.ops.",
        py::arg("reward"), py::arg("next_value"), py::arg("discount"), py::arg("lam"),
        py::arg("returns"), py::arg("threads"));
  m.def("lambda_return_backward", &lambda_return_backward,
        "Write the gradients of the inputs of lambda_return_forward into the last three arrays.",
        py::arg("grad"), py::arg("next_value"), py::arg("discount"), py::arg("returns"),
        py::arg("lam"), py::arg("grad_reward"), py::arg("grad_next_value"),
        py::arg("grad_discount"), py::arg("threads"));
  m.def(
      "isa", [] { return isa_name(active_isa()); },
      "The instruction set in force; ValueError if FASTDREAMER_ISA names one not available.");
  m.def("host_isas", &host_isas, "The instruction sets that this machine has, least first.");
  m.def("build_info", &build_info, "How the extension was built: version, compiler, OpenMP.");
}

}  // namespace fastdreamer
