// Matrix products of a tile of rows with packed weights, and what ends in their registers.
//
// The microkernel holds kRows × kVectors accumulators: 25 of the 32 registers of AVX-512, 12 of the
// 16 of AVX2. 5 × 5 divides 400 columns of 16 lanes and tiles of 50 rows; 6 × 4, 8 × 3 and 12 × 2
// measured no better. Weights stream from L2 panel by panel while the tile's rows stay near; each
// activation is broadcast once per panel.
//
// With AMX the sums are tiles of 16 × 16, 2 × 2 of them (1 × 4 where 16 rows or fewer are left):
// four loads for four products, which keeps the multiplier at its peak. They go through 4 KB of L1
// to the same epilogues, each between the products of the next such part.
#pragma once

#include "cpu/functions.h"
#include "cpu/kernels.h"
#include "cpu/pack-inl.h"
#include "cpu/vec.h"

namespace fastdreamer {
namespace {

// --- microkernel ---------------------------------------------------------------------------------

// Where a row's next k is: rows of a matrix have (stride, pair), an interleaved one (pair, stride).
template <class Elem>
struct Operand {
  const Elem* data;
  Index row, step;
};

// Which k of a product are multiplied.
struct Range {
  Index begin, size;  // begin: a multiple of a step, with tiles of a block
};

// sums[r][v] = Σ_k a[r, k] w[k, v] for R rows, V vectors and K of the k of the panels, whose
// vectors have `size` elements. noinline: each gets its registers.
template <class P, int R, int V>
__attribute__((noinline)) void multiply(Operand<typename P::Elem> a, Index K,
                                        const typename P::Elem* w, Index size, float* sums) {
  // panels of one vector lie one behind the other
  const Index next = P::vectors == 1 ? size : kLanes * P::pair;
  constexpr int step = (P::vectors == 1 ? 1 : V) * kLanes * P::pair;
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = fill(0.0f);
  }
  const auto one = [&](const typename P::Elem* from, auto broadcast)
                       __attribute__((always_inline)) {
                         typename P::Weight weights[V];
#pragma GCC unroll 16
                         for (int v = 0; v < V; ++v) weights[v] = P::weight(w + v * next);
#pragma GCC unroll 16
                         for (int r = 0; r < R; ++r) {
                           const typename P::Broadcast x = broadcast(from + r * a.row);
#pragma GCC unroll 16
                           for (int v = 0; v < V; ++v)
                             acc[r][v] = P::multiply_add(acc[r][v], weights[v], x);
                         }
                       };
  const typename P::Elem* from = a.data;
  for (Index k = K / P::pair; k > 0; --k, from += a.step, w += step) {
    one(from, [](const auto* p) __attribute__((always_inline)) { return P::broadcast(p); });
  }
  if (K % P::pair != 0) {
    one(from, [](const auto* p) __attribute__((always_inline)) { return P::broadcast_one(p); });
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(sums + (r * V + v) * kLanes, acc[r][v]);
  }
}

// multiply<P, R, V> with R <= rows of the kernel and V <= its vectors, known at run time.
template <class P, int R = kRows, int V = kVectors>
FD_INLINE void multiply_any(int rows, int vectors, Operand<typename P::Elem> a, Index K,
                            const typename P::Elem* w, Index size, float* sums) {
  if constexpr (V > 1) {
    if (vectors < V) return multiply_any<P, R, V - 1>(rows, vectors, a, K, w, size, sums);
  }
  if constexpr (R > 1) {
    if (rows < R) return multiply_any<P, R - 1, V>(rows, vectors, a, K, w, size, sums);
  }
  multiply<P, R, V>(a, K, w, size, sums);
}

#if FD_AMX
// The registers' rows while products of `rows` rows and more are made. Where more than 16 are no
// multiple of it, the last tile overlaps the one before: what it computes again is the same.
FD_INLINE int tile_rows(Index rows) { return static_cast<int>(least(rows, amx::kRows)); }

struct TileShapes {
  amx::Shapes of[amx::kRows];  // by tile_rows() - 1: sums in tmm0-3, rows in tmm4-5, weights in 6-7
};
constexpr TileShapes tile_shapes() {
  TileShapes shapes{};
  for (int rows = 1; rows <= amx::kRows; ++rows) {
    amx::Shapes& to = shapes.of[rows - 1];
    to.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      to.bytes[tile] = amx::kRowBytes;
      to.rows[tile] = static_cast<std::uint8_t>(tile < 6 ? rows : amx::kRows);
    }
  }
  return shapes;
}
constexpr TileShapes kTileShapes = tile_shapes();  // lasts, as LDTILECFG needs

// Rows of an operand as two tiles (or one), block by block of k: where each begins, and the last
// block, which K does not fill, with zeros behind it. What lies there in memory may be NaN.
struct TileRows {
  const Bfloat16 *first, *second;
  Index stride, blocks, rest;  // elements; whole blocks of k; k behind them
  int offset;                  // rows from the first to the second
  alignas(64) Bfloat16 last[2 * amx::kRows][Amx::block];

