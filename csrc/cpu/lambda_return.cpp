#include "cpu/lambda_return.h"

#include "cpu/parallel.h"

namespace fastdreamer {
namespace {

// Elements that are worth a thread: fewer take less time than waking it (a few µs).
constexpr Index kGrain = 8192;

}  // namespace

void lambda_return(const LambdaReturnForward& args, int threads) {
  const Kernels& k = kernels();
  parallel_for(args.returns.cols, kGrain / args.returns.rows, threads,
               [&](Index begin, Index end) { k.lambda_return_forward(args, begin, end); });
}

void lambda_return(const LambdaReturnBackward& args, int threads) {
  const Kernels& k = kernels();
  parallel_for(args.grad.cols, kGrain / args.grad.rows, threads,
               [&](Index begin, Index end) { k.lambda_return_backward(args, begin, end); });
}

}  // namespace fastdreamer
