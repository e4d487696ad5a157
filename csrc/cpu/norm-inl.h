// Norms of rows, and the GRU that has one over its gates.
#pragma once

#include "cpu/functions.h"
#include "cpu/gemm-inl.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace fastdreamer {
namespace {

// x̂ = (x - mean) · inverse of one row.
struct Standard {
  float mean, inverse;
};

template <class Elem>
FD_INLINE Standard standard_of(const Norm& norm, const Elem* in, Index N) {
  if (!norm) return {0.0f, 1.0f};
  const float count = static_cast<float>(N);
  float mean = 0.0f;
  if (norm.kind == NormKind::layer) {
    mean = total(N, [&](Index c, auto get) __attribute__((always_inline)) { return get(in + c); }) /
           count;
  }
  const Vec middle = fill(mean);
  const float squares = total(N, [&](Index c, auto get) __attribute__((always_inline)) {
    const Vec d = get(in + c) - middle;
    return d * d;
  });
  return {mean, 1.0f / __builtin_sqrtf(squares / count + norm.eps)};
}

template <class Load>
FD_INLINE Vec affine(const Norm& norm, Vec normed, Index c, Load get) {
  if (norm.weight != nullptr) normed = normed * get(norm.weight + c);
  if (norm.bias != nullptr) normed = normed + get(norm.bias + c);
  return normed;
}

template <class P, Activation act>
void normalise_act(const NormArgs& x) {
  using Elem = typename P::Elem;
  for (Index row = 0; row < x.rows; ++row) {
    const Elem* in = at<const Elem>(x.in, row);
    const Standard standard = standard_of(x.norm, in, x.N);
    const Vec mean = fill(standard.mean), inverse = fill(standard.inverse);
    if (x.inverse.data != nullptr) *at(x.inverse, row) = standard.inverse;
    by_vectors(0, x.N, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
      const Vec normed = (get(in + c) - mean) * inverse;
      if (x.inverse.data != nullptr) put(at<Elem>(x.normed, row) + c, normed);
      const Vec y = affine(x.norm, normed, c, get);
      if (saves_slope(act) && x.out_slope.data != nullptr) {
        put(at<Elem>(x.out_slope, row) + c, slope_of_input<act, P::fast>(y));
      }
      put(at<Elem>(x.out, row) + c, activate<act, P::fast>(y));
    });
  }
}

template <class P>
void normalise(const NormArgs& x) {
  by_activation(x.act, [&](auto chosen) __attribute__((always_inline)) {
    normalise_act<P, decltype(chosen)::act>(x);
  });
}

// dx = inverse (g - mean(g) - x̂ mean(g x̂)) with g = weight · grad; with rms without the mean of g.
template <class P>
void norm_backward(const NormBackwardArgs& x) {
  using Elem = typename P::Elem;
  const float count = static_cast<float>(x.N);
  const float* weight = x.norm.weight;
  for (Index row = 0; row < x.rows; ++row) {
    const Elem *grad = at<const Elem>(x.grad, row), *normed = at<const Elem>(x.normed, row);
    const auto scaled = [&](Index c, auto get) __attribute__((always_inline)) {
      return weight == nullptr ? get(grad + c) : get(grad + c) * get(weight + c);
    };
    Vec mean = fill(0.0f);
    if (x.norm.kind == NormKind::layer) mean = fill(total(x.N, scaled) / count);
    const float along = total(x.N, [&](Index c, auto get) __attribute__((always_inline)) {
      return scaled(c, get) * get(normed + c);
    });
    const Vec slope = fill(along / count), inverse = fill(*at(x.inverse, row));
    Elem* out = at<Elem>(x.out, row);
    by_vectors(0, x.N, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
      put(out + c, inverse * ((scaled(c, get) - mean) - slope * get(normed + c)));
    });
  }
}