  // Of `count` rows, 32 at most, in tiles of `height`.
  FD_METHOD TileRows(const Bfloat16* rows, Index stride, Index K, int count, int height)
      : first(rows),
        second(rows + (count - height) * stride),
        stride(stride),
        blocks(K / Amx::block),
        rest(K % Amx::block),
        offset(count - height) {
    const __mmask32 there = (1u << rest) - 1;
    for (int r = 0; rest != 0 && r < count; ++r) {
      const Bfloat16* from = rows + r * stride + blocks * Amx::block;
      word_store(last[r], {_mm512_maskz_loadu_epi16(there, from)});
    }
  }

  // Calls body(first, second, bytes from row to row) for every block.
  template <class Body>
  FD_METHOD void by_blocks(Body body) const {
    const Bfloat16 *one = first, *other = second;
    const Index bytes = stride * Index{sizeof(Bfloat16)};
    for (Index k = blocks; k > 0; --k, one += Amx::block, other += Amx::block) {
      body(one, other, bytes);
    }
    if (rest != 0) body(last[0], last[offset], Index{amx::kRowBytes});
  }
};

// To be called after every block of k.
struct Meanwhile {
  void (*function)(void*);
  void* context;
  FD_METHOD void operator()() const { function(context); }
};

// The epilogues of parts of a product, each a few rows at a time while the next part is multiplied:
// tiles and vectors then work side by side. It ends before the sums of that part are stored.
template <class Epilogue>
struct Parts {
  Epilogue epilogue;
  alignas(64) float sums[4 * amx::kRows * kLanes];
  // the part that waits: its rows that are left, how many at a time, and their sums
  Index row = 0, column = 0;
  int rows = 0, vectors = 0, some = 0;
  const float* from = nullptr;

  explicit FD_METHOD Parts(Epilogue epilogue) : epilogue(epilogue) {}

  static void go_on(void* parts) {
    Parts& x = *static_cast<Parts*>(parts);
    const int R = x.rows < x.some ? x.rows : x.some;
    if (R == 0) return;
    x.epilogue(x.row, R, x.column, x.vectors, x.from);
    x.row += R, x.rows -= R, x.from += R * x.vectors * kLanes;
  }
  FD_METHOD Meanwhile meanwhile() { return {go_on, this}; }

  // The part that is multiplied next has so many blocks of k.
  FD_METHOD void spread(Index blocks) {
    if (blocks == 0) return finish();
    some = static_cast<int>((rows + blocks - 1) / blocks);
  }
  // The sums are now those of R rows; `again` others come before them.
  FD_METHOD void wait(Index first, int R, Index first_column, int V, int again) {
    row = first, rows = R, column = first_column, vectors = V;
    from = sums + again * V * kLanes;
  }
  FD_METHOD void finish() {
    some = rows;
    go_on(this);
  }
};

// sums[m][n] of 16 × 16, M × N of them: rows of N vectors.
template <int M, int N>
__attribute__((noinline)) void multiply_tiles(const TileRows& a, const Bfloat16* w, Index next,
                                              float* sums, Meanwhile meanwhile) {
  static_assert(M * N <= 4 && M <= 2 && (M == 1 || N <= 2), "two tiles of rows, two of weights");
  amx::zero<0>();
  if constexpr (M * N > 1) amx::zero<1>();
  if constexpr (M * N > 2) amx::zero<2>();
  if constexpr (M * N > 3) amx::zero<3>();
  a.by_blocks([&](const Bfloat16* first, const Bfloat16* second, Index stride)
                  __attribute__((always_inline)) {
                    amx::load<4>(first, stride);
                    amx::load<6>(w, amx::kRowBytes);
                    amx::multiply<0, 4, 6>();
                    if constexpr (N > 1) {
                      amx::load<7>(w + next, amx::kRowBytes);
                      amx::multiply<1, 4, 7>();
                    }
                    if constexpr (N > 2) {
                      amx::load<6>(w + 2 * next, amx::kRowBytes);
                      amx::multiply<2, 4, 6>();
                    }
                    if constexpr (N > 3) {
                      amx::load<7>(w + 3 * next, amx::kRowBytes);
                      amx::multiply<3, 4, 7>();
                    }
                    if constexpr (M > 1) {
                      amx::load<5>(second, stride);
                      amx::multiply<N, 5, 6>();
                      if constexpr (N > 1) amx::multiply<3, 5, 7>();
                    }
                    w += Amx::block * kLanes;
                    meanwhile();
                  });
  constexpr Index row = N * kLanes * Index{sizeof(float)};
  float* below = sums + a.offset * N * kLanes;
  amx::store<0>(sums, row);
  if constexpr (N > 1) amx::store<1>(sums + kLanes, row);
  if constexpr (N > 2) amx::store<2>(sums + 2 * kLanes, row);
  if constexpr (N > 3) amx::store<3>(sums + 3 * kLanes, row);
  if constexpr (M > 1) {
    amx::store<N>(below, row);
    if constexpr (N > 1) amx::store<3>(below + kLanes, row);
  }
}

