// λ-return, forward and backward, by vectors of columns.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace fastdreamer {
namespace {

// G[t] = reward[t] + discount[t] * ((1 - λ) * next_value[t] + λ * G[t+1]), G[H] = next_value[H-1].
// Rows outer: every access streams, and the row t+1 just written is still in L1.
void lambda_return_forward(const LambdaReturnForward& x, Index begin, Index end) {
  const Index H = x.reward.rows;
  const Vec lam = fill(x.lam), mix = fill(x.mix);
  for (Index t = H - 1; t >= 0; --t) {
    const float *reward = x.reward.row(t), *value = x.next_value.row(t),
                *discount = x.discount.row(t);
    const float* following = t == H - 1 ? value : x.returns.row(t + 1);
    float* out = x.returns.row(t);
    by_vectors(begin, end, [&](Index i, auto get, auto put) __attribute__((always_inline)) {
      const Vec target = fma(lam, get(following + i), mix * get(value + i));
      put(out + i, fma(get(discount + i), target, get(reward + i)));
    });
  }
}

// With a[t] the whole gradient of G[t], a[t] = grad[t] + λ * discount[t-1] * a[t-1]:
//   grad_reward[t] = a[t]
//   grad_next_value[t] = (1 - λ) * discount[t] * a[t], and at t = H-1 the share of G[H], λ * …, too
//   grad_discount[t] = a[t] * ((1 - λ) * next_value[t] + λ * G[t+1])
void lambda_return_backward(const LambdaReturnBackward& x, Index begin, Index end) {
  const Index H = x.grad.rows;
  const Vec lam = fill(x.lam), mix = fill(x.mix);
  for (Index t = 0; t < H; ++t) {
    const bool last = t == H - 1;
    const float *grad = x.grad.row(t), *value = x.next_value.row(t), *discount = x.discount.row(t);
    const float* following = last ? value : x.returns.row(t + 1);
    const float* earlier_a = t == 0 ? nullptr : x.grad_reward.row(t - 1);
    const float* earlier_discount = t == 0 ? nullptr : x.discount.row(t - 1);
    float *out_reward = x.grad_reward.row(t), *out_value = x.grad_next_value.row(t),
          *out_discount = x.grad_discount.row(t);
    by_vectors(begin, end, [&](Index i, auto get, auto put) __attribute__((always_inline)) {
      Vec a = get(grad + i);
      if (t > 0) a = fma(lam, get(earlier_discount + i) * get(earlier_a + i), a);
      const Vec onward = get(discount + i) * a;
      put(out_reward + i, a);
      put(out_value + i, last ? fma(lam, onward, mix * onward) : mix * onward);
      put(out_discount + i, a * fma(lam, get(following + i), mix * get(value + i)));
    });
  }
}

}  // namespace
}  // namespace fastdreamer
