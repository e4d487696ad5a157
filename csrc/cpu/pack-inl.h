// The two precisions, and packing: from matrices of floats (or of stored elements) to the panels
// that the microkernel reads in order.
#pragma once

#include "cpu/amx.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace fastdreamer {
namespace {

// The microkernel's rows, its vectors of columns, and the rows of the GRU's.
#if defined(__AVX512F__)
constexpr int kRows = 5, kVectors = 5, kGruRows = 6;
#elif defined(__AVX2__)
constexpr int kRows = 4, kVectors = 3, kGruRows = 3;
#else
constexpr int kRows = 4, kVectors = 4, kGruRows = 3;
#endif

// --- what a precision is -------------------------------------------------------------------------

struct Fp32 {
  using Elem = float;
  using Cells = Fp32;                       // for what is no matrix product
  static constexpr bool tiles = false;      // whether products are AMX's
  static constexpr int vectors = kVectors;  // of a panel at most
  static constexpr int block = 1;           // k in a panel: a multiple of this, the rest zero
  static constexpr bool fast = false;       // which elementary functions
  static constexpr int pair = 1;            // k per step
  using Weight = Vec;
  using Broadcast = Vec;
  FD_INLINE Weight weight(const Elem* p) { return load(p); }
  FD_INLINE Broadcast broadcast(const Elem* p) { return fill(*p); }
  FD_INLINE Broadcast broadcast_one(const Elem* p) { return fill(*p); }
  FD_INLINE Vec multiply_add(Vec sum, Weight w, Broadcast a) { return fma(w, a, sum); }
};

struct Bf16 {
  using Elem = Bfloat16;
  using Cells = Bf16;
  static constexpr bool tiles = false;
  static constexpr int vectors = kVectors;
  static constexpr int block = 2;
  static constexpr bool fast = true;
  static constexpr int pair = 2;
#if defined(__AVX512BF16__)
  using Weight = Words;
  using Broadcast = Words;
  FD_INLINE Weight weight(const Elem* p) { return word_load(p); }
  FD_INLINE Broadcast broadcast_word(std::uint32_t word) { return word_fill(word); }
  FD_INLINE Vec multiply_add(Vec sum, Weight w, Broadcast a) {
    return {
        _mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(w.v), reinterpret_cast<__m512bh>(a.v))};
  }
#else
  // The same products and sums without the instruction: both halves widened to float.
  struct Weight {
    Vec low, high;
  };
  using Broadcast = Weight;
  FD_INLINE Weight split(Words w) { return {floats(up16(w)), floats(w & word_fill(0xffff0000u))}; }
  FD_INLINE Weight weight(const Elem* p) { return split(word_load(p)); }
  FD_INLINE Broadcast broadcast_word(std::uint32_t word) { return split(word_fill(word)); }
  FD_INLINE Vec multiply_add(Vec sum, const Weight& w, const Broadcast& a) {
    return fma(w.high, a.high, fma(w.low, a.low, sum));
  }
#endif
  FD_INLINE Broadcast broadcast(const Elem* p) {
    std::uint32_t word;
    __builtin_memcpy(&word, p, 4);
    return broadcast_word(word);
  }
  // The last of an odd K: what follows it in the row is not ours.
  FD_INLINE Broadcast broadcast_one(const Elem* p) { return broadcast_word(*p); }
};

#if FD_AMX
// Panels of one vector, whose pairs of k are the rows of tiles: 16 of them a block. The same panels
// serve the products of few rows, which are faster without tiles.
struct FewRows : Bf16 {
  static constexpr int vectors = 1;
  static constexpr int block = 2 * amx::kRows;
};
struct Amx : FewRows {
  static constexpr bool tiles = true;
};
#endif

template <class T>
FD_INLINE T* at(const Rows& rows, Index r) {
  return static_cast<T*>(rows.data) + r * rows.stride;
}
FD_INLINE float* at(const Floats& rows, Index r) { return rows.data + r * rows.stride; }
FD_INLINE Index steps(Index K, int pair) { return (K + pair - 1) / pair; }
// Those of a panel, which are whole blocks.
template <class P>
FD_INLINE Index panel_steps(Index K) {
  return (K + P::block - 1) / P::block * (P::block / P::pair);
}
FD_INLINE Index vectors(Index n) { return (n + kLanes - 1) / kLanes; }
FD_INLINE Index least(Index a, Index b) { return a < b ? a : b; }

