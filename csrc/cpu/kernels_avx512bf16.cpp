// The kernels for avx512bf16; the suffix of this file's name selects its compiler flags (setup.py).
#include "cpu/kernels-inl.h"

namespace fastdreamer {

extern const Kernels avx512bf16_kernels[2] = {table<Fp32>(), table<Bf16>()};

}  // namespace fastdreamer
