// A vector of floats as wide as the instruction set that the including file is compiled for.
// No STL, and everything has internal linkage and is inlined: a weak symbol compiled for AVX-512
// must never be the one that an older CPU runs.
#pragma once

#include <cstdint>

#include "common/view.h"

#if defined(__AVX512F__) || defined(__AVX2__)
// GCC 12 takes the header's own undefined values for ours.
#  pragma GCC diagnostic push
#  pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#  pragma GCC diagnostic ignored "-Wuninitialized"
#  include <immintrin.h>
#  pragma GCC diagnostic pop
#endif

#define FD_INLINE static inline __attribute__((always_inline))
#define FD_METHOD __attribute__((always_inline))

namespace fastdreamer {
namespace {

using Bfloat16 = std::uint16_t;  // the upper half of a float

// Per instruction set: Vec, masked accesses (the first n lanes; the rest reads 0), arithmetic,
// and Words, the bits of a Vec, for pairs of bfloat16 (the one with the lower index in the lower
// half). max(a, b) and min(a, b) return b where either is NaN.

#if defined(__AVX512F__)

constexpr int kLanes = 16;
struct Vec {
  __m512 v;
};
struct Words {
  __m512i v;
};
struct Mask {
  __mmask16 v;
};

FD_INLINE __mmask16 first(Index n) { return static_cast<__mmask16>((1u << n) - 1); }
FD_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
FD_INLINE Vec load(const float* p, Index n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
FD_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
FD_INLINE void store(float* p, Vec a, Index n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
FD_INLINE Vec fill(float x) { return {_mm512_set1_ps(x)}; }
FD_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
FD_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
FD_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
FD_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
FD_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FD_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
FD_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
FD_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, 8)}; }
FD_INLINE Vec reciprocal14(Vec a) { return {_mm512_rcp14_ps(a.v)}; }  // 2^-14 relative
FD_INLINE Mask operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
FD_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
FD_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
FD_INLINE float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

FD_INLINE Words words(Vec a) { return {_mm512_castps_si512(a.v)}; }
FD_INLINE Vec floats(Words a) { return {_mm512_castsi512_ps(a.v)}; }
FD_INLINE Words word_fill(std::uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
FD_INLINE Words word_load(const void* p) { return {_mm512_loadu_si512(p)}; }
FD_INLINE void word_store(void* p, Words a) { _mm512_storeu_si512(p, a.v); }
FD_INLINE Words operator&(Words a, Words b) { return {_mm512_and_si512(a.v, b.v)}; }
FD_INLINE Words operator|(Words a, Words b) { return {_mm512_or_si512(a.v, b.v)}; }
FD_INLINE Words operator+(Words a, Words b) { return {_mm512_add_epi32(a.v, b.v)}; }
FD_INLINE Words up16(Words a) { return {_mm512_slli_epi32(a.v, 16)}; }
FD_INLINE Words up(Words a, int bits) { return {_mm512_sll_epi32(a.v, _mm_cvtsi32_si128(bits))}; }
FD_INLINE Words down16(Words a) { return {_mm512_srli_epi32(a.v, 16)}; }
FD_INLINE Mask is_nan(Vec a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
FD_INLINE Words widen(const Bfloat16* p) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
FD_INLINE Words widen(const Bfloat16* p, Index n) {
  return {_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p))};
}
// The low halves of the words.
FD_INLINE void narrow(Bfloat16* p, Words a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}
FD_INLINE void narrow(Bfloat16* p, Words a, Index n) {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtepi32_epi16(a.v));
}
FD_INLINE Vec load(const unsigned char* p) {
  return {_mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
FD_INLINE Vec load(const unsigned char* p, Index n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
}
// Rows become columns.
FD_INLINE void transpose(Vec (&r)[16]) {
  __m512 t[16];
#  pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  __m512 q[16];  // q[4i + j]: in 128-bit lane L column 4L + j of rows 4i to 4i + 3
#  pragma GCC unroll 8
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + 2 + j]);
      q[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      q[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
#  pragma GCC unroll 8
  for (int j = 0; j < 4; ++j) {
    const __m512 even_a = _mm512_shuffle_f32x4(q[j], q[4 + j], 0x88);
    const __m512 even_b = _mm512_shuffle_f32x4(q[8 + j], q[12 + j], 0x88);
    const __m512 odd_a = _mm512_shuffle_f32x4(q[j], q[4 + j], 0xdd);
    const __m512 odd_b = _mm512_shuffle_f32x4(q[8 + j], q[12 + j], 0xdd);
    r[j].v = _mm512_shuffle_f32x4(even_a, even_b, 0x88);
    r[4 + j].v = _mm512_shuffle_f32x4(odd_a, odd_b, 0x88);
    r[8 + j].v = _mm512_shuffle_f32x4(even_a, even_b, 0xdd);
    r[12 + j].v = _mm512_shuffle_f32x4(odd_a, odd_b, 0xdd);
  }
}
// x * 2^n for integral n; overflows to inf, underflows to 0, NaN stays NaN.
FD_INLINE Vec scale(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }
// t - round(t), of anything but NaN a number in [-1/2, 1/2].
FD_INLINE Vec fraction(Vec t) { return {_mm512_reduce_ps(t.v, 8)}; }
// t where scale() can take it.
FD_INLINE Vec exponent(Vec t) { return t; }

#elif defined(__AVX2__)

constexpr int kLanes = 8;
struct Vec {
  __m256 v;
};
struct Words {
  __m256i v;
};
struct Mask {
  __m256 v;
};

FD_INLINE __m256i first(Index n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
}
FD_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
FD_INLINE Vec load(const float* p, Index n) { return {_mm256_maskload_ps(p, first(n))}; }
FD_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
FD_INLINE void store(float* p, Vec a, Index n) { _mm256_maskstore_ps(p, first(n), a.v); }
FD_INLINE Vec fill(float x) { return {_mm256_set1_ps(x)}; }
FD_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
FD_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
FD_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
FD_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
FD_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FD_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
FD_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
FD_INLINE Vec round(Vec a) { return {_mm256_round_ps(a.v, 8)}; }
FD_INLINE Vec reciprocal14(Vec a) { return {_mm256_div_ps(_mm256_set1_ps(1), a.v)}; }
FD_INLINE Mask operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
FD_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
FD_INLINE float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
FD_INLINE float largest(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

FD_INLINE Words words(Vec a) { return {_mm256_castps_si256(a.v)}; }
FD_INLINE Vec floats(Words a) { return {_mm256_castsi256_ps(a.v)}; }
FD_INLINE Words word_fill(std::uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
FD_INLINE Words word_load(const void* p) {
  return {_mm256_loadu_si256(static_cast<const __m256i*>(p))};
}
FD_INLINE void word_store(void* p, Words a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a.v); }
FD_INLINE Words operator&(Words a, Words b) { return {_mm256_and_si256(a.v, b.v)}; }
FD_INLINE Words operator|(Words a, Words b) { return {_mm256_or_si256(a.v, b.v)}; }
FD_INLINE Words operator+(Words a, Words b) { return {_mm256_add_epi32(a.v, b.v)}; }
FD_INLINE Words up16(Words a) { return {_mm256_slli_epi32(a.v, 16)}; }
FD_INLINE Words up(Words a, int bits) { return {_mm256_sll_epi32(a.v, _mm_cvtsi32_si128(bits))}; }
FD_INLINE Words down16(Words a) { return {_mm256_srli_epi32(a.v, 16)}; }
FD_INLINE Mask is_nan(Vec a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
FD_INLINE Words widen(const Bfloat16* p) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
FD_INLINE Words widen(const Bfloat16* p, Index n) {
  alignas(16) Bfloat16 all[8] = {};
  for (Index i = 0; i < n; ++i) all[i] = p[i];
  return widen(all);
}
FD_INLINE void narrow(Bfloat16* p, Words a) {
  const __m256i low = _mm256_and_si256(a.v, _mm256_set1_epi32(0xffff));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x88);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
FD_INLINE void narrow(Bfloat16* p, Words a, Index n) {
  alignas(16) Bfloat16 all[8];
  narrow(all, a);
  for (Index i = 0; i < n; ++i) p[i] = all[i];
}
FD_INLINE Vec load(const unsigned char* p) {
  return {_mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
FD_INLINE Vec load(const unsigned char* p, Index n) {
  unsigned char all[8] = {};
  for (Index i = 0; i < n; ++i) all[i] = p[i];
  return load(all);
}
FD_INLINE void transpose(Vec (&r)[8]) {
  __m256 t[8], q[8];
#  pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
#  pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m256d a = _mm256_castps_pd(t[i + j]), b = _mm256_castps_pd(t[i + 2 + j]);
      q[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      q[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
#  pragma GCC unroll 8
  for (int j = 0; j < 4; ++j) {
    r[j].v = _mm256_permute2f128_ps(q[j], q[4 + j], 0x20);
    r[4 + j].v = _mm256_permute2f128_ps(q[j], q[4 + j], 0x31);
  }
}
// In two halves, so that the ends of the range (n from -150 to 128) come out as 0 and inf.
FD_INLINE Vec scale(Vec x, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const auto power = [&](__m256i k) __attribute__((always_inline)) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k, bias), 23));
  };
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, power(half)), power(_mm256_sub_epi32(whole, half)))};
}

FD_INLINE Vec fraction(Vec t) { return t - round(t); }
FD_INLINE Vec exponent(Vec t) { return min(fill(130.0f), max(fill(-150.0f), t)); }

#else

constexpr int kLanes = 1;
struct Vec {
  float v;
};
struct Words {
  std::uint32_t v;
};
struct Mask {
  bool v;
};

FD_INLINE Vec load(const float* p) { return {*p}; }
FD_INLINE Vec load(const float* p, Index) { return {*p}; }
FD_INLINE void store(float* p, Vec a) { *p = a.v; }
FD_INLINE void store(float* p, Vec a, Index) { *p = a.v; }
FD_INLINE Vec fill(float x) { return {x}; }
FD_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
FD_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
FD_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
FD_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
// Two roundings: a fused one would be a library call where the CPU has no such instruction.
FD_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
FD_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
FD_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
FD_INLINE Vec round(Vec a) { return {__builtin_rintf(a.v)}; }
FD_INLINE Vec reciprocal14(Vec a) { return {1.0f / a.v}; }
FD_INLINE Mask operator<(Vec a, Vec b) { return {a.v < b.v}; }
FD_INLINE Vec select(Mask m, Vec a, Vec b) { return m.v ? a : b; }
FD_INLINE float sum(Vec a) { return a.v; }
FD_INLINE float largest(Vec a) { return a.v; }

FD_INLINE Words words(Vec a) {
  Words w;
  __builtin_memcpy(&w.v, &a.v, 4);
  return w;
}
FD_INLINE Vec floats(Words a) {
  Vec f;
  __builtin_memcpy(&f.v, &a.v, 4);
  return f;
}
FD_INLINE Words word_fill(std::uint32_t x) { return {x}; }
FD_INLINE Words word_load(const void* p) {
  Words w;
  __builtin_memcpy(&w.v, p, 4);
  return w;
}
FD_INLINE void word_store(void* p, Words a) { __builtin_memcpy(p, &a.v, 4); }
FD_INLINE Words operator&(Words a, Words b) { return {a.v & b.v}; }
FD_INLINE Words operator|(Words a, Words b) { return {a.v | b.v}; }
FD_INLINE Words operator+(Words a, Words b) { return {a.v + b.v}; }
FD_INLINE Words up16(Words a) { return {a.v << 16}; }
FD_INLINE Words up(Words a, int bits) { return {a.v << bits}; }
FD_INLINE Words down16(Words a) { return {a.v >> 16}; }
// Saturating, NaN to 0: a cast of what does not fit is undefined.
FD_INLINE Words to_int(Vec a) {
  if (!(a.v > -2147483648.0f)) return {a.v == a.v ? 0x80000000u : 0u};
  if (a.v >= 2147483648.0f) return {0x80000000u};
  return {static_cast<std::uint32_t>(static_cast<std::int32_t>(__builtin_rintf(a.v)))};
}
FD_INLINE Mask is_nan(Vec a) { return {a.v != a.v}; }
FD_INLINE Words widen(const Bfloat16* p) { return {*p}; }
FD_INLINE Words widen(const Bfloat16* p, Index) { return {*p}; }
FD_INLINE void narrow(Bfloat16* p, Words a) { *p = static_cast<Bfloat16>(a.v); }
FD_INLINE void narrow(Bfloat16* p, Words a, Index) { *p = static_cast<Bfloat16>(a.v); }
FD_INLINE Vec load(const unsigned char* p) { return {static_cast<float>(*p)}; }
FD_INLINE Vec load(const unsigned char* p, Index) { return load(p); }
FD_INLINE void transpose(Vec (&)[1]) {}
FD_INLINE Vec scale(Vec x, Vec n) {
  const std::int32_t whole = static_cast<std::int32_t>(to_int(n).v), half = whole >> 1;
  const auto power = [](std::int32_t k) {
    return floats(Words{static_cast<std::uint32_t>(k + 127) << 23}).v;
  };
  return {x.v * power(half) * power(whole - half)};
}
FD_INLINE Vec fraction(Vec t) { return t - round(t); }
FD_INLINE Vec exponent(Vec t) { return min(fill(130.0f), max(fill(-150.0f), t)); }

#endif

FD_INLINE Vec operator-(Vec a) { return fill(0.0f) - a; }
FD_INLINE Vec abs(Vec a) { return floats(words(a) & word_fill(0x7fffffffu)); }

// Stored elements: float as it is, bfloat16 rounded to nearest even (NaN stays NaN).
FD_INLINE Vec load(const Bfloat16* p) { return floats(up16(widen(p))); }
FD_INLINE Vec load(const Bfloat16* p, Index n) { return floats(up16(widen(p, n))); }
#if defined(__AVX512BF16__)
FD_INLINE void store(Bfloat16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
}
FD_INLINE void store(Bfloat16* p, Vec a, Index n) {
  _mm256_mask_storeu_epi16(p, first(n), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
}
FD_INLINE Words to_bfloat16(Vec a) {
  return {_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)))};
}
#else
FD_INLINE Words to_bfloat16(Vec a) {
  const Words odd = down16(words(a)) & word_fill(1);
  const Words rounded = down16(words(a) + odd + word_fill(0x7fff));
  return words(select(is_nan(a), floats(word_fill(0x7fc0)), floats(rounded)));
}
FD_INLINE void store(Bfloat16* p, Vec a) { narrow(p, to_bfloat16(a)); }
FD_INLINE void store(Bfloat16* p, Vec a, Index n) { narrow(p, to_bfloat16(a), n); }
#endif

