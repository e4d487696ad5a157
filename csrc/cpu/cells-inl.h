// What happens to a tile between its matrix products, row by row.
#pragma once

#include "cpu/functions.h"
#include "cpu/gemm-inl.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace fastdreamer {
namespace {

template <bool b>
struct Bool {
  static constexpr bool value = b;
};

// h' = n + z (h - n), n = tanh(i + r g), g the gated sum of the state.
template <class P>
void gru_backward(const GruBackwardArgs& x) {
  using Elem = typename P::Elem;
  const Index D = x.D;
  const Vec one = fill(1.0f);
  for (Index row = 0; row < x.rows; ++row) {
    const Elem *gates = at<const Elem>(x.gates, row), *h = at<const Elem>(x.h, row);
    Elem* out = at<Elem>(x.gates_grad, row);
    float* dh = at(x.dh, row);
    by_vectors(0, D, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
      const Vec reset = get(gates + c), update = get(gates + D + c), fresh = get(gates + 2 * D + c),
                gated = get(gates + 3 * D + c), grad = get(dh + c);
      const Vec d_fresh = grad * (one - update) * (one - fresh * fresh);
      const Vec d_update = grad * (get(h + c) - fresh) * update * (one - update);
      put(out + c, d_fresh);
      put(out + D + c, d_fresh * gated * reset * (one - reset));
      put(out + 2 * D + c, d_update);
      put(out + 3 * D + c, d_fresh * reset);
      put(dh + c, grad * update);
    });
  }
}

// A StdTransform of vectors.
template <class P, StdKind kind>
struct StdOf {
  explicit StdOf(const StdTransform& t)
      : scale(fill(t.scale)),
        slope(fill(t.slope)),
        offset(fill(t.offset)),
        min(fill(t.min)),
        floor(fill(t.floor)),
        steepness(fill(t.scale * t.slope)),
        floored(t.floor > 0) {}

  // before the floor
  FD_METHOD Vec free(Vec y) const {
    const Vec x = fma(slope, y, offset);
    const Vec f = kind == StdKind::softplus  ? softplus<P::fast>(x)
                  : kind == StdKind::sigmoid ? sigmoid<P::fast>(x)
                                             : exp<P::fast>(x);
    return fma(scale, f, min);
  }
  FD_METHOD Vec bound(Vec std) const { return max(floor, std); }  // floor first: NaN passes
  FD_METHOD Vec operator()(Vec y) const { return bound(free(y)); }

  // d std / d y; none where the floor holds
  FD_METHOD Vec derivative(Vec y, Vec free) const {
    const Vec x = fma(slope, y, offset);
    const Vec s = kind == StdKind::exp ? exp<P::fast>(x) : sigmoid<P::fast>(x);
    const Vec d = kind == StdKind::sigmoid ? s * (fill(1.0f) - s) : s;
    return select(free < floor, fill(0.0f), steepness * d);
  }
  FD_METHOD Vec derivative(Vec y) const { return derivative(y, floored ? free(y) : floor); }

  const Vec scale, slope, offset, min, floor, steepness;
  const bool floored;
};

template <class P, StdKind kind>
void sample_kind(const SampleArgs& x) {
  const Index S = x.S;
  const StdOf<P, kind> std_of(x.latent.std);
  for (Index row = 0; row < x.rows; ++row) {
    const float* raw = at(x.raw, row);
    by_vectors(0, S, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
      const Vec mean = get(raw + c), y = get(raw + S + c);
      const Vec free = std_of.free(y), std = std_of.bound(free);
      if (x.mean.data != nullptr) put(at(x.mean, row) + c, mean);
      if (x.std.data != nullptr) put(at(x.std, row) + c, std);
      if (x.slope.data != nullptr) put(at(x.slope, row) + c, std_of.derivative(y, free));
      if (x.noise.data == nullptr) return;
      const Vec s = fma(std, get(at(x.noise, row) + c), mean);
      if (x.out.data != nullptr) put(at<typename P::Elem>(x.out, row) + c, s);
      if (x.out32.data != nullptr) put(at(x.out32, row) + c, s);
    });
  }
}

FD_INLINE void put_one(float* p) { *p = 1.0f; }
FD_INLINE void put_one(Bfloat16* p) { *p = 0x3f80; }