// Groups of at most `most` that cover [0, n), as even as they can be: 8 rows are 4 + 4 rather than
// 5 + 3.
struct Groups {
  Index count, size, longer;  // the first `longer` groups have one more than `size`
};
FD_INLINE Groups groups_of(Index n, int most) {
  const Index count = (n + most - 1) / most, size = n / (count > 0 ? count : 1);
  return {count, size, n - size * count};
}

// Calls body(begin, members) on group i.
template <class Body>
FD_INLINE void group(const Groups& groups, Index i, Body body) {
  body(i * groups.size + least(i, groups.longer),
       static_cast<int>(groups.size + (i < groups.longer ? 1 : 0)));
}

template <class Body>
FD_INLINE void evenly(Index n, int most, Body body) {
  const Groups groups = groups_of(n, most);
  for (Index i = 0; i < groups.count; ++i) group(groups, i, body);
}

// Calls body(first vector, vectors) on one of the panels of N columns, and on all of them.
template <class P, class Body>
FD_INLINE void one_panel(Index N, Index panel, Body body) {
  group(groups_of(vectors(N), P::vectors), panel, body);
}
template <class P, class Body>
FD_INLINE void by_panels(Index N, Body body) {
  evenly(vectors(N), P::vectors, body);
}

// --- packing -------------------------------------------------------------------------------------

// Elements of one vector of a panel.
template <class P>
FD_INLINE Index vector_size(Index K) {
  return panel_steps<P>(K) * kLanes * P::pair;
}

template <class P>
Index panels_size(Index K, Index N) {
  return vectors(N) * vector_size<P>(K) * Index{sizeof(typename P::Elem)};
}

// One step of one vector: `low` is row k, `high` row k + 1 (zero behind the last).
FD_INLINE void put_step(float* to, Vec low, Vec) { store(to, low); }
FD_INLINE void put_step(Bfloat16* to, Vec low, Vec high) {
  word_store(to, to_bfloat16(low) | up16(to_bfloat16(high)));
}

// Row `odd` of the one or two rows that a step holds.
FD_INLINE Vec step_row(const float* step, Index) { return load(step); }
FD_INLINE Vec step_row(const Bfloat16* step, Index odd) {
  return floats(up(word_load(step), odd == 0 ? 16 : 0) & word_fill(0xffff0000u));
}

// Fills the last block of V vectors of K.
template <class P>
FD_INLINE void fill_block(Index K, int V, typename P::Elem* to) {
  for (Index i = steps(K, P::pair) * V; i < panel_steps<P>(K) * V; ++i) {
    put_step(to + i * kLanes * P::pair, fill(0.0f), fill(0.0f));
  }
}

// Writes the steps of V vectors of [K, N]: step(to, k, whether there is a k + 1, column, n).
template <class P, class Step>
FD_INLINE void write_steps(Index K, Index N, Index first_vector, int V, typename P::Elem* to,
                           Step step) {
  fill_block<P>(K, V, to);
  for (Index k = 0; k < K; k += P::pair) {
    for (int v = 0; v < V; ++v, to += kLanes * P::pair) {
      const Index column = (first_vector + v) * kLanes;
      step(to, k, P::pair == 2 && k + 1 < K, column, least(kLanes, N - column));
    }
  }
}

// The same from rows of floats: row(k, column, n) loads n elements.
template <class P, class Load>
FD_INLINE void pack_rows(Index K, Index N, Index first_vector, int V, typename P::Elem* to,
                         Load row) {
  write_steps<P>(K, N, first_vector, V, to,
                 [&](auto* step, Index k, bool two, Index column, Index n)
                     __attribute__((always_inline)) {
                       put_step(step, row(k, column, n), two ? row(k + 1, column, n) : fill(0.0f));
                     });
}

// A step of stored elements, as they are.
FD_INLINE void copy_step(float* to, const float* low, const float*, Index n) {
  store(to, load(low, n));
}
FD_INLINE void copy_step(Bfloat16* to, const Bfloat16* low, const Bfloat16* high, Index n) {
  const bool whole = n == kLanes;
  Words step = whole ? widen(low) : widen(low, n);
  if (high != nullptr) step = step | up16(whole ? widen(high) : widen(high, n));
  word_store(to, step);
}

