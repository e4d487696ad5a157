#include "cpu/kernels.h"

#include "cpu/choice.h"

namespace fastdreamer {
namespace {

const Kernels* tables(Isa isa) {
  switch (isa) {
#if FD_X86
    case Isa::amx:
      return amx_kernels;
    case Isa::amx_emulated:
      return amx_emulated_kernels;
    case Isa::avx512bf16:
      return avx512bf16_kernels;
    case Isa::avx512:
      return avx512_kernels;
    case Isa::avx2:
      return avx2_kernels;
#endif
    default:
      return scalar_kernels;
  }
}

}  // namespace

const Kernels& kernels(Isa isa, Precision precision) {
  return tables(isa)[static_cast<int>(precision)];
}

const Kernels& kernels(Precision precision) {
  return kernels(choice().isa[static_cast<int>(precision)], precision);
}

}  // namespace fastdreamer
