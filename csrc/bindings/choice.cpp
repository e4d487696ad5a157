#include "bindings/choice.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "cpu/choice.h"

namespace fastdreamer {
namespace {

namespace py = pybind11;

using Rate = std::tuple<std::string, double, double>;  // instruction set, fp32, bf16
using Name = std::optional<std::string>;

Isa isa_of(const std::string& name) {
  for (Isa isa : kIsas) {
    if (name == isa_name(isa)) return isa;
  }
  fail("there is no instruction set '" + name + "'");
}

const char* precision_name(Precision p) { return p == Precision::bf16 ? "bf16" : "fp32"; }

Precision precision_of(const std::string& name) {
  for (Precision p : {Precision::fp32, Precision::bf16}) {
    if (name == precision_name(p)) return p;
  }
  fail("there is no precision '" + name + "'");
}

py::dict as_dict(const Choice& made) {
  py::dict out;
  for (Precision p : {Precision::fp32, Precision::bf16}) {
    out[precision_name(p)] = isa_name(made.isa[static_cast<int>(p)]);
  }
  out["for_bf16"] = precision_name(made.for_bf16);
  return out;
}

py::dict choose_by_name(const std::vector<Rate>& rates, const Name& isa, const Name& arithmetic) {
  std::vector<Rates> measured;
  for (const auto& [name, fp32, bf16] : rates) measured.push_back({isa_of(name), {fp32, bf16}});
  const Isa forced = isa ? isa_of(*isa) : Isa::scalar;
  const Precision asked = arithmetic ? precision_of(*arithmetic) : Precision::fp32;
  const Choice made = choose(measured, isa ? &forced : nullptr, arithmetic ? &asked : nullptr);
  py::dict out = as_dict(made);
  out["faster"] = precision_name(faster(measured, made));
  return out;
}

std::vector<Rate> rates_by_name() {
  std::vector<Rate> out;
  for (const Rates& one : rates()) {
    out.emplace_back(isa_name(one.isa), one.gflops[0], one.gflops[1]);
  }
  return out;
}

void settle_by_name(const std::string& fp32, const std::string& bf16, const std::string& for_bf16) {
  settle({{isa_of(fp32), isa_of(bf16)}, precision_of(for_bf16)});
}

}  // namespace

void bind_choice(py::module_& m) {
  m.def("rates", &rates_by_name,
        "What the kernels of every instruction set of this machine reach, least first: its name, "
        "and GFLOP/s of one thread in fp32 and in bf16. Measured once, in a few milliseconds.");
  m.def("choose", &choose_by_name, py::arg("rates"), py::arg("isa") = py::none(),
        py::arg("arithmetic") = py::none(),
        "The rule (csrc/cpu/choice.h): choice() and faster() of such rates and settings.");
  m.def(
      "choice", [] { return as_dict(choice()); },
      "The kernels in force: the instruction sets of `fp32` and of `bf16`, and the arithmetic "
      "`for_bf16` of calls that ask for bfloat16. ValueError if FASTDREAMER_ISA or "
      "FASTDREAMER_ARITHMETIC names one that is not available.");
  m.def(
      "faster", [] { return precision_name(faster(rates(), choice())); },
      "The precision that is faster by the choice in force.");
  m.def("settle", &settle_by_name, py::arg("fp32"), py::arg("bf16"), py::arg("for_bf16"),
        "Take another process's choice(); ValueError if that cannot be.");
  m.def(
      "takes_bf16", [] { return choice().for_bf16 == Precision::bf16; },
      "Whether calls that ask for bfloat16 compute in it.");
  m.def(
      "isa", [] { return isa_name(choice().isa[static_cast<int>(Precision::fp32)]); },
      "The instruction set in force for fp32.");
}

}  // namespace fastdreamer
