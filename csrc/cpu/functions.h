// Elementary functions of vectors, in two precisions: for float32 results within a few units in
// the last place, for bfloat16 arithmetic cheaper ones, still far finer than its 8 bits.
// NaN comes out as NaN, and the limits at ±inf are exact (of an activation 0 · -inf, which is NaN).
// Largest errors of float32 results and of those for bfloat16 arithmetic, relative, but for tanh's
// absolute, and for the last three relative to x; the tests hold every instruction set to them:
//   exp       1.2e-7  8e-6
//   expm1     1.8e-7  4e-5
//   sigmoid   1.6e-7  6e-5
//   tanh      1e-7    1.2e-4
//   softplus  2.6e-7  8e-6
//   symexp    1.8e-7  1.8e-7
//   gelu      2e-7    6e-5
//   gelu_tanh 1.6e-7  5e-5
//   mish      1.7e-7  5e-5
#pragma once

#include "cpu/vec.h"

namespace fastdreamer {
namespace {

// e^x = 2^n (1 + q). Minimax polynomials of (e^f - 1) / f for |f| <= ln(2)/2, weighted by e^-f.
struct Exponential {
  Vec n, q;
};

template <bool fast>
FD_INLINE Exponential exponential(Vec x) {
  if (fast) {  // 3e-6 of the polynomial; the rest is the exponent's rounding where it is large
    const Vec t = exponent(x * fill(1.44269504f));
    const Vec f = fraction(t);  // 2^f - 1: the same polynomial of f ln(2)
    Vec p = fma(f, fill(0.00958285669f), fill(0.0559064274f));
    p = fma(f, p, fill(0.240240985f));
    return {t - f, f * fma(f, p, fill(0.693124193f))};
  }
  x = min(fill(89.0f), max(fill(-104.0f), x));  // e^x is inf above and 0 below
  const Vec n = round(x * fill(1.44269504f));
  // rounding (the polynomial is good for 2e-9); ln(2) in two parts
  const Vec f = fma(n, fill(2.12194440e-4f), fma(n, fill(-0.693359375f), x));
  Vec p = fma(f, fill(0.00138436579f), fill(0.0083741556f));
  p = fma(f, p, fill(0.041668002f));
  p = fma(f, p, fill(0.166664313f));
  p = fma(f, p, fill(0.499999942f));
  p = fma(f, p, fill(1.00000003f));
  return {n, f * p};
}

template <bool fast>
FD_INLINE Vec exp(Vec x) {
  const Exponential e = exponential<fast>(x);
  return scale(fill(1.0f) + e.q, e.n);
}

// e^x - 1 for x <= 0 (and 0 above), without the cancellation near 0: 2^n q + (2^n - 1).
template <bool fast>
FD_INLINE Vec expm1(Vec x) {
  const Exponential e = exponential<fast>(min(fill(0.0f), x));
  const Vec power = scale(fill(1.0f), e.n);
  return fma(power, e.q, power - fill(1.0f));
}

template <bool fast>
FD_INLINE Vec reciprocal(Vec x) {
  return fast ? reciprocal14(x) : fill(1.0f) / x;
}

template <bool fast>
FD_INLINE Vec sigmoid(Vec x) {
  return reciprocal<fast>(fill(1.0f) + exp<fast>(-x));
}

// 1 - 2 / (e^2|x| + 1) with the sign of x; near 0, where that cancels, a polynomial (Cephes tanhf).
template <bool fast>
FD_INLINE Vec tanh(Vec x) {
  if (fast) {
    return fma(fill(-2.0f), reciprocal<true>(fill(1.0f) + exp<true>(x + x)), fill(1.0f));
  }
  const Vec size = abs(x);
  const Vec far = fill(1.0f) - fill(2.0f) / (exp<false>(size + size) + fill(1.0f));
  const Vec signed_far = floats(words(far) | (words(x) & word_fill(0x80000000u)));
  const Vec z = x * x;
  Vec p = fma(z, fill(-5.70498873e-3f), fill(2.06390888e-2f));
  p = fma(z, p, fill(-5.37397155e-2f));
  p = fma(z, p, fill(1.33314422e-1f));
  p = fma(z, p, fill(-3.33332819e-1f));
  return select(size < fill(0.625f), fma(x * z, p, x), signed_far);
}

// log(1 + e^x) = max(x, 0) + log1p(u) with u = e^-|x| in [0, 1]; log1p(u) = 2 artanh(t) with
// t = u / (2 + u) <= 1/3, a series in t². The relative error holds however small the result.
template <bool fast>
FD_INLINE Vec softplus(Vec x) {
  const Vec u = exp<fast>(-abs(x));
  const Vec t = u / (u + fill(2.0f));
  const Vec z = t * t;
  Vec p = fill(1.0f / 9);
  if (!fast) {
    p = fma(z, fill(1.0f / 15), fill(1.0f / 13));
    p = fma(z, p, fill(1.0f / 11));
    p = fma(z, p, fill(1.0f / 9));
  }
  p = fma(z, p, fill(1.0f / 7));
  p = fma(z, p, fill(1.0f / 5));
  p = fma(z, p, fill(1.0f / 3));
  p = fma(z, p, fill(1.0f));
  return fma(t + t, p, max(fill(0.0f), x));
}

// sign(x) (e^|x| - 1), and its derivative e^|x|, which at 0 is 0: that of sign(x) expm1(|x|) as
// automatic differentiation has it.
struct Symexp {
  Vec value, slope;
};
FD_INLINE Symexp symexp(Vec x) {
  const Vec size = abs(x), one = fill(1.0f);
  const Exponential e = exponential<false>(size);
  const Vec power = scale(one, e.n), whole = scale(one + e.q, e.n);
  // from 2^25 on the 1 is nothing, and 2^128 would be infinite
  const Vec far = select(e.n < fill(25.0f), fma(power, e.q, power - one), whole);
  return {floats(words(far) | (words(x) & word_fill(0x80000000u))),
          select(fill(0.0f) < size, whole, size)};
}

// An activation and its derivative.
struct Active {
  Vec value, slope;
};

// x Φ(x) with Φ(-|x|) = e^(-x²/2) w P(w), w = 1 / (1 + 0.3 |x|): minimax polynomials for |x|
// <= 14.5 of Φ's absolute error (3e-9 and 3e-6) that stay good far out, relative to Φ (6e-6 and
// 3e-3).
template <bool fast>
FD_INLINE Active gelu(Vec x) {
  const Vec size = abs(x), one = fill(1.0f);
  const Vec bell = exp<fast>(fill(-0.5f) * x * x);
  const Vec w = reciprocal<fast>(fma(fill(0.3f), size, one));
  Vec p;
  if (fast) {
    p = fma(w, fill(-0.0631427392f), fill(0.372439206f));
    p = fma(w, p, fill(-0.113622338f));
    p = fma(w, p, fill(0.192673415f));
    p = fma(w, p, fill(0.111655518f));
  } else {
    p = fma(w, fill(0.0324951038f), fill(-0.141590461f));
    p = fma(w, p, fill(0.174647346f));
    p = fma(w, p, fill(-0.0193449352f));
    p = fma(w, p, fill(0.107292779f));
    p = fma(w, p, fill(0.107376672f));
    p = fma(w, p, fill(0.119396739f));
    p = fma(w, p, fill(0.119726747f));
  }
  const Vec tail = bell * w * p;
  const Vec below = select(x < fill(0.0f), tail, one - tail);
  return {x * below, fma(x * fill(0.398942280f), bell, below)};
}

// x sigmoid(y) with y = 2 sqrt(2/π) (x + 0.044715 x³), which is x (1 + tanh(y / 2)) / 2.
template <bool fast>
FD_INLINE Active gelu_tanh(Vec x) {
  const Vec linear = fill(1.59576912f), cubic = fill(0.0713548163f), z = x * x;
  const Vec s = sigmoid<fast>(x * fma(z, cubic, linear));
  const Vec slope = fma(z, fill(3.0f) * cubic, linear);
  return {x * s, fma(x * slope, s * (fill(1.0f) - s), s)};
}

// x tanh(softplus(x)): of t = 1 + e^x it is x (t² - 1) / (t² + 1), here by u = e^-|x|, which cannot
// overflow, as x n / (n + m).
template <bool fast>
FD_INLINE Active mish(Vec x) {
  const Vec u = exp<fast>(-abs(x)), one = fill(1.0f), two = fill(2.0f), twice = u + u;
  const Mask negative = x < fill(0.0f);
  const Vec n = select(negative, fma(u, u, twice), one + twice);
  const Vec m = select(negative, two, twice * u);
  const Vec inverse = reciprocal<fast>(n + m), y = n * inverse;
  const Vec rest = m * inverse * (one + y);  // 1 - y²
  const Vec s = select(negative, u, one) * reciprocal<fast>(one + u);
  return {x * y, fma(x * rest, s, y)};
}

}  // namespace
}  // namespace fastdreamer
