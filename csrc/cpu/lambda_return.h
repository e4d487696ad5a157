// λ-return over [H, B], columns split over threads; the equations stand in lambda_return-inl.h.
#pragma once

#include "cpu/kernels.h"

namespace fastdreamer {

// All matrices of one call have the same shape, H >= 1, and outputs overlap nothing (the bindings
// check). `threads` >= 1 is a limit; results are equal for every number of threads. Throws only
// what choice() throws.
void lambda_return(const LambdaReturnForward& args, int threads);
void lambda_return(const LambdaReturnBackward& args, int threads);

}  // namespace fastdreamer