// The largest of n >= 1 numbers; NaN among them may be passed over.
FD_INLINE float largest(const float* p, Index n) {
  if (n < kLanes) {
    float most = *p;
    for (Index i = 1; i < n; ++i) most = most > p[i] ? most : p[i];
    return most;
  }
  Vec most = load(p + n - kLanes);
  for (Index i = 0; i + kLanes < n; i += kLanes) most = max(most, load(p + i));
  return largest(most);
}

// Asks for the cache lines of [begin, end).
template <class T>
FD_INLINE void prefetch(const T* begin, const T* end) {
  constexpr Index line = 64 / sizeof(T);
  for (const T* p = begin; p < end; p += line) __builtin_prefetch(p);
  __builtin_prefetch(end - 1);
}

// Calls body(i, load, store) for i from begin to end by vectors. The last, partial one gets masked
// accessors, so that every element goes through the same arithmetic wherever a range is cut.
template <class Body>
FD_INLINE void by_vectors(Index begin, Index end, Body body) {
  Index i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    body(
        i, [](const auto* p) __attribute__((always_inline)) { return load(p); },
        [](auto* p, Vec a) __attribute__((always_inline)) { store(p, a); });
  }
  if (i < end) {
    const Index n = end - i;
    body(
        i, [n](const auto* p) __attribute__((always_inline)) { return load(p, n); },
        [n](auto* p, Vec a) __attribute__((always_inline)) { store(p, a, n); });
  }
}

// Σ body(i, load) of [0, n) by vectors; what lies behind the end counts nothing.
template <class Body>
FD_INLINE float total(Index n, Body body) {
  constexpr Index kSums = 4;  // side by side: one alone would wait for each addition
  const auto whole = [](const auto* p) __attribute__((always_inline)) { return load(p); };
  Vec sums[kSums] = {fill(0.0f), fill(0.0f), fill(0.0f), fill(0.0f)};
  Index i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes) {
    for (Index j = 0; j < kSums; ++j) sums[j] = sums[j] + body(i + j * kLanes, whole);
  }
  for (; i + kLanes <= n; i += kLanes) sums[0] = sums[0] + body(i, whole);
  if (i < n) {
    alignas(64) float line[kLanes];
    store(line,
          body(i, [n, i](const auto* p) __attribute__((always_inline)) { return load(p, n - i); }));
    sums[1] = sums[1] + load(line, n - i);
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace
}  // namespace fastdreamer