// What a step holds, as the sum of its one or two rows.
FD_INLINE Vec step_sum(const float* step) { return load(step); }
FD_INLINE Vec step_sum(const Bfloat16* step) {
  const Words w = word_load(step);
  return floats(up16(w)) + floats(w & word_fill(0xffff0000u));
}

// The steps of V vectors of columns of a transposed source: row(v, i) is column i of vector v
// there, K floats in order, or null where there is none.
template <class P, class Row>
FD_INLINE void pack_transposed(Index K, int V, typename P::Elem* to, Row row) {
  constexpr Index block = kLanes < P::pair ? P::pair : kLanes;  // k at a time
  fill_block<P>(K, V, to);
  for (Index k = 0; k < K; k += block) {
    const Index n = least(block, K - k);
    for (int v = 0; v < V; ++v) {
      Vec square[block];  // of kLanes columns, then of block steps
      if constexpr (kLanes == block) {
        for (int i = 0; i < kLanes; ++i) {
          const float* from = row(v, i);
          square[i] = from == nullptr ? fill(0.0f) : load(from + k, n);
        }
        transpose(square);
      } else {
        for (Index i = 0; i < n; ++i) square[i] = load(row(v, 0) + k + i);
      }
      for (Index i = 0; i < n; i += P::pair) {
        const bool two = P::pair == 2 && i + 1 < n;
        put_step(to + ((k + i) / P::pair * V + v) * kLanes * P::pair, square[i],
                 two ? square[i + 1] : fill(0.0f));
      }
    }
  }
}

// Both below `size`.
FD_INLINE Index rotated(Index i, Index by, Index size) {
  return i + by < size ? i + by : i + by - size;
}

template <class P>
Index panel_count(Index N) {
  return groups_of(vectors(N), P::vectors).count;
}

template <class P>
void pack(const PackArgs& x, Index panel) {
  const Index K = x.to.K, N = x.to.N;
  one_panel<P>(N, panel, [&](Index first_vector, int V) __attribute__((always_inline)) {
    auto* to = static_cast<typename P::Elem*>(x.to.data) + first_vector * vector_size<P>(K);
    if (x.rotate_n == 0 && !x.transposed) {
      pack_rows<P>(K, N, first_vector, V, to,
                   [&](Index k, Index column, Index n) __attribute__((always_inline)) {
                     return load(x.source + rotated(k, x.rotate_k, K) * x.stride + column, n);
                   });
    } else if (x.rotate_n == 0 && x.rotate_k == 0) {
      pack_transposed<P>(K, V, to,
                         [&](int v, int i) __attribute__((always_inline)) -> const float* {
                           const Index column = (first_vector + v) * kLanes + i;
                           return column < N ? x.source + column * x.stride : nullptr;
                         });
    } else {  // another's column order: rare, so without care for speed
      pack_rows<P>(K, N, first_vector, V, to, [&](Index k, Index column, Index n) {
        float row[kLanes] = {};
        const Index source_k = rotated(k, x.rotate_k, K);
        for (Index i = 0; i < n; ++i) {
          const Index source_n = rotated(column + i, x.rotate_n, N);
          row[i] = x.source[x.transposed ? source_n * x.stride + source_k
                                         : source_k * x.stride + source_n];
        }
        return load(row);
      });
    }
  });
}

template <class P>
Index gru_panels_size(Index K, Index D) {
  return vectors(D) * 3 * (vector_size<P>(K) + vector_size<P>(D)) * Index{sizeof(typename P::Elem)};
}

template <class P>
Index gru_panel_count(Index D) {
  return vectors(D);
}

template <class P>
void pack_gru(const GruPackArgs& x, Index panel) {
  const Index K = x.to.K, D = x.to.D, unit = panel * kLanes, n = least(kLanes, D - unit);
  auto* to = static_cast<typename P::Elem*>(x.to.data) +
             panel * 3 * (vector_size<P>(K) + vector_size<P>(D));
  const auto part = [&](const float* weight, Index inputs) __attribute__((always_inline)) {
    pack_transposed<P>(inputs, 3, to,
                       [&](int gate, int i) __attribute__((always_inline)) -> const float* {
                         return i < n ? weight + (gate * D + unit + i) * inputs : nullptr;
                       });
    to += 3 * vector_size<P>(inputs);
  };
  part(x.weight_ih, K);
  part(x.weight_hh, D);
}

}  // namespace
}  // namespace fastdreamer
