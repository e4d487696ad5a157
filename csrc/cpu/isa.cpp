#include "cpu/isa.h"

#include <cstdlib>
#include <string>

#include "common/check.h"
#include "cpu/cpuid.h"

namespace fastdreamer {
namespace {

Isa choose() {
  const char* forced = std::getenv("FASTDREAMER_ISA");
  if (forced == nullptr || *forced == '\0') return best_isa(host_facts());
  std::string all, host, reason;
  for (Isa isa : kIsas) {
    const bool named = std::string(forced) == isa_name(isa);
    if (named && host_has(isa)) return isa;
    if (named) reason = ": " + why_not(isa, host_facts());
    all += std::string(all.empty() ? "" : ", ") + isa_name(isa);
    if (!is_emulated(isa) && host_has(isa)) {
      host += std::string(host.empty() ? "" : ", ") + isa_name(isa);
    }
  }
  fail("FASTDREAMER_ISA is '" + std::string(forced) + "'; this machine has " + host +
       " (the names are " + all + ")" + reason);
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512bf16:
      return "avx512bf16";
    case Isa::amx:
      return "amx";
    case Isa::amx_emulated:
      return "amx_emulated";
  }
  return "";
}

bool host_has(Isa isa) { return why_not(isa, host_facts()).empty(); }

Isa active_isa() {
  static const Isa isa = choose();  // a throw leaves it unset: the next call throws again
  return isa;
}

}  // namespace fastdreamer
