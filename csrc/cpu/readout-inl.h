// What an MLP's outputs mean: the number of a head, the action of a policy.
#pragma once

#include "cpu/cells-inl.h"
#include "cpu/functions.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace fastdreamer {
namespace {

// Σ p b in mirrored pairs, whose terms cancel exactly where bins b stand symmetrically about 0 and
// their probabilities are equal. Not by vectors: it is the same sum on every instruction set.
FD_INLINE float expectation(const float* p, const float* bins, Index n) {
  constexpr Index kSums = 8;  // side by side: one alone would wait for each addition
  float sums[kSums] = {};
  const auto pair = [=](Index i) __attribute__((always_inline)) {
    const Index mirror = n - 1 - i;
    return p[i] * bins[i] + p[mirror] * bins[mirror];
  };
  Index i = 0;
  for (; i + kSums <= n / 2; i += kSums) {
    for (Index j = 0; j < kSums; ++j) sums[j] += pair(i + j);
  }
  for (; i < n / 2; ++i) sums[0] += pair(i);
  if (n % 2 == 1) sums[1] += p[i] * bins[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// The sum is in full precision whatever P, as is symexp: it multiplies the error of its argument.
template <class P>
void read_out(const ReadoutArgs& x) {
  using Elem = typename P::Elem;
  const Index N = x.N;
  const float* bins = x.as.bins;
  for (Index row = 0; row < x.rows; ++row) {
    float* raw = at(x.raw, row);
    float number = *raw, slope = 1.0f;
    if (bins != nullptr) {
      const Vec inverse = fill(exponentials<P>(raw, N));
      by_vectors(0, N, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
        put(raw + c, get(raw + c) * inverse);
      });
      number = expectation(raw, bins, N);
    }
    const float inner = number;
    if (x.as.squashed) {
      const Symexp squashed = symexp(fill(inner));
      store(&number, squashed.value, 1);
      store(&slope, squashed.slope, 1);
    }
    x.out[row] = number;
    if (x.slope.data == nullptr) continue;
    Elem* out = at<Elem>(x.slope, row);
    const Vec outer = fill(slope), mean = fill(inner), zero = fill(0.0f);
    if (bins == nullptr) {
      by_vectors(0, N, [&](Index c, auto, auto put) __attribute__((always_inline)) {
        put(out + c, zero);
      });
      store(out, outer, 1);
      continue;
    }
    by_vectors(0, N, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
      put(out + c, outer * (get(raw + c) * (get(bins + c) - mean)));
    });
  }
}

template <class P>
void discount(const DiscountArgs& x) {
  const Vec gamma = fill(x.gamma), one = fill(1.0f), zero = fill(0.0f);
  by_vectors(0, x.n, [&](Index i, auto get, auto put) __attribute__((always_inline)) {
    const Vec logit = get(x.data + i);
    if (x.hard) return put(x.data + i, select(zero < logit, gamma, zero));
    const Vec s = sigmoid<P::fast>(logit);
    put(x.data + i, gamma * s);
    if (x.slope != nullptr) put(x.slope + i, gamma * s * (one - s));
  });
}

// Calls body(StdOf, whether the mean is bounded) with the right types, once a tile of rows.
template <class P, class Body>
FD_INLINE void by_policy(const StdTransform& t, float mean_scale, const Body& body) {
  const auto with = [&](const auto& std_of) {
    if (mean_scale < __builtin_inff()) return body(std_of, Bool<true>());
    return body(std_of, Bool<false>());
  };
  switch (t.kind) {
    case StdKind::softplus:
      return with(StdOf<P, StdKind::softplus>(t));
    case StdKind::sigmoid:
      return with(StdOf<P, StdKind::sigmoid>(t));
    case StdKind::exp:
      return with(StdOf<P, StdKind::exp>(t));
  }
}

// max(1, |a|); NaN passes.
FD_INLINE Vec excess(Vec a) { return max(fill(1.0f), abs(a)); }

// tanh in full precision whatever P: A columns cost little, and actions near ±1 are what a fast one
// rounds worse than autocast does.
FD_INLINE Vec squashed(Squash squash, Vec a) {
  const Vec most = fill(kClip);
  switch (squash) {
    case Squash::tanh:
      return tanh<false>(a);
    case Squash::none:
      return a;
    case Squash::bound:
      return a / excess(a);
    case Squash::clip:
      return min(most, max(-most, a));  // bounds first: NaN passes
  }
  __builtin_unreachable();
}

template <class P>
void act(const ActArgs& x) {
  const Index A = x.A;
  const Vec scale = fill(x.mean_scale), inverse = fill(1.0f / x.mean_scale);
  by_policy<P>(x.transform, x.mean_scale, [&](const auto& std_of, auto bounded) {
    for (Index row = 0; row < x.rows; ++row) {
      const float *raw = at(x.raw, row), *noise = at(x.noise, row);
      by_vectors(0, A, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
        Vec mean = get(raw + c);
        if (bounded.value) mean = scale * tanh<false>(mean * inverse);
        const Vec a = squashed(x.squash, fma(std_of(get(raw + A + c)), get(noise + c), mean));
        put(at(x.out32, row) + c, a);
        if (x.out.data == nullptr) return;
        put(at<typename P::Elem>(x.out, row) + c, x.bound ? a / excess(a) : a);
      });
    }
  });
}

template <class P>
void act_backward(const ActBackwardArgs& x) {
  const Index A = x.A;
  const Vec one = fill(1.0f), scale = fill(x.mean_scale), inverse = fill(1.0f / x.mean_scale);
  by_policy<P>(x.transform, x.mean_scale, [&](const auto& std_of, auto bounded) {
    for (Index row = 0; row < x.rows; ++row) {
      const float *raw = at(x.raw, row), *noise = at(x.noise, row), *grad = at(x.grad, row),
                  *action = at(x.action, row);
      auto* out = at<typename P::Elem>(x.raw_grad, row);
      by_vectors(0, A, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
        const Vec a = get(action + c), y = get(raw + A + c), e = get(noise + c);
        Vec mean = get(raw + c), slope = one;
        if (bounded.value) {
          const Vec t = tanh<false>(mean * inverse);
          mean = scale * t;
          slope = one - t * t;
        }
        Vec inner = get(grad + c);
        if (x.squash == Squash::tanh) inner = inner * (one - a * a);
        if (x.squash == Squash::bound) inner = inner / excess(fma(std_of(y), e, mean));
        put(out + c, bounded.value ? inner * slope : inner);
        put(out + A + c, inner * e * std_of.derivative(y));
      });
    }
  });
}

template <class P>
void bound_backward(const BoundBackwardArgs& x) {
  for (Index row = 0; row < x.rows; ++row) {
    float* grad = at(x.grad, row);
    by_vectors(0, x.A, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
      put(grad + c, get(grad + c) / excess(get(at(x.action, row) + c)));
    });
  }
}

// Multiplied, then added, as the eager body does: both plan with the same candidates.
template <class P>
void perturb(const PerturbArgs& x) {
  const Vec low = fill(-x.clip), high = fill(x.clip);
  for (Index row = 0; row < x.rows; ++row) {
    const float* noise = at(x.noise, row);
    by_vectors(0, x.A, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
      const Vec free = get(x.mean + c) + get(x.std + c) * get(noise + c);
      const Vec a = min(high, max(low, free));  // bounds first: NaN passes
      if (x.out32.data != nullptr) put(at(x.out32, row) + c, a);
      if (x.out.data == nullptr) return;
      put(at<typename P::Elem>(x.out, row) + c, x.bound ? a / excess(a) : a);
    });
  }
}

}  // namespace
}  // namespace fastdreamer
