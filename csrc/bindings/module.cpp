// The Python module fastdreamer._native: λ-return and what the extension says of itself; the other
// files of this folder bind the rest.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <string>
#include <vector>

#include "bindings/array.h"
#include "bindings/cem.h"
#include "bindings/choice.h"
#include "bindings/codec.h"
#include "bindings/cuda.h"
#include "bindings/decide.h"
#include "bindings/gil.h"
#include "bindings/imagine.h"
#include "bindings/observe.h"
#include "bindings/rays.h"
#include "bindings/weights.h"
#include "cpu/arena.h"
#include "cpu/cpuid.h"
#include "cpu/isa.h"
#include "cpu/lambda_return.h"
#include "cpu/parallel.h"

namespace fastdreamer {
namespace {

// Sizes [H, B] of the first array of a scan.
struct Sizes {
  Index H, B;
};

Sizes check_scan(const char* op, const char* name, py::handle first, double lam, int threads) {
  const Array array(op, name, first);
  if (array.ndim() != 2) {
    fail(std::string(op) + ": " + name + " must have 2 dimensions, got " +
         std::to_string(array.ndim()));
  }
  if (array.size(0) < 1 || array.size(1) < 1) fail(std::string(op) + ": the arrays are empty");
  check_lam(op, lam);
  if (threads < 1) fail(std::string(op) + ": threads must be at least 1");
  return {array.size(0), array.size(1)};
}

void lambda_return_forward(py::handle reward, py::handle next_value, py::handle discount,
                           double lam, py::handle returns, int threads) {
  const char* op = "lambda_return_forward";
  const auto [H, B] = check_scan(op, "reward", reward, lam, threads);
  Arrays arrays(op);
  const auto in = [&, H = H, B = B](const char* name, py::handle object) {
    return Matrix<const float>{arrays.in(name, object, {H, B}), H, B};
  };
  const LambdaReturnForward args{
      in("reward", reward),     in("next_value", next_value),
      in("discount", discount), float(lam),
      float(1.0 - lam),         {arrays.out("returns", returns, {H, B}), H, B}};
  arrays.check_overlap();
  const WithoutGil released;
  lambda_return(args, threads);
}

void lambda_return_backward(py::handle grad, py::handle next_value, py::handle discount,
                            py::handle returns, double lam, py::handle grad_reward,
                            py::handle grad_next_value, py::handle grad_discount, int threads) {
  const char* op = "lambda_return_backward";
  const auto [H, B] = check_scan(op, "grad", grad, lam, threads);
  Arrays arrays(op);
  const auto in = [&, H = H, B = B](const char* name, py::handle object) {
    return Matrix<const float>{arrays.in(name, object, {H, B}), H, B};
  };
  const auto out = [&, H = H, B = B](const char* name, py::handle object) {
    return Matrix<float>{arrays.out(name, object, {H, B}), H, B};
  };
  const LambdaReturnBackward args{in("grad", grad),
                                  in("next_value", next_value),
                                  in("discount", discount),
                                  in("returns", returns),
                                  float(lam),
                                  float(1.0 - lam),
                                  out("grad_reward", grad_reward),
                                  out("grad_next_value", grad_next_value),
                                  out("grad_discount", grad_discount)};
  arrays.check_overlap();
  const WithoutGil released;
  lambda_return(args, threads);
}

void evaluate(const std::string& name, py::handle in, py::handle out, bool bf16) {
  const char* names[] = {"exp",    "expm1", "sigmoid",   "tanh", "softplus",
                         "symexp", "gelu",  "gelu_tanh", "mish"};
  const auto found = std::find(std::begin(names), std::end(names), name);
  if (found == std::end(names)) fail("evaluate: there is no function '" + name + "'");
  const Array shape("evaluate", "x", in);
  if (shape.ndim() != 1) fail("evaluate: x must have 1 dimension");
  Arrays arrays("evaluate");
  const float* from = arrays.in("x", in, {shape.size(0)});
  float* to = arrays.out("out", out, {shape.size(0)});
  arrays.check_overlap();
  kernels(bf16 ? Precision::bf16 : Precision::fp32)
      .evaluate(static_cast<Function>(found - std::begin(names)), from, to, shape.size(0));
}

// GFLOP/s of the kernels' peak, all threads together.
double peak(bool bf16, int threads, double seconds) {
  if (threads < 1 || !(seconds > 0 && seconds <= 60)) {
    fail("peak: threads must be at least 1 and seconds in (0, 60]");
  }
  const Kernels& k = kernels(bf16 ? Precision::bf16 : Precision::fp32);
  using Clock = std::chrono::steady_clock;
  std::vector<double> rates(static_cast<std::size_t>(threads), 0.0);
  const WithoutGil released;
  const auto measure = [&](Index, int thread) {
    const auto start = Clock::now();
    double flop = 0, spent = 0;
    while (spent < seconds) {
      flop += k.peak(20000);
      spent = std::chrono::duration<double>(Clock::now() - start).count();
    }
    rates[static_cast<std::size_t>(thread)] += flop / spent * 1e-9;
  };
  parallel_tiles(Tiling(threads, 1, threads),
                 [&](Index begin, Index, int thread) { measure(begin, thread); });
  double total = 0;
  for (double rate : rates) total += rate;
  return total;
}

py::list host_isas() {
  py::list names;
  for (Isa isa : kIsas) {
    if (!is_emulated(isa) && host_has(isa)) names.append(isa_name(isa));
  }
  return names;
}

// Calls body(name, member) on every fact.
template <class Facts, class Body>
void by_fact(Facts& f, const Body& body) {
  body("leaf_1_ecx", f.leaf_1_ecx);
  body("leaf_7_ebx", f.leaf_7_ebx);
  body("leaf_7_edx", f.leaf_7_edx);
  body("leaf_7_1_eax", f.leaf_7_1_eax);
  body("leaf_1d_eax", f.leaf_1d_eax);
  body("leaf_1d_1_eax", f.leaf_1d_1_eax);
  body("leaf_1d_1_ebx", f.leaf_1d_1_ebx);
  body("leaf_1d_1_ecx", f.leaf_1d_1_ecx);
  body("xcr0", f.xcr0);
  body("tile_permission", f.tile_permission);
}

py::dict cpu_facts() {
  py::dict facts;
  by_fact(host_facts(), [&](const char* name, const auto& value) { facts[name] = value; });
  return facts;
}

CpuFacts facts_of(const py::object& facts) {
  if (facts.is_none()) return host_facts();
  CpuFacts f{};
  by_fact(f, [&](const char* name, auto& value) {
    value = facts[name].template cast<std::decay_t<decltype(value)>>();
  });
  return f;
}

py::dict isa_reasons(const py::object& facts) {
  const CpuFacts f = facts_of(facts);
  py::dict reasons;
  for (Isa isa : kIsas) {
    const std::string reason = why_not(isa, f);
    reasons[isa_name(isa)] = reason.empty() ? py::object(py::none()) : py::cast(reason);
  }
  return reasons;
}

// Whether the process was forked since it imported the package, which loads this only when it is
// asked for. Loaded by itself, as in tests, it has no package.
bool package_saw_a_fork() {
  const py::dict modules = py::module_::import("sys").attr("modules");
  return modules.contains("fastdreamer") && modules["fastdreamer"].attr("_forked").cast<bool>();
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
  if (package_saw_a_fork()) note_fork();
  m.def("lambda_return_forward", &lambda_return_forward,
        "Write the λ-return of [H, B] float32 arrays into `returns`; see fastdreamer.ops.",
        py::arg("reward"), py::arg("next_value"), py::arg("discount"), py::arg("lam"),
        py::arg("returns"), py::arg("threads"));
  m.def("lambda_return_backward", &lambda_return_backward,
        "Write the gradients of the inputs of lambda_return_forward into the last three arrays.",
        py::arg("grad"), py::arg("next_value"), py::arg("discount"), py::arg("returns"),
        py::arg("lam"), py::arg("grad_reward"), py::arg("grad_next_value"),
        py::arg("grad_discount"), py::arg("threads"));
  m.attr("MAX_LAYERS") = kMaxLayers;  // of an MLP
  bind_weights(m);
  bind_imagine(m);
  bind_observe(m);
  bind_decide(m);
  m.def("evaluate", &evaluate, py::arg("name"), py::arg("x"), py::arg("out"), py::arg("bf16"),
        "An elementary function of the core (csrc/cpu/functions.h), to measure its error.");
  bind_cem(m);
  bind_codec(m);
  bind_rays(m);
  bind_cuda(m);
  m.def("peak", &peak, py::arg("bf16"), py::arg("threads"), py::arg("seconds"),
        "GFLOP/s of multiply-adds that nothing holds up, of all threads together.");
  m.def("arena_release", &arena_release, "Give back to the system the memory kept for later.");
  m.def(
      "arena_stats",
      [] {
        const ArenaStats stats = arena_stats();
        return py::make_tuple(stats.kept, stats.allocations);
      },
      "Bytes kept for later calls, and the number of allocations so far.");
  bind_choice(m);
  m.def("host_isas", &host_isas, "The instruction sets that this machine has, least first.");
  m.def("cpu_facts", &cpu_facts, "What that is decided by, by name; see csrc/cpu/cpuid.h.");
  m.def("isa_reasons", &isa_reasons, py::arg("facts") = py::none(),
        "By name of an instruction set, emulated ones too: why it cannot be used, or None. Of this "
        "machine or of given facts.");
  m.def(
      "best_isa", [](const py::object& facts) { return isa_name(best_isa(facts_of(facts))); },
      py::arg("facts") = py::none(),
      "The last instruction set that can be used, emulated ones apart; likewise.");
  m.def("build_info", &build_info, "How the extension was built: version, compiler, OpenMP.");
}

}  // namespace fastdreamer