// Calls body(row, R, height, again) for groups of R <= most rows: tiles of `height` rows that begin
// `again` rows before the group, which has fewer.
template <class Body>
FD_INLINE void by_tiles(Index rows, int most, Body body) {
  const int height = tile_rows(rows);
  for (Index row = 0; row < rows; row += most) {
    const int R = static_cast<int>(least(most, rows - row));
    body(row, R, height, R < height ? height - R : 0);
  }
}

// product() with tiles. Rows are the outer loop: theirs stay in L1 while the panels stream past.
template <class Epilogue, class Prologue>
FD_INLINE void tile_product(Operand<Bfloat16> a, Index rows, const Panels& w, Range k,
                            Epilogue epilogue, Prologue prologue) {
  const Index next = vector_size<Amx>(w.K), all = vectors(w.N);
  Parts<Epilogue> parts(epilogue);
  const Meanwhile meanwhile = parts.meanwhile();
  by_tiles(rows, 2 * amx::kRows,
           [&](Index row, int R, int height, int again) __attribute__((always_inline)) {
             const TileRows in(a.data + (row - again) * a.row, a.row, k.size, R + again, height);
             const bool two = R > amx::kRows;
             const int most = two ? 2 : 4;
             for (Index vector = 0; vector < all; vector += most) {
               const int V = static_cast<int>(least(most, all - vector));
               const Bfloat16* panel =
                   static_cast<const Bfloat16*>(w.data) + vector * next + k.begin * kLanes;
               prologue(row, R, vector * kLanes, V);
               parts.spread(steps(k.size, Amx::block));
               switch (two ? 4 + V : V) {
                 case 1:
                   multiply_tiles<1, 1>(in, panel, next, parts.sums, meanwhile);
                   break;
                 case 2:
                   multiply_tiles<1, 2>(in, panel, next, parts.sums, meanwhile);
                   break;
                 case 3:
                   multiply_tiles<1, 3>(in, panel, next, parts.sums, meanwhile);
                   break;
                 case 4:
                   multiply_tiles<1, 4>(in, panel, next, parts.sums, meanwhile);
                   break;
                 case 5:
                   multiply_tiles<2, 1>(in, panel, next, parts.sums, meanwhile);
                   break;
                 case 6:
                   multiply_tiles<2, 2>(in, panel, next, parts.sums, meanwhile);
                   break;
               }
               parts.wait(row, R, vector * kLanes, V, again);
             }
           });
  parts.finish();
}
#endif

// The product over a range of k, whose first `a` begins with, part by part: epilogue(row, rows,
// first column, vectors, sums), and before the part's sums are made, for prefetching, prologue(row,
// rows, first column, vectors). With tiles, `a` has rows, between enter() and leave().
template <class P, class Epilogue, class Prologue>
FD_INLINE void product(Operand<typename P::Elem> a, Index rows, const Panels& w, Range k,
                       Epilogue epilogue, Prologue prologue) {
  using Elem = typename P::Elem;
#if FD_AMX
  if constexpr (P::tiles) return tile_product(a, rows, w, k, epilogue, prologue);
#endif
  const Index size = vector_size<P>(w.K);
  alignas(64) float sums[kRows * kVectors * kLanes];
  evenly(vectors(w.N), kVectors, [&](Index first_vector, int V) __attribute__((always_inline)) {
    const Elem* panel = static_cast<const Elem*>(w.data) + first_vector * size +
                        k.begin * kLanes * (P::vectors == 1 ? 1 : V);
    evenly(rows, kRows, [&](Index row, int R) __attribute__((always_inline)) {
      prologue(row, R, first_vector * kLanes, V);
      multiply_any<P>(R, V, {a.data + row * a.row, a.row, a.step}, k.size, panel, size, sums);
      epilogue(row, R, first_vector * kLanes, V, sums);
    });
  });
}

// What no product exceeds: the microkernel itself, its operands (zeros) in L1. So the loads count,
// and where bfloat16 has no instruction of its own the widening. `iterations` steps of k.
template <class P>
double peak_of_vectors(Index iterations) {
  constexpr Index K = 64 * P::pair;
  static typename P::Elem rows[kRows * K], panel[kVectors * kLanes * K];
  const typename P::Elem *a = rows, *w = panel;
  float sums[kRows * kVectors * kLanes];
  double flop = 0;
  for (; iterations > 0; iterations -= K / P::pair) {
    asm volatile("" : "+r"(a), "+r"(w) : "r"(sums) : "memory");  // nothing is known, all is used
    multiply<P, kRows, kVectors>({a, K, P::pair}, K, w, vector_size<P>(K), sums);
    flop += 2.0 * kRows * kVectors * kLanes * K;
  }
  return flop;
}

