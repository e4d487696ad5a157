// The kernels for avx512bf16; the suffix of this file's name selects its compiler flags (setup.py).
#include "cpu/kernels-inl.h"

namespace fastdreamer {

extern const Kernels avx512bf16_kernels = {kLanes, lambda_return_forward, lambda_return_backward};

}  // namespace fastdreamer
