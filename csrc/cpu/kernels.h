// The kernels as one table of function pointers per instruction set. No STL here or below.
#pragma once

#include "common/view.h"
#include "cpu/isa.h"

namespace fastdreamer {

// Everything of one λ-return: [H, B] matrices that the caller owns for the length of the call.
// Outputs alias nothing.
struct LambdaReturnForward {
  Matrix<const float> reward, next_value, discount;
  float lam, mix;  // λ and 1 - λ, each rounded once from double
  Matrix<float> returns;
};

struct LambdaReturnBackward {
  Matrix<const float> grad, next_value, discount, returns;  // grad reaches the returns
  float lam, mix;
  Matrix<float> grad_reward, grad_next_value, grad_discount;
};

// Each works on the columns [begin, end), and a column's result does not depend on the range.
struct Kernels {
  int lanes;  // floats in a vector
  void (*lambda_return_forward)(const LambdaReturnForward& args, Index begin, Index end);
  void (*lambda_return_backward)(const LambdaReturnBackward& args, Index begin, Index end);
};

extern const Kernels scalar_kernels;
#if FD_X86
extern const Kernels avx2_kernels, avx512_kernels, avx512bf16_kernels;
#endif

// The table of the instruction set in force (see active_isa(), which may throw).
const Kernels& kernels();

}  // namespace fastdreamer