// --- linear layers -------------------------------------------------------------------------------

template <Activation act, bool fast>
FD_INLINE Vec activate(Vec x) {
  switch (act) {
    case Activation::elu:
      return select(fill(0.0f) < x, x, expm1<fast>(x));
    case Activation::relu:
      return max(fill(0.0f), x);
    case Activation::silu:
      return x * sigmoid<fast>(x);
    case Activation::tanh:
      return tanh<fast>(x);
    case Activation::gelu:
      return gelu<fast>(x).value;
    case Activation::gelu_tanh:
      return gelu_tanh<fast>(x).value;
    case Activation::mish:
      return mish<fast>(x).value;
    default:
      return x;
  }
}

template <Activation activation>
struct Chosen {
  static constexpr Activation act = activation;
};

// body(Chosen<act>{}): what is compiled for each.
template <class Body>
FD_INLINE void by_activation(Activation act, Body body) {
  switch (act) {
    case Activation::elu:
      return body(Chosen<Activation::elu>{});
    case Activation::relu:
      return body(Chosen<Activation::relu>{});
    case Activation::silu:
      return body(Chosen<Activation::silu>{});
    case Activation::tanh:
      return body(Chosen<Activation::tanh>{});
    case Activation::gelu:
      return body(Chosen<Activation::gelu>{});
    case Activation::gelu_tanh:
      return body(Chosen<Activation::gelu_tanh>{});
    case Activation::mish:
      return body(Chosen<Activation::mish>{});
    default:
      return body(Chosen<Activation::none>{});
  }
}

// act'(x) where that is saved.
template <Activation act, bool fast>
FD_INLINE Vec slope_of_input(Vec x) {
  switch (act) {
    case Activation::silu: {  // s + x s (1 - s) with s = sigmoid(x)
      const Vec s = sigmoid<fast>(x);
      return fma(x * s, fill(1.0f) - s, s);
    }
    case Activation::gelu:
      return gelu<fast>(x).slope;
    case Activation::gelu_tanh:
      return gelu_tanh<fast>(x).slope;
    case Activation::mish:
      return mish<fast>(x).slope;
    default:
      return x;
  }
}

// act'(x) by y = act(x), or by the derivative that was saved.
template <Activation act>
FD_INLINE Vec slope_at(Vec y) {
  const Vec one = fill(1.0f), zero = fill(0.0f);
  switch (act) {
    case Activation::elu:
      return select(zero < y, one, y + one);
    case Activation::relu:
      return select(zero < y, one, zero);
    case Activation::tanh:
      return fma(zero - y, y, one);
    default:
      return saves_slope(act) ? y : one;
  }
}

// grad · act'(x). As with autograd's ReLU, nothing passes a unit that is off, NaN neither, and
// everything one that is NaN.
template <Activation act>
FD_INLINE Vec through(Vec grad, Vec y) {
  if (act == Activation::relu) return select(y < fill(__FLT_MIN__), fill(0.0f), grad);
  return grad * slope_at<act>(y);
}

// The inputs that are multiplied: without those that are one-hot, where the range begins with a
// step (with tiles, whose last block is a whole one, with a block).
template <class P>
FD_INLINE Range multiplied(const LinearArgs& x) {
  if (x.ones.at == nullptr) return {0, x.w.K};
  const Index begin = x.ones.begin == 0 ? x.ones.size : 0;
  if (begin % (P::tiles ? P::block : P::pair) != 0) return {0, x.w.K};
  return {begin, x.w.K - x.ones.size};
}

// Where row k of w begins in the V vectors of columns from the first on, and from one vector to the
// next.
template <class P>
struct Picked {
  using Elem = typename P::Elem;
  const Elem* panel;
  Index step, next;

  FD_METHOD Picked(const Panels& w, Index first_vector, int V)
      : panel(static_cast<const Elem*>(w.data) + first_vector * vector_size<P>(w.K)),
        step((P::vectors == 1 ? 1 : V) * kLanes * P::pair),
        next(P::vectors == 1 ? vector_size<P>(w.K) : kLanes * P::pair) {}
  FD_METHOD const Elem* row(Index k) const { return panel + k / P::pair * step; }
};

// sums = the rows of w that the ones of row r pick, added up.
template <class P, int V>
__attribute__((noinline)) void pick(const LinearArgs& x, Index r, const Picked<P>& from,
                                    float* sums) {
  Vec acc[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) acc[v] = fill(0.0f);
  const std::int32_t* one = x.ones.at + r * x.ones.count;
  for (Index i = 0; i < x.ones.count; ++i) {
    if (one[i] == Ones::none) continue;
    const bool undefined = one[i] == Ones::undefined;
    const Index k = x.ones.begin + (undefined ? 0 : one[i]);
    const auto* row = from.row(k);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const Vec some = step_row(row + v * from.next, k % P::pair);
      acc[v] = acc[v] + (undefined ? fill(__builtin_nanf("")) : some);
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) store(sums + v * kLanes, acc[v]);
}

