// A vector of floats as wide as the instruction set that the including file is compiled for.
// No STL, and everything has internal linkage and is inlined: a weak symbol compiled for AVX-512
// must never be the one that an older CPU runs.
#pragma once

#include "common/view.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#  include <immintrin.h>
#endif

#define FD_INLINE static inline __attribute__((always_inline))

namespace fastdreamer {
namespace {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
struct Vec {
  __m512 v;
};

FD_INLINE __mmask16 first(Index n) { return static_cast<__mmask16>((1u << n) - 1); }
FD_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
FD_INLINE Vec load(const float* p, Index n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
FD_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
FD_INLINE void store(float* p, Vec a, Index n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
FD_INLINE Vec fill(float x) { return {_mm512_set1_ps(x)}; }
FD_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
FD_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

#elif defined(__AVX2__)

constexpr int kLanes = 8;
struct Vec {
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
FD_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
FD_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

#else

constexpr int kLanes = 1;
struct Vec {
  float v;
};

FD_INLINE Vec load(const float* p) { return {*p}; }
FD_INLINE Vec load(const float* p, Index) { return {*p}; }
FD_INLINE void store(float* p, Vec a) { *p = a.v; }
FD_INLINE void store(float* p, Vec a, Index) { *p = a.v; }
FD_INLINE Vec fill(float x) { return {x}; }
FD_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
// Two roundings: a fused one would be a library call where the CPU has no such instruction.
FD_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }

#endif

// Calls body(i, load, store) for i from begin to end by vectors. The last, partial one gets masked
// accessors, so that every element goes through the same arithmetic wherever a range is cut.
template <class Body>
FD_INLINE void by_vectors(Index begin, Index end, Body body) {
  Index i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    body(
        i, [](const float* p) __attribute__((always_inline)) { return load(p); },
        [](float* p, Vec a) __attribute__((always_inline)) { store(p, a); });
  }
  if (i < end) {
    const Index n = end - i;
    body(
        i, [n](const float* p) __attribute__((always_inline)) { return load(p, n); },
        [n](float* p, Vec a) __attribute__((always_inline)) { store(p, a, n); });
  }
}

}  // namespace
}  // namespace fastdreamer