// Leaves e^(y - the largest), and returns what makes the softmax of it.
template <class P>
FD_INLINE float exponentials(float* y, Index n) {
  const Vec most = fill(largest(y, n));
  by_vectors(0, n, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
    put(y + c, exp<P::fast>(get(y + c) - most));
  });
  Vec total = fill(0.0f);
  by_vectors(0, n, [&](Index c, auto get, auto) __attribute__((always_inline)) {
    total = total + get(y + c);
  });
  return 1.0f / sum(total);
}

// The one of the categorical that begins at `first`, in a sample that is zeros or NaN so far.
template <class P>
FD_INLINE void put_drawn(const SampleArgs& x, Index row, Index first, Index drawn, bool undefined) {
  if (x.ones != nullptr) {
    const Index K = x.latent.classes;
    x.ones[row * (x.S / K) + first / K] = undefined ? Ones::undefined : static_cast<int>(drawn);
  }
  if (undefined) return;
  if (x.out.data != nullptr) put_one(at<typename P::Elem>(x.out, row) + drawn);
  if (x.out32.data != nullptr) put_one(at(x.out32, row) + drawn);
}

// The greatest of log p + noise is that of p e^noise, of which softmax(log p + noise) is the part
// of their sum; the largest noise is taken off, so that nothing overflows.
template <class P>
FD_INLINE void sample_gumbel(const SampleArgs& x, Index row) {
  const Index K = x.latent.classes;
  const Vec own = fill(1.0f - x.latent.unimix);
  const Vec even = fill(x.latent.unimix / static_cast<float>(K));
  float *raw = at(x.raw, row), *slope = x.slope.data == nullptr ? nullptr : at(x.slope, row);
  const float* noise = at(x.noise, row);
  for (Index first = 0; first < x.S; first += K) {
    const Index end = first + K;
    const Vec inverse = fill(exponentials<P>(raw + first, K));
    const Vec most = fill(largest(noise + first, K));
    by_vectors(first, end, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
      const Vec softmax = get(raw + c) * inverse;
      if (slope != nullptr) put(slope + x.S + c, softmax);
      put(raw + c, fma(own, softmax, even) * exp<P::fast>(get(noise + c) - most));
    });
    Vec sums = fill(0.0f);
    by_vectors(first, end, [&](Index c, auto get, auto) __attribute__((always_inline)) {
      sums = sums + get(raw + c);
    });
    const float all = sum(sums);
    const Vec part = fill(1.0f / all);
    by_vectors(first, end, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
      const Vec soft = get(raw + c) * part, none = soft - soft;  // NaN where soft is
      if (slope != nullptr) put(slope + c, soft);
      if (x.out.data != nullptr) put(at<typename P::Elem>(x.out, row) + c, none);
      if (x.out32.data != nullptr) put(at(x.out32, row) + c, none);
    });
    Index drawn = first;
    for (Index c = first + 1; c < end; ++c) drawn = raw[c] > raw[drawn] ? c : drawn;
    put_drawn<P>(x, row, first, drawn, all != all);
  }
}

// Sums of a row's probabilities are made in order, whatever the vectors' width: every instruction
// set draws the same class but for what rounding does at a border.
template <class P>
void sample_classes(const SampleArgs& x) {
  using Elem = typename P::Elem;
  const Index K = x.latent.classes;
  const float own = 1.0f - x.latent.unimix, even = x.latent.unimix / static_cast<float>(K);
  for (Index row = 0; row < x.rows; ++row) {
    float* raw = at(x.raw, row);
    if (x.mean.data != nullptr) {
      by_vectors(0, x.S, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
        put(at(x.mean, row) + c, get(raw + c));
      });
    }
    if (x.noise.data == nullptr) continue;
    if (x.latent.gumbel) {
      sample_gumbel<P>(x, row);
      continue;
    }
    const float* noise = at(x.noise, row);
    for (Index first = 0; first < x.S; first += K, ++noise) {
      const Index end = first + K;
      const Vec inverse = fill(exponentials<P>(raw + first, K));
      by_vectors(first, end, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
        const Vec p = get(raw + c) * inverse, none = p - p;  // NaN where p is
        put(raw + c, p);
        if (x.slope.data != nullptr) put(at(x.slope, row) + c, p);
        if (x.out.data != nullptr) put(at<Elem>(x.out, row) + c, none);
        if (x.out32.data != nullptr) put(at(x.out32, row) + c, none);
      });
      const bool undefined = raw[first] != raw[first];
      Index drawn = first;
      float below = 0.0f;
      for (Index c = first; c < end - 1; ++c) {  // the last one wherever rounding leaves a gap
        below += own * raw[c] + even;
        drawn += below <= *noise;
      }
      put_drawn<P>(x, row, first, drawn, undefined);
    }
  }
}