template <class P, int V = kVectors>
FD_INLINE void pick_any(int vectors, const LinearArgs& x, Index r, const Picked<P>& from,
                        float* sums) {
  if constexpr (V > 1) {
    if (vectors < V) return pick_any<P, V - 1>(vectors, x, r, from, sums);
  }
  pick<P, V>(x, r, from, sums);
}

template <class P, Activation act>
void linear_act(const LinearArgs& x) {
  using Elem = typename P::Elem;
  const Range k = multiplied<P>(x);
  const bool picks = k.size < x.w.K;
  const Operand<Elem> in{static_cast<const Elem*>(x.in.data) + k.begin, x.in.stride, P::pair};
  product<P>(
      in, x.rows, x.w, k,
      [&](Index row, int R, Index column, int V, const float* sums) __attribute__((always_inline)) {
        const Index end = least(column + V * kLanes, x.w.N);
        alignas(64) float picked[kVectors * kLanes];
        for (Index r = row; r < row + R; ++r, sums += V * kLanes) {
          if (picks) pick_any<P>(V, x, r, Picked<P>(x.w, column / kLanes, V), picked);
          by_vectors(column, end, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
            Vec y = load(sums + (c - column));
            if (picks) y = y + load(picked + (c - column));
            if (x.bias != nullptr) y = y + get(x.bias + c);
            if (x.add.data != nullptr) y = y + get(at(x.add, r) + c);
            if (x.slope_of.data != nullptr) {
              y = through<act>(y, get(at<const Elem>(x.slope_of, r) + c));
            } else {
              if (saves_slope(act) && x.out_slope.data != nullptr) {
                put(at<Elem>(x.out_slope, r) + c, slope_of_input<act, P::fast>(y));
              }
              y = activate<act, P::fast>(y);
            }
            if (x.out.data != nullptr) put(at<Elem>(x.out, r) + c, y);
            if (x.out32.data != nullptr) put(at(x.out32, r) + c, y);
          });
        }
      },
      // what a forward pass has left is far by now, and so is where it goes
      [&](Index row, int R, Index column, int V) __attribute__((always_inline)) {
        const Index end = least(column + V * kLanes, x.w.N);
        const Picked<P> from(x.w, column / kLanes, V);
        for (Index r = row; r < row + R; ++r) {
          for (Index i = 0; picks && i < x.ones.count; ++i) {  // so are most rows of w
            const std::int32_t one = x.ones.at[r * x.ones.count + i];
            const Elem* w = from.row(x.ones.begin + (one < 0 ? 0 : one));
            for (int v = 0; v < V; ++v, w += from.next) __builtin_prefetch(w);
          }
          if (x.slope_of.data != nullptr) {
            const Elem* saved = at<const Elem>(x.slope_of, r);
            prefetch(saved + column, saved + end);
          }
          if (x.out.data != nullptr) {
            const Elem* out = at<const Elem>(x.out, r);
            prefetch(out + column, out + end);
          }
        }
      });
}

template <class P>
void linear(const LinearArgs& x) {
  by_activation(x.act, [&](auto chosen) __attribute__((always_inline)) {
    linear_act<P, decltype(chosen)::act>(x);
  });
}

// --- GRU -----------------------------------------------------------------------------------------

// sums[r] = reset, update, new of the input, new of the state, for one vector of units.
template <class P, int R>
__attribute__((noinline)) void multiply_gru(Operand<typename P::Elem> x, Index K,
                                            Operand<typename P::Elem> h, Index D,
                                            const typename P::Elem* w, float* sums) {
  Vec acc[R][4];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int g = 0; g < 4; ++g) acc[r][g] = fill(0.0f);
  }
  const auto one = [&](const typename P::Elem* from, Index row, auto broadcast, auto last)
                       __attribute__((always_inline)) {
                         typename P::Weight weights[3];
#pragma GCC unroll 16
                         for (int g = 0; g < 3; ++g)
                           weights[g] = P::weight(w + g * kLanes * P::pair);
                         w += 3 * kLanes * P::pair;
#pragma GCC unroll 16
                         for (int r = 0; r < R; ++r) {
                           const typename P::Broadcast a = broadcast(from + r * row);
                           acc[r][0] = P::multiply_add(acc[r][0], weights[0], a);
                           acc[r][1] = P::multiply_add(acc[r][1], weights[1], a);
                           acc[r][last] = P::multiply_add(acc[r][last], weights[2], a);
                         }
                       };
  const auto part = [&](Operand<typename P::Elem> a, Index count,
                        auto last) __attribute__((always_inline)) {
    const typename P::Elem *from = a.data, *end = w + 3 * vector_size<P>(count);
    for (Index k = count / P::pair; k > 0; --k, from += P::pair) {
      one(
          from, a.row, [](const auto* p) __attribute__((always_inline)) { return P::broadcast(p); },
          last);
    }
    if (count % P::pair != 0) {
      one(
          from, a.row,
          [](const auto* p) __attribute__((always_inline)) { return P::broadcast_one(p); }, last);
    }
    w = end;
  };
  struct Two {
    constexpr operator int() const { return 2; }
  };
  struct Three {
    constexpr operator int() const { return 3; }
  };
  part(x, K, Two{});
  part(h, D, Three{});
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int g = 0; g < 4; ++g) store(sums + (r * 4 + g) * kLanes, acc[r][g]);
  }
}

