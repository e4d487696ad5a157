#include "cpu/isa.h"

#include <string>

#include "cpu/cpuid.h"

namespace fastdreamer {

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

}  // namespace fastdreamer