template <class P>
void sample(const SampleArgs& x) {
  if (x.latent.classes > 0) return sample_classes<P>(x);
  switch (x.latent.std.kind) {
    case StdKind::softplus:
      return sample_kind<P, StdKind::softplus>(x);
    case StdKind::sigmoid:
      return sample_kind<P, StdKind::sigmoid>(x);
    case StdKind::exp:
      return sample_kind<P, StdKind::exp>(x);
  }
}

template <class P>
void sample_classes_backward(const SampleBackwardArgs& x) {
  const Index K = x.latent.classes;
  const Vec own = fill(1.0f - x.latent.unimix), zero = fill(0.0f);
  for (Index row = 0; row < x.rows; ++row) {
    auto* out = at<typename P::Elem>(x.raw_grad, row);
    for (Index first = 0; first < x.S; first += K) {
      Vec total = zero;  // Σ p dp of the softmax
      by_vectors(first, x.grad.data == nullptr ? first : first + K,
                 [&](Index c, auto get, auto) __attribute__((always_inline)) {
                   total = fma(get(at(x.slope, row) + c), get(at(x.grad, row) + c), total);
                 });
      const Vec mean = fill(sum(total));
      by_vectors(first, first + K, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
        Vec d = zero;
        if (x.grad.data != nullptr) {
          d = own * get(at(x.slope, row) + c) * (get(at(x.grad, row) + c) - mean);
        }
        if (x.mean_grad.data != nullptr) d = d + get(at(x.mean_grad, row) + c);
        put(out + c, d);
      });
    }
  }
}

// Of soft = softmax(log p + noise): log p has the derivative r = (1 - u) softmax / p by what is
// behind the softmax's logarithm.
template <class P>
void sample_gumbel_backward(const SampleBackwardArgs& x) {
  const Index K = x.latent.classes;
  const float mixed = x.latent.unimix / static_cast<float>(K);
  const Vec own = fill(1.0f - x.latent.unimix), even = fill(mixed), zero = fill(0.0f);
  for (Index row = 0; row < x.rows; ++row) {
    auto* out = at<typename P::Elem>(x.raw_grad, row);
    const float *soft = at(x.slope, row), *softmax = soft + x.S;
    const float* grad = x.grad.data == nullptr ? nullptr : at(x.grad, row);
    for (Index first = 0; first < x.S; first += K) {
      const Index end = grad == nullptr ? first : first + K;
      Vec total = zero, along = zero;  // Σ soft grad, and Σ of what reaches log softmax
      by_vectors(first, end, [&](Index c, auto get, auto) __attribute__((always_inline)) {
        total = fma(get(soft + c), get(grad + c), total);
      });
      const Vec mean = fill(sum(total));
      const auto reaches = [&](Index c, auto get) __attribute__((always_inline)) {
        const Vec d = get(soft + c) * (get(grad + c) - mean);
        if (mixed == 0.0f) return d;
        const Vec p = own * get(softmax + c);
        return d * p / (p + even);
      };
      by_vectors(first, end, [&](Index c, auto get, auto) __attribute__((always_inline)) {
        along = along + reaches(c, get);
      });
      const Vec back = fill(sum(along));
      by_vectors(first, first + K, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
        Vec d = zero;
        if (grad != nullptr) d = reaches(c, get) - get(softmax + c) * back;
        if (x.mean_grad.data != nullptr) d = d + get(at(x.mean_grad, row) + c);
        put(out + c, d);
      });
    }
  }
}