#if FD_AMX
// The same of up to 16 rows.
__attribute__((noinline)) void multiply_gru_tiles(const TileRows& x, const TileRows& h,
                                                  const Bfloat16* w, float* sums,
                                                  Meanwhile meanwhile) {
  constexpr int step = Amx::pair * kLanes;  // elements of a gate
  constexpr Index stride = 3 * step * Index{sizeof(Bfloat16)};
  amx::zero<0>();
  amx::zero<1>();
  amx::zero<2>();
  amx::zero<3>();
  const auto reset_and_update = [&](const Bfloat16* rows, Index bytes)
                                    __attribute__((always_inline)) {
                                      amx::load<4>(rows, bytes);
                                      amx::load<6>(w, stride);
                                      amx::multiply<0, 4, 6>();
                                      amx::load<7>(w + step, stride);
                                      amx::multiply<1, 4, 7>();
                                      amx::load<6>(w + 2 * step, stride);
                                      w += 3 * amx::kRows * step;
                                    };
  x.by_blocks([&](const Bfloat16* rows, const Bfloat16*, Index bytes)
                  __attribute__((always_inline)) {
                    reset_and_update(rows, bytes);
                    amx::multiply<2, 4, 6>();
                    meanwhile();
                  });
  h.by_blocks([&](const Bfloat16* rows, const Bfloat16*, Index bytes)
                  __attribute__((always_inline)) {
                    reset_and_update(rows, bytes);
                    amx::multiply<3, 4, 6>();
                    meanwhile();
                  });
  constexpr Index row = 4 * kLanes * Index{sizeof(float)};
  amx::store<0>(sums, row);
  amx::store<1>(sums + kLanes, row);
  amx::store<2>(sums + 2 * kLanes, row);
  amx::store<3>(sums + 3 * kLanes, row);
}

template <class Cell>
FD_INLINE void gru_tile_products(const GruArgs& x, Cell cell) {
  const Index D = x.w.D, K = x.w.K, per_vector = 3 * (vector_size<Amx>(K) + vector_size<Amx>(D));
  const auto epilogue = [&](Index row, int R, Index unit, int, const float* sums)
                            __attribute__((always_inline)) { cell(row, R, unit, sums); };
  Parts<decltype(epilogue)> parts(epilogue);
  by_tiles(x.rows, amx::kRows,
           [&](Index row, int R, int height, int again) __attribute__((always_inline)) {
             const TileRows in(at<const Bfloat16>(x.x, row - again), x.x.stride, K, height, height);
             const TileRows state(at<const Bfloat16>(x.h, row - again), x.h.stride, D, height,
                                  height);
             const Bfloat16* w = static_cast<const Bfloat16*>(x.w.data);
             for (Index unit = 0; unit < D; unit += kLanes, w += per_vector) {
               parts.spread(steps(K, Amx::block) + steps(D, Amx::block));
               multiply_gru_tiles(in, state, w, parts.sums, parts.meanwhile());
               parts.wait(row, R, unit, 4, again);
             }
           });
  parts.finish();
}
#endif

// The products of a GRU, part by part: cell(row, rows, unit, sums) for one vector of units.
template <class P, class Cell>
FD_INLINE void gru_products(const GruArgs& x, Cell cell) {
  using Elem = typename P::Elem;
#if FD_AMX
  if constexpr (P::tiles) return gru_tile_products(x, cell);
#endif
  const Index D = x.w.D, K = x.w.K;
  const Index per_vector = 3 * (vector_size<P>(K) + vector_size<P>(D));
  alignas(64) float sums[kGruRows * 4 * kLanes];
  for (Index unit = 0; unit < D; unit += kLanes) {
    const Elem* w = static_cast<const Elem*>(x.w.data) + unit / kLanes * per_vector;
    evenly(x.rows, kGruRows, [&](Index row, int R) __attribute__((always_inline)) {
      const Operand<Elem> in{at<const Elem>(x.x, row), x.x.stride, P::pair};
      const Operand<Elem> state{at<const Elem>(x.h, row), x.h.stride, P::pair};
      switch (R) {
        case 1:
          multiply_gru<P, 1>(in, K, state, D, w, sums);
          break;
        case 2:
          multiply_gru<P, 2>(in, K, state, D, w, sums);
          break;
        case 3:
          multiply_gru<P, 3>(in, K, state, D, w, sums);
          break;
#if defined(__AVX512F__)
        case 4:
          multiply_gru<P, 4>(in, K, state, D, w, sums);
          break;
        case 5:
          multiply_gru<P, 5>(in, K, state, D, w, sums);
          break;
        case 6:
          multiply_gru<P, 6>(in, K, state, D, w, sums);
          break;
#endif
      }
      cell(row, R, unit, sums);
    });
  }
}

