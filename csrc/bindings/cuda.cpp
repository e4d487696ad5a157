// The CUDA-graph loop, for fastdreamer/ops/triton/program.py. Addresses and streams come as
// integers: who calls keeps the tensors alive and says which stream is torch's current one.
#include "bindings/cuda.h"

#include <pybind11/stl.h>

#include "bindings/gil.h"
#include "common/check.h"
#include "cuda/loop.h"

namespace fastdreamer {
namespace {

namespace py = pybind11;

Kind kind_of(const std::string& name) {
  if (name == "pointer") return Kind::pointer;
  if (name == "i32") return Kind::i32;
  if (name == "i64") return Kind::i64;
  if (name == "f32") return Kind::f32;
  if (name == "u8") return Kind::u8;
  fail("CudaKernel: a parameter must be pointer, i32, i64, f32 or u8, got '" + name + "'");
}

std::shared_ptr<Kernel> make_kernel(std::shared_ptr<const Device> device, const std::string& name,
                                    const py::bytes& image, const std::vector<std::string>& kinds,
                                    int hidden, int threads, int shared_bytes) {
  KernelImage made{name, image, {}, hidden, threads, shared_bytes};
  for (const std::string& kind : kinds) made.kinds.push_back(kind_of(kind));
  const WithoutGil released;
  return std::make_shared<Kernel>(std::move(device), made);
}

Affine affine_of(const py::handle& base, const py::handle& terms) {
  Affine affine{base.cast<Index>(), {}};
  for (const py::handle& item : terms.cast<py::tuple>()) {
    const auto [depth, stride, start, step, modulo] =
        item.cast<std::tuple<int, Index, Index, Index, Index>>();
    affine.terms.push_back({depth, stride, start, step, modulo});
  }
  return affine;
}

// (slot, base, terms) for a pointer, (base, terms) for an integer, a number for a float.
Argument argument_of(Kind kind, const py::handle& object) {
  Argument argument{kind, -1, {}, 0.0f};
  if (kind == Kind::f32) {
    argument.number = object.cast<float>();
    return argument;
  }
  const auto parts = object.cast<py::tuple>();
  const bool pointer = kind == Kind::pointer;
  if (parts.size() != (pointer ? 3 : 2)) {
    fail("CudaLoop: an argument must be (slot, base, terms), (base, terms) or a number");
  }
  if (pointer) argument.slot = parts[0].cast<int>();
  argument.offset = affine_of(parts[pointer ? 1 : 0], parts[pointer ? 2 : 1]);
  return argument;
}

void launch(Loop& loop, std::shared_ptr<const Kernel> kernel, std::array<unsigned, 3> grid,
            const py::tuple& objects) {
  const std::vector<Kind>& kinds = kernel->kinds();
  if (objects.size() != kinds.size()) {
    fail(kernel->name() + ": takes " + std::to_string(kinds.size()) + " arguments, got " +
         std::to_string(objects.size()));
  }
  std::vector<Argument> arguments;
  for (std::size_t i = 0; i < kinds.size(); ++i) {
    arguments.push_back(argument_of(kinds[i], objects[i]));
  }
  loop.launch(std::move(kernel), grid, arguments);
}

// A destructor cannot raise, so a release that the driver refused is a warning.
void warn(const std::string& message) {
  if (!Py_IsInitialized()) return;
  py::gil_scoped_acquire gil;
  py::error_scope kept;  // an exception may be on its way
  if (PyErr_WarnEx(PyExc_RuntimeWarning, message.c_str(), 1) < 0) PyErr_WriteUnraisable(nullptr);
}

py::dict driver_dict() {
  const DriverInfo info = driver_info();
  py::dict result;
  result["path"] = info.path;
  result["version"] = py::make_tuple(info.version / 1000, info.version % 1000 / 10);
  result["devices"] = info.devices;
  return result;
}

}  // namespace

void bind_cuda(py::module_& m) {
  py::register_exception<DriverError>(m, "DriverError", PyExc_RuntimeError);
  set_release_handler(&warn);
  m.def("cuda_driver", &driver_dict,
        "The driver's path, CUDA version and number of devices; DriverError says what is missing.");
  py::class_<Device, std::shared_ptr<Device>>(m, "CudaDevice", "A device's primary context.")
      .def(py::init<int>(), py::arg("ordinal"), py::call_guard<WithoutGil>())
      .def_property_readonly("ordinal", &Device::ordinal)
      .def_property_readonly("capability", &Device::capability, "90 is 9.0.")
      .def_property_readonly("max_shared", &Device::max_shared, "Bytes a block can ask for.")
      .def_property_readonly("name", &Device::name);
  py::class_<Kernel, std::shared_ptr<Kernel>>(m, "CudaKernel", "A cubin's function, loaded.")
      .def(py::init(&make_kernel), py::arg("device"), py::arg("name"), py::arg("image"),
           py::arg("kinds"), py::arg("hidden"), py::arg("threads"), py::arg("shared_bytes"));
  py::class_<Loop, std::shared_ptr<Loop>>(m, "CudaLoop",
                                          "Nested loops of launches as one CUDA graph.")
      .def(py::init([](std::shared_ptr<Device> device, std::vector<Index> slots) {
             return std::make_shared<Loop>(std::move(device), std::move(slots));
           }),
           py::arg("device"), py::arg("slots"))
      .def("begin", &Loop::begin, py::arg("count"))
      .def("end", &Loop::end)
      .def("launch", &launch, py::arg("kernel"), py::arg("grid"), py::arg("arguments"))
      .def(
          "replay",
          [](Loop& loop, const std::vector<std::uint64_t>& addresses, std::uintptr_t stream) {
            const WithoutGil released;
            return loop.replay(addresses, reinterpret_cast<cu::Stream>(stream));
          },
          py::arg("addresses"), py::arg("stream"),
          "Run on the stream with the slots at these addresses; returns the nodes written.")
      .def(
          "enqueue",
          [](Loop& loop, const std::vector<std::uint64_t>& addresses, std::uintptr_t stream) {
            const WithoutGil released;
            loop.enqueue(addresses, reinterpret_cast<cu::Stream>(stream));
          },
          py::arg("addresses"), py::arg("stream"),
          "Launch one by one, on a stream that is being captured.")
      .def_property_readonly("nodes", &Loop::nodes);
}

}  // namespace fastdreamer