template <class P>
void sample_backward(const SampleBackwardArgs& x) {
  if (x.latent.gumbel) return sample_gumbel_backward<P>(x);
  if (x.latent.classes > 0) return sample_classes_backward<P>(x);
  const Index S = x.S;
  for (Index row = 0; row < x.rows; ++row) {
    auto* out = at<typename P::Elem>(x.raw_grad, row);
    by_vectors(0, S, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
      Vec d_mean = fill(0.0f), d_std = fill(0.0f);
      if (x.grad.data != nullptr) {
        d_mean = get(at(x.grad, row) + c);
        d_std = d_mean * get(at(x.noise, row) + c);
      }
      if (x.mean_grad.data != nullptr) d_mean = d_mean + get(at(x.mean_grad, row) + c);
      if (x.std_grad.data != nullptr) d_std = d_std + get(at(x.std_grad, row) + c);
      put(out + c, d_mean);
      put(out + S + c, d_std * get(at(x.slope, row) + c));
    });
  }
}

template <class P>
void dot(const DotArgs& x) {
  for (Index row = 0; row < x.rows; ++row) {
    const auto* in = at<const typename P::Elem>(x.in, row);
    Vec total = fill(0.0f);
    by_vectors(0, x.K, [&](Index c, auto get, auto) __attribute__((always_inline)) {
      total = fma(get(in + c), get(x.weight + c), total);
    });
    x.out[row] = sum(total) + x.bias;
  }
}

template <class P, Activation act>
void dot_backward_act(const DotBackwardArgs& x) {
  using Elem = typename P::Elem;
  for (Index row = 0; row < x.rows; ++row) {
    by_vectors(0, x.K, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
      put(at<Elem>(x.out, row) + c,
          through<act>(get(x.weight + c), get(at<const Elem>(x.saved, row) + c)));
    });
  }
}

template <class P>
void dot_backward(const DotBackwardArgs& x) {
  by_activation(x.act, [&](auto chosen) __attribute__((always_inline)) {
    dot_backward_act<P, decltype(chosen)::act>(x);
  });
}

template <class P>
void add_scaled(const AddScaledArgs& x) {
  for (Index row = 0; row < x.rows; ++row) {
    const auto* from = at<const typename P::Elem>(x.from, row);
    const Vec scale = fill(x.scale[row]);
    float* to = at(x.to, row);
    by_vectors(0, x.cols, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
      put(to + c, fma(scale, get(from + c), get(to + c)));
    });
  }
}

template <class P>
void copy(const CopyArgs& x) {
  for (Index row = 0; row < x.rows; ++row) {
    const bool skip = x.skip != nullptr && x.skip[row] != 0, zero = skip && x.instead == nullptr;
    const float* from = skip ? x.instead : at(x.from, row);
    by_vectors(0, x.cols, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
      Vec y = zero ? fill(0.0f) : get(from + c);
      if (x.to.data != nullptr) put(at<typename P::Elem>(x.to, row) + c, y);
      if (x.to32.data != nullptr) {
        if (x.add) y = y + get(at(x.to32, row) + c);
        put(at(x.to32, row) + c, y);
      }
    });
  }
}

template <class P>
void evaluate(Function function, const float* in, float* out, Index n) {
  by_vectors(0, n, [&](Index i, auto get, auto put) __attribute__((always_inline)) {
    const Vec x = get(in + i);
    switch (function) {
      case Function::exp:
        return put(out + i, exp<P::fast>(x));
      case Function::expm1:
        return put(out + i, expm1<P::fast>(x));
      case Function::sigmoid:
        return put(out + i, sigmoid<P::fast>(x));
      case Function::tanh:
        return put(out + i, tanh<P::fast>(x));
      case Function::softplus:
        return put(out + i, softplus<P::fast>(x));
      case Function::symexp:
        return put(out + i, symexp(x).value);
      case Function::gelu:
        return put(out + i, gelu<P::fast>(x).value);
      case Function::gelu_tanh:
        return put(out + i, gelu_tanh<P::fast>(x).value);
      case Function::mish:
        return put(out + i, mish<P::fast>(x).value);
    }
  });
}

#if FD_AMX
// Four independent sums of tiles, as the products have.
double peak_of_tiles(Index iterations) {
  amx::configure(&kTileShapes.of[amx::kRows - 1]);
  for (Index k = 0; k < iterations; ++k) {
    amx::multiply<0, 4, 6>();
    amx::multiply<1, 4, 7>();
    amx::multiply<2, 5, 6>();
    amx::multiply<3, 5, 7>();
  }
  amx::release();
  return 2.0 * 4 * amx::kRows * kLanes * Amx::block * static_cast<double>(iterations);
}
#endif

}  // namespace
}  // namespace fastdreamer