template <class P>
void gru(const GruArgs& x) {
  using Elem = typename P::Elem;
  const Index D = x.w.D;
  gru_products<P>(
      x, [&](Index row, int R, Index unit, const float* s) __attribute__((always_inline)) {
        for (Index r = row; r < row + R; ++r, s += 4 * kLanes) {
          by_vectors(unit, least(unit + kLanes, D),
                     [&](Index c, auto get, auto put) __attribute__((always_inline)) {
                       const float* b = x.bias + c;
                       const Vec reset = sigmoid<P::fast>(load(s) + get(b));
                       const Vec update = sigmoid<P::fast>(load(s + kLanes) + get(b + D));
                       const Vec gated = load(s + 3 * kLanes) + get(b + 3 * D);
                       const Vec fresh =
                           tanh<P::fast>(fma(reset, gated, load(s + 2 * kLanes) + get(b + 2 * D)));
                       const Vec h = fma(update, get(at(x.h32, r) + c) - fresh, fresh);
                       put(at<Elem>(x.out, r) + c, h);
                       put(at(x.out32, r) + c, h);
                       if (x.gates.data != nullptr) {
                         Elem* gates = at<Elem>(x.gates, r) + c;
                         put(gates, reset);
                         put(gates + D, update);
                         put(gates + 2 * D, fresh);
                         put(gates + 3 * D, gated);
                       }
                     });
        }
      });
}

// --- weight gradients ----------------------------------------------------------------------------

// Rows a block: both operands of a 400 × 400 layer, interleaved, take 2 × 200 KB of L2; with tiles,
// whose CPUs have 2 MB, twice that, so that gradients are read and written half as often.
template <class P>
constexpr Index kBlock = P::tiles ? 512 : 256;
// Rows of the next block that are prefetched beside each part of a product.
constexpr Index kAhead = 2;
// Rows whose deltas are summed plainly for the bias; such sums are added with their rounding errors
// kept beside (Knuth's TwoSum): over thousands of rows of either sign they nearly cancel.
constexpr Index kShort = 16;

// total + part, without error in total and carry together.
FD_INLINE void add_exactly(float* total, float* carry, Vec part) {
  const Vec before = load(total), after = before + part, added = after - before;
  store(total, after);
  store(carry, load(carry) + ((before - (after - added)) + (part - added)));
}

// to = what they are together, [n] or null; where a sum is infinite, what it lost is NaN.
FD_INLINE void put_exact_sums(const float* total, const float* carry, Index n, float* to) {
  by_vectors(0, to == nullptr ? 0 : n, [&](Index c, auto, auto put) __attribute__((always_inline)) {
    const Vec sum = load(total + c), lost = load(carry + c);
    put(to + c, select(lost < fill(__builtin_inff()), sum + lost, sum));
  });
}

// Where the deltas of a block lie for the microkernel: it broadcasts, so step by step, all columns
// side by side. As rows of tiles they are transposed, 16 steps at a time.
template <class P>
FD_INLINE Index delta_stride() {  // of a transposed row; no power of two, for the cache's sake
  return kBlock<P> + P::block;
}
template <class P>
FD_INLINE Index deltas_size(Index out) {  // bytes
  const Index padded = vectors(out) * kLanes * Index{sizeof(typename P::Elem)};
  if (P::tiles) return padded * (delta_stride<P>() + P::block);
  return padded * steps(kBlock<P>, P::pair) * P::pair;
}

template <class P>
Index weight_gradient_scratch(Index in, Index out) {
  return panels_size<P>(kBlock<P>, in) + deltas_size<P>(out) + 128 +
         3 * vectors(out) * kLanes * Index{sizeof(float)};
}

#if FD_AMX
// `count` steps of vectors of columns, into a block of k of transposed rows: zero behind the last.
FD_INLINE void transpose_steps(const Bfloat16* steps, int count, Index padded, Bfloat16* to) {
  constexpr int step = Amx::pair * kLanes;
  for (Index c = 0; c < padded; c += kLanes, steps += step) {
    Vec square[kLanes];
    for (int k = 0; k < kLanes; ++k) {
      square[k] = k < count ? floats(word_load(steps + k * padded * Amx::pair)) : fill(0.0f);
    }
    transpose(square);
    for (int i = 0; i < kLanes; ++i) {
      word_store(to + (c + i) * delta_stride<Amx>(), words(square[i]));
    }
  }
}
#endif