// Sums over thousands of rows of either sign: kept as those of a bias are.
template <class P>
void norm_gradient(const NormGradientArgs& x) {
  using Elem = typename P::Elem;
  struct Sum {
    alignas(64) float total[kNormColumns + kLanes], carry[kNormColumns + kLanes];
  };
  Sum sums[2];
  for (Sum& sum : sums) {
    for (Index c = 0; c < x.cols; c += kLanes) {
      store(sum.total + c, fill(0.0f));
      store(sum.carry + c, fill(0.0f));
    }
  }
  Sum &weight = sums[0], &bias = sums[1];
  for (Index begin = 0; begin < x.rows; begin += kShort) {
    const Index end = least(begin + kShort, x.rows);
    by_vectors(0, x.cols, [&](Index c, auto get, auto) __attribute__((always_inline)) {
      Vec of_weight = fill(0.0f), of_bias = fill(0.0f);
      for (Index row = begin; row < end; ++row) {
        Vec grad = get(at<const Elem>(x.grad, row) + c);
        if (x.scale != nullptr) grad = grad * fill(x.scale[row]);
        of_weight = fma(grad, get(at<const Elem>(x.normed, row) + c), of_weight);
        of_bias = of_bias + grad;
      }
      add_exactly(weight.total + c, weight.carry + c, of_weight);
      add_exactly(bias.total + c, bias.carry + c, of_bias);
    });
  }
  put_exact_sums(weight.total, weight.carry, x.cols, x.weight_grad);
  put_exact_sums(bias.total, bias.carry, x.cols, x.bias_grad);
}

template <class P>
void late_gru(const LateGruArgs& x) {
  using Elem = typename P::Elem;
  const Index D = x.at.D;
  const Vec update_bias = fill(x.at.update_bias);
  for (Index row = 0; row < x.rows; ++row) {
    Elem* sums = at<Elem>(x.sums, row);
    const Standard standard = standard_of(x.norm, sums, 3 * D);
    const Vec mean = fill(standard.mean), inverse = fill(standard.inverse);
    if (x.inverse.data != nullptr) *at(x.inverse, row) = standard.inverse;
    by_vectors(0, D, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
      const auto gate = [&](Index first) __attribute__((always_inline)) {
        const Vec normed = (get(sums + first + c) - mean) * inverse;
        if (x.inverse.data != nullptr) put(sums + first + c, normed);
        return affine(x.norm, normed, first + c, get);
      };
      const Vec reset = sigmoid<P::fast>(gate(x.at.reset)), gated = gate(x.at.fresh);
      const Vec update = sigmoid<P::fast>(gate(x.at.update) + update_bias);
      const Vec fresh = tanh<P::fast>(reset * gated), before = get(at(x.h32, row) + c);
      const Vec h = fma(update, fresh - before, before);
      put(at<Elem>(x.out, row) + c, h);
      put(at(x.out32, row) + c, h);
      if (x.gates.data != nullptr) {
        Elem* gates = at<Elem>(x.gates, row) + c;
        put(gates, reset);
        put(gates + D, update);
        put(gates + 2 * D, fresh);
        put(gates + 3 * D, gated);
      }
    });
  }
}

template <class P>
void late_gru_backward(const LateGruBackwardArgs& x) {
  using Elem = typename P::Elem;
  const Index D = x.at.D;
  const Vec one = fill(1.0f);
  for (Index row = 0; row < x.rows; ++row) {
    const Elem *gates = at<const Elem>(x.gates, row), *h = at<const Elem>(x.h, row);
    Elem* out = at<Elem>(x.grad, row);
    float* dh = at(x.dh, row);
    by_vectors(0, D, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
      const Vec reset = get(gates + c), update = get(gates + D + c), fresh = get(gates + 2 * D + c),
                gated = get(gates + 3 * D + c), grad = get(dh + c);
      const Vec d_fresh = grad * update * (one - fresh * fresh);
      put(out + x.at.reset + c, d_fresh * gated * reset * (one - reset));
      put(out + x.at.fresh + c, d_fresh * reset);
      put(out + x.at.update + c, grad * (fresh - get(h + c)) * update * (one - update));
      put(dh + c, grad * (one - update));
    });
  }
}

}  // namespace
}  // namespace fastdreamer