template <class P>
void weight_gradient(const WeightGradientArgs& x) {
  using Elem = typename P::Elem;
  const auto aligned = [](Index size) { return (size + 63) / 64 * 64; };
  char* memory = static_cast<char*>(x.scratch);
  Elem* x_panels = reinterpret_cast<Elem*>(memory);
  memory += aligned(panels_size<P>(kBlock<P>, x.in));
  Elem* deltas = reinterpret_cast<Elem*>(memory);
  memory += aligned(deltas_size<P>(x.out));
  // the bias's gradient: of the last few rows, of those before, and what that sum has lost
  const Index padded_out = vectors(x.out) * kLanes;
  float* delta_sums = reinterpret_cast<float*>(memory);
  float *total = delta_sums + padded_out, *carry = total + padded_out;
  for (Index c = 0; c < padded_out; c += kLanes) {
    store(total + c, fill(0.0f));
    store(carry + c, fill(0.0f));
  }
  for (Index begin = 0; begin < x.rows; begin += kBlock<P>) {
    const Index rows = least(kBlock<P>, x.rows - begin);
    Index ahead = begin + rows;
    const Index next_end = least(ahead + kBlock<P>, x.rows);
    by_panels<P>(x.in, [&](Index first_vector, int V) __attribute__((always_inline)) {
      write_steps<P>(rows, x.in, first_vector, V, x_panels + first_vector * vector_size<P>(rows),
                     [&](Elem* step, Index k, bool two, Index c, Index n)
                         __attribute__((always_inline)) {
                           const Elem* row = at<const Elem>(x.x, begin + k) + c;
                           copy_step(step, row, two ? row + x.x.stride : nullptr, n);
                         });
    });
    Elem* const first = P::tiles ? deltas + padded_out * delta_stride<P>() : deltas;
    Elem* to = first;
    for (Index k = 0; k < rows; k += P::pair) {
      const bool two = P::pair == 2 && k + 1 < rows;
      const Index r = begin + k;
      const Elem* row = x.delta.data == nullptr ? nullptr : at<const Elem>(x.delta, r);
      const Vec low = fill(x.scale ? x.scale[r] : 1.0f);
      const Vec high = fill(two ? (x.scale ? x.scale[r + 1] : 1.0f) : 0.0f);
      for (Index c = 0; c < x.out; c += kLanes, to += kLanes * P::pair) {
        const Index n = least(kLanes, x.out - c);
        Vec sum;
        if (row == nullptr) {
          put_step(to, low, high);
          sum = low + high;
        } else if (x.scale == nullptr) {
          copy_step(to, row + c, two ? row + x.delta.stride + c : nullptr, n);
          sum = step_sum(to);
        } else {
          const Vec one = low * load(row + c, n);
          const Vec other = two ? high * load(row + x.delta.stride + c, n) : high;
          put_step(to, one, other);
          sum = one + other;
        }
        store(delta_sums + c, k % kShort == 0 ? sum : load(delta_sums + c) + sum);
      }
      if (k % kShort + P::pair == kShort || k + P::pair >= rows) {
        for (Index c = 0; c < x.out; c += kLanes) {
          add_exactly(total + c, carry + c, load(delta_sums + c));
        }
      }
#if FD_AMX
      if constexpr (P::tiles) {
        const Index within = k % P::block;
        if (within + P::pair == P::block || k + P::pair >= rows) {
          transpose_steps(first, static_cast<int>(within / P::pair) + 1, padded_out,
                          deltas + k - within);
          to = first;
        }
      }
#endif
    }
    // the packed rows are whole steps, the second of an odd last pair is zero; for tiles, whole
    // blocks
    Operand<Elem> delta{deltas, P::pair, padded_out * P::pair};
    Panels w{x_panels, steps(rows, P::pair) * P::pair, x.in};
    if (P::tiles) {
      delta = {deltas, delta_stride<P>(), P::pair};
      w.K = panel_steps<P>(rows) * P::pair;
    }
    product<P>(
        delta, x.out, w, {0, w.K},
        [&](Index row, int R, Index column, int V, const float* sums)
            __attribute__((always_inline)) {
              const Index end = least(column + V * kLanes, x.in);
              for (Index r = row; r < row + R; ++r, sums += V * kLanes) {
                float* out = at(x.weight_grad, r);
                by_vectors(column, end,
                           [&](Index c, auto get, auto put) __attribute__((always_inline)) {
                             Vec y = load(sums + (c - column));
                             if (begin > 0) y = y + get(out + c);
                             put(out + c, y);
                           });
              }
            },
        // the next block's rows, some a part
        [&](Index, int, Index, int) __attribute__((always_inline)) {
          for (const Index end = least(ahead + kAhead, next_end); ahead < end; ++ahead) {
            const Elem* row = at<const Elem>(x.x, ahead);
            prefetch(row, row + x.in);
            if (x.delta.data == nullptr) continue;
            const Elem* delta_row = at<const Elem>(x.delta, ahead);
            prefetch(delta_row, delta_row + x.out);
          }
        });
  }
  put_exact_sums(total, carry, x.out, x.bias_grad);
}

}  // namespace
}  // namespace fastdreamer
