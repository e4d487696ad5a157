// The convolutions of conv-inl.h with AMX, for bfloat16.
//
// Rows of a tile of elements are the images at one pixel, sixteen at most, and lie in memory as the
// instruction loads them, 32 elements of a run a block; the weights that they meet are rows of the
// same panels. What is left of a run, fewer than 32 elements, has registers of its own shape, so
// that nothing is padded and nothing copied, and a border's pixels are merely other runs. A product
// has 1 × 4 sums (pixels × vectors of columns), 2 × 2 or 4 × 1: four that do not wait for each
// other. They go through L1 to the epilogues of conv-inl.h, each between the next products.
//
// A weight's gradient sums over pixels and images, the latter in pairs: a row of the one operand is
// a channel of the coarse image at sixteen pixels, which is transposed once, a row of the other the
// elements of the fine image at one of them, which are zipped only. Where rows of pixels are short,
// the pairs of images take the place of the pixels.
//
// The last element of an odd run would be paired with what follows it: such layers stay on AVX-512,
// and so do calls of fewer than sixteen images (Kernels::few).
#pragma once

#include "cpu/conv-inl.h"

#if FD_AMX

namespace fastdreamer {
namespace {

// --- tiles ---------------------------------------------------------------------------------------

// Sums in tmm0-3; whole blocks in tmm4 (of k in columns) and tmm6 (of k in rows), what is left of k
// in tmm5 and tmm7.
constexpr int kBlockA = 4, kRestA = 5, kBlockB = 6, kRestB = 7;
constexpr Index kTileSize = amx::kRows * Amx::block;  // elements

// The registers belong to one kernel's call. `rest` pairs of k, fewer than a block's, may be none.
class ConvTiles {
 public:
  FD_METHOD ConvTiles(Index rows, Index rest) {
    const auto shape = [&](int tile, Index height, Index pairs) {
      shapes_.rows[tile] = static_cast<std::uint8_t>(height);
      shapes_.bytes[tile] = static_cast<std::uint16_t>(4 * pairs);
    };
    shapes_.palette = 1;
    for (int tile = 0; tile < kBlockA; ++tile) shape(tile, rows, kLanes);
    shape(kBlockA, rows, amx::kRows);
    shape(kBlockB, amx::kRows, kLanes);
    if (rest != 0) {
      shape(kRestA, rows, rest);
      shape(kRestB, rest, kLanes);
    }
    amx::configure(&shapes_);
  }
  FD_METHOD ~ConvTiles() { amx::release(); }
  ConvTiles(const ConvTiles&) = delete;
  ConvTiles& operator=(const ConvTiles&) = delete;

 private:
  amx::Shapes shapes_{};
};

template <int n>
struct Number {
  static constexpr int value = n;
};
// body(Number<0>) to body(Number<N - 1>).
template <int N, int n = 0, class Body>
FD_INLINE void each(Body body) {
  if constexpr (n < N) {
    body(Number<n>{});
    each<N, n + 1>(body);
  }
}

// sum[m · N + n] += a[m] · b[n], operands loaded by load_a(m) and load_b(n) into tiles A and B.
template <int M, int N, int A, int B, class LoadA, class LoadB>
FD_INLINE void multiply_block(LoadA load_a, LoadB load_b) {
  if constexpr (M < N) {
    each<M>([&](auto m) __attribute__((always_inline)) {
      load_a(decltype(m)::value);
      each<N>([&](auto n) __attribute__((always_inline)) {
        load_b(decltype(n)::value);
        amx::multiply<decltype(m)::value * N + decltype(n)::value, A, B>();
      });
    });
  } else {
    each<N>([&](auto n) __attribute__((always_inline)) {
      load_b(decltype(n)::value);
      each<M>([&](auto m) __attribute__((always_inline)) {
        load_a(decltype(m)::value);
        amx::multiply<decltype(m)::value * N + decltype(n)::value, A, B>();
      });
    });
  }
}

// --- products ------------------------------------------------------------------------------------

// Pixels of one row that a product takes at once.
constexpr int tile_pixels(int vectors) { return vectors == 1 ? 4 : vectors == 2 ? 2 : 1; }

// What a product of runs reads; strides count elements.
struct TileRuns {
  const Bfloat16* in;
  Index images, image, pixel;  // how many; from image to image, from pixel to pixel
  const Run* runs;
  int count;
  const Bfloat16* panel;
};

// sums[p][image][v] for P pixels and V vectors.
template <int P, int V>
__attribute__((noinline)) void multiply_tile_runs(const TileRuns& x, float* sums,
                                                  Meanwhile meanwhile) {
  static_assert(P * V <= 4, "tmm0-3");
  constexpr Index step = V * kLanes * Amx::pair;
  constexpr Index row = step * Index{sizeof(Bfloat16)};
  const Index image = x.image * Index{sizeof(Bfloat16)};
  each<P * V>([](auto sum) __attribute__((always_inline)) { amx::zero<decltype(sum)::value>(); });
  for (int i = 0; i < x.count; ++i) {
    const Bfloat16 *from = x.in + x.runs[i].from, *w = x.panel + x.runs[i].step * step;
    const auto block = [&](auto a, auto b) __attribute__((always_inline)) {
      multiply_block<P, V, decltype(a)::value, decltype(b)::value>(
          [&](int p) __attribute__((always_inline)) {
            amx::load<decltype(a)::value>(from + p * x.pixel, image);
          },
          [&](int v) __attribute__((always_inline)) {
            amx::load<decltype(b)::value>(w + v * kLanes * Amx::pair, row);
          });
      meanwhile();
    };
    for (Index k = x.runs[i].length / Amx::block; k > 0; --k) {
      block(Number<kBlockA>{}, Number<kBlockB>{});
      from += Amx::block, w += amx::kRows * step;
    }
    if (x.runs[i].length % Amx::block != 0) block(Number<kRestA>{}, Number<kRestB>{});
  }
  each<P>([&](auto p) __attribute__((always_inline)) {
    each<V>([&](auto v) __attribute__((always_inline)) {
      amx::store<decltype(p)::value * V + decltype(v)::value>(
          sums + (decltype(p)::value * x.images * V + decltype(v)::value) * kLanes,
          V * kLanes * Index{sizeof(float)});
    });
  });
}

// [vectors - 1][pixels - 1]
constexpr void (*kTileRuns[4][4])(const TileRuns&, float*, Meanwhile) = {
    {multiply_tile_runs<1, 1>, multiply_tile_runs<2, 1>, multiply_tile_runs<3, 1>,
     multiply_tile_runs<4, 1>},
    {multiply_tile_runs<1, 2>, multiply_tile_runs<2, 2>},
    {multiply_tile_runs<1, 3>},
    {multiply_tile_runs<1, 4>},
};
static_assert(kConvVectors == 4, "as many as there are products for");

// Blocks of k that runs have.
FD_INLINE Index blocks_of(const Run* runs, int count) {
  Index blocks = 0;
  for (int i = 0; i < count; ++i) blocks += steps(runs[i].length, Amx::block);
  return blocks;
}

// Calls body(pixel, first image, images, sums) for rows of sums, vectors V, that are numbered by
// pixels, and within one by images.
template <class Body>
FD_INLINE void by_pixels(Index row, int R, Index images, int V, const float* sums, Body body) {
  while (R > 0) {
    const Index pixel = row / images, image = row % images;
    const int n = static_cast<int>(least(R, images - image));
    body(pixel, image, n, sums);
    row += n, R -= n, sums += n * V * kLanes;
  }
}

void conv_shrink_tiles(const ConvArgs& x) {
  const ConvWeights& w = x.weights;
  const Index run = w.kernel * w.fine, run_steps = steps(run, Amx::pair);
  if (run % Amx::pair != 0) return conv_shrink<Bf16>(x);
  Run runs[kMaxKernel];
  for (Index ky = 0; ky < w.kernel; ++ky)
    runs[ky] = {ky * x.fine_width * w.fine, ky * run_steps, run};
  const int count = static_cast<int>(w.kernel);
  const auto epilogue = [&](Index row, int R, Index column, int V,
                            const float* sums) __attribute__((always_inline)) {
    const Index end = least(column + V * kLanes, w.coarse);
    by_pixels(row, R, x.images, V, sums,
              [&](Index pixel, Index image, int n, const float* s) __attribute__((always_inline)) {
                for (Index i = image; i < image + n; ++i, s += V * kLanes) {
                  shrink_finish<Bf16>(x, i, pixel, column, end, s);
                }
              });
  };
  const ConvTiles tiles(x.images, run % Amx::block / Amx::pair);
  Parts<decltype(epilogue)> parts(epilogue);
  const Index blocks = blocks_of(runs, count);
  for (Index y = 0; y < x.coarse_height; ++y) {
    const Bfloat16* line = at<const Bfloat16>(x.in, 0) + 2 * y * x.fine_width * w.fine;
    const Bfloat16* panel = static_cast<const Bfloat16*>(x.panels);
    by_conv_panels(w.coarse, [&](Index first, int V) __attribute__((always_inline)) {
      const int most = tile_pixels(V);
      for (Index c = 0; c < x.coarse_width; c += most) {
        const int P = static_cast<int>(least(most, x.coarse_width - c));
        parts.spread(blocks);
        kTileRuns[V - 1][P - 1](
            {line + 2 * c * w.fine, x.images, x.in.stride, 2 * w.fine, runs, count, panel},
            parts.sums, parts.meanwhile());
        parts.wait((y * x.coarse_width + c) * x.images, P * static_cast<int>(x.images),
                   first * kLanes, V, 0);
      }
      panel += V * kLanes * Amx::pair * w.kernel * run_steps;
    });
  }
  parts.finish();
}

void conv_grow_tiles(const ConvArgs& x) {
  const ConvWeights& w = x.weights;
  if (w.coarse % Amx::pair != 0) return conv_grow<Bf16>(x);
  const Index tap_steps = steps(w.coarse, Amx::pair);
  // Taps side by side are one run where what is left of it is never but what is left of one tap.
  const bool whole = w.coarse % (Amx::block / 2) == 0;
  Run runs[kMaxKernel * kMaxKernel];
  const Bfloat16* panels = static_cast<const Bfloat16*>(x.panels);
  alignas(64) float ones[kLanes];
  store(ones, fill(1.0f));
  const ConvTiles tiles(x.images, w.coarse % Amx::block / Amx::pair);
  for (int g = 0; g < parity_groups(w.kernel); ++g) {
    const Parities p = parities(w.kernel, g);
    const Index N = grow_columns(p, w.fine), group_steps = grow_steps(p, w.coarse, Amx::pair);
    const Index width = (x.fine_width - p.column + 1) / 2;  // the group's pixels in a row
    const auto epilogue = [&](Index row, int R, Index column, int V,
                              const float* sums) __attribute__((always_inline)) {
      by_pixels(row, R, x.images, V, sums,
                [&](Index pixel, Index image, int n, const float* s)
                    __attribute__((always_inline)) {
                      grow_finish<Bf16>(x, p, ones, pixel / width, pixel % width, image, n,
                                        column / kLanes, V, s);
                    });
    };
    Parts<decltype(epilogue)> parts(epilogue);
    for (Index i = 0; 2 * i + p.row < x.fine_height; ++i) {
      const Bfloat16* panel = panels;
      by_conv_panels(N, [&](Index first, int V) __attribute__((always_inline)) {
        for (Index j = 0, next = 0; j < width; j = next) {
          const Taps t = taps_of(x, p, i, j);
          // those that see as many taps are side by side; with none, of a kernel of 1, all are
          const bool inside = t.n_end - t.n_begin == p.taps_x;
          const Index end = least(x.coarse_width, width);
          const int P = static_cast<int>(inside ? least(tile_pixels(V), end - j) : 1);
          next = j + P;
          const int count = grow_runs(x, p, i, j, tap_steps, whole, runs);
          parts.spread(blocks_of(runs, count));
          kTileRuns[V - 1][P - 1](
              {at<const Bfloat16>(x.in, 0), x.images, x.in.stride, w.coarse, runs, count, panel},
              parts.sums, parts.meanwhile());
          parts.wait((i * width + j) * x.images, P * static_cast<int>(x.images), first * kLanes, V,
                     0);
        }
        panel += V * kLanes * Amx::pair * group_steps;
      });
    }
    parts.finish();
    panels += vectors(N) * kLanes * Amx::pair * group_steps;
  }
}

// --- gradients of the weights --------------------------------------------------------------------

// What a gradient sums over: `outer` × `inner` lines of `length` pairs of pixels, which are blocks
// of 16 and what is left of them; all of one pair of images and row of pixels, or of one pixel.
struct Lines {
  bool of_images;  // the latter
  Index outer, inner, length;
  Index outer_step, inner_step, step;  // of the zipped fine images, in elements
  Index fine_pair;                     // from one zipped pair to the next

  FD_INLINE Lines of(const ConvArgs& x) {
    const ConvWeights& w = x.weights;
    const Index pairs = steps(x.images, Amx::pair);
    // an odd number of cache lines: the same pixel of all pairs is loaded together
    const Index count = x.fine_height * x.fine_width * w.fine;
    const Index fine_pair = (vectors(count) | 1) * kLanes * Amx::pair;
    const Index row = 2 * x.fine_width * w.fine * Amx::pair, pixel = 2 * w.fine * Amx::pair;
    if (x.coarse_width * steps(pairs, amx::kRows) < pairs * steps(x.coarse_width, amx::kRows)) {
      return {true, x.coarse_height, x.coarse_width, pairs, row, pixel, fine_pair, fine_pair};
    }
    return {false, pairs, x.coarse_height, x.coarse_width, fine_pair, row, pixel, fine_pair};
  }
  FD_METHOD Index blocks() const { return outer * inner * steps(length, amx::kRows); }
};

// sums[m][n] (+)= Σ over lines of coarse[m] · fine[n], of 16 channels and 16 elements each.
template <int M, int N>
__attribute__((noinline)) void multiply_lines(const Bfloat16* coarse, Index next,
                                              const Bfloat16* const* fine, const Lines& x,
                                              float* sums, Index stride, bool add) {
  static_assert(M * N <= 4, "tmm0-3");
  const Index row = stride * Index{sizeof(float)}, step = x.step * Index{sizeof(Bfloat16)};
  const auto each_sum = [&](auto body) __attribute__((always_inline)) {
    each<M>([&](auto m) __attribute__((always_inline)) {
      each<N>([&](auto n) __attribute__((always_inline)) {
        body(Number<decltype(m)::value * N + decltype(n)::value>{},
             sums + (decltype(m)::value * stride + decltype(n)::value) * amx::kRows);
      });
    });
  };
  each_sum([&](auto sum, float* at) __attribute__((always_inline)) {
    if (add) {
      amx::load<decltype(sum)::value>(at, row);
    } else {
      amx::zero<decltype(sum)::value>();
    }
  });
  for (Index outer = 0; outer < x.outer; ++outer) {
    for (Index inner = 0; inner < x.inner; ++inner) {
      Index from = outer * x.outer_step + inner * x.inner_step;
      const auto block = [&](auto a, auto b) __attribute__((always_inline)) {
        multiply_block<M, N, decltype(a)::value, decltype(b)::value>(
            [&](int m) __attribute__((always_inline)) {
              amx::load<decltype(a)::value>(coarse + m * next, amx::kRowBytes);
            },
            [&](int n) __attribute__((always_inline)) {
              amx::load<decltype(b)::value>(fine[n] + from, step);
            });
        coarse += kTileSize;
      };
      for (Index k = x.length / amx::kRows; k > 0; --k, from += amx::kRows * x.step) {
        block(Number<kBlockA>{}, Number<kBlockB>{});
      }
      if (x.length % amx::kRows != 0) block(Number<kRestA>{}, Number<kRestB>{});
    }
  }
  each_sum([&](auto sum, float* at)
               __attribute__((always_inline)) { amx::store<decltype(sum)::value>(at, row); });
}

// [channels / 16 - 1][elements / 16 - 1]
constexpr void (*kLineProducts[2][4])(const Bfloat16*, Index, const Bfloat16* const*, const Lines&,
                                      float*, Index, bool) = {
    {multiply_lines<1, 1>, multiply_lines<1, 2>, multiply_lines<1, 3>, multiply_lines<1, 4>},
    {multiply_lines<2, 1>, multiply_lines<2, 2>},
};

// A gradient is [coarse, kernel, kernel · fine], coarse and the last dimension whole vectors.
FD_INLINE Index gradient_vectors(const ConvWeights& w) {
  return w.kernel * vectors(w.kernel * w.fine);
}

Index conv_gradient_size_tiles(const ConvWeights& w) {
  return vectors(w.coarse) * kLanes * gradient_vectors(w) * kLanes;
}

Index conv_gradient_scratch_tiles(const ConvArgs& x) {
  const Lines lines = Lines::of(x);
  const Index fine = steps(x.images, Amx::pair) * lines.fine_pair;
  return (fine + vectors(x.weights.coarse) * lines.blocks() * kTileSize) * Index{sizeof(Bfloat16)};
}

// The coarse images' tiles, [channels / 16, blocks]: a row is a channel of a block's pairs. What is
// behind those that there are is never loaded.
FD_INLINE void transpose_lines(const ConvArgs& x, const Lines& lines, Rows coarse, Bfloat16* to) {
  const Index channels = x.weights.coarse;
  for (Index c = 0; c < channels; c += kLanes) {
    const Index n = least(kLanes, channels - c);
    for (Index outer = 0; outer < lines.outer; ++outer) {
      for (Index inner = 0; inner < lines.inner; ++inner) {
        for (Index k = 0; k < lines.length; k += amx::kRows, to += kTileSize) {
          Vec square[kLanes];
          for (Index i = 0; i < amx::kRows; ++i) {
            square[i] = fill(0.0f);
            if (k + i >= lines.length) continue;
            const Index pair = lines.of_images ? k + i : outer;
            const Index y = lines.of_images ? outer : inner;
            const Index column = lines.of_images ? inner : k + i;
            const Index place = (y * x.coarse_width + column) * channels + c;
            const Index image = pair * Amx::pair;
            Bfloat16 step[kLanes * Amx::pair];
            copy_step(
                step, at<const Bfloat16>(coarse, image) + place,
                image + 1 < x.images ? at<const Bfloat16>(coarse, image + 1) + place : nullptr, n);
            square[i] = floats(word_load(step));
          }
          transpose(square);
          for (int i = 0; i < kLanes; ++i) word_store(to + i * Amx::block, words(square[i]));
        }
      }
    }
  }
}

void conv_gradient_tiles(const ConvArgs& x, Rows fine, Rows coarse, float* gradient, bool add,
                         void* scratch) {
  const ConvWeights& w = x.weights;
  const Lines lines = Lines::of(x);
  const Index fine_count = x.fine_height * x.fine_width * w.fine;
  Bfloat16* const fines = static_cast<Bfloat16*>(scratch);
  Bfloat16* to = fines;
  for (Index i = 0; i < x.images; i += Amx::pair, to += lines.fine_pair) {
    zip<Bf16>(to, at<const Bfloat16>(fine, i),
              i + 1 < x.images ? at<const Bfloat16>(fine, i + 1) : nullptr, fine_count);
  }
  Bfloat16* const coarses = to;
  transpose_lines(x, lines, coarse, coarses);
  const ConvTiles tiles(amx::kRows, lines.length % amx::kRows);
  const Index next = lines.blocks() * kTileSize, run_vectors = vectors(w.kernel * w.fine);
  const Index all = gradient_vectors(w);
  const int most = w.coarse > kLanes ? 2 : 1;
  for (Index m = 0; m < vectors(w.coarse); m += most) {
    const int M = static_cast<int>(least(most, vectors(w.coarse) - m));
    const int most_elements = 4 / M;
    for (Index e = 0; e < all; e += most_elements) {
      const int N = static_cast<int>(least(most_elements, all - e));
      const Bfloat16* elements[4];  // of the kernel's rows, of each its vectors
      for (int n = 0; n < N; ++n) {
        const Index ky = (e + n) / run_vectors, within = (e + n) % run_vectors * kLanes;
        elements[n] = fines + (ky * x.fine_width * w.fine + within) * Amx::pair;
      }
      kLineProducts[M - 1][N - 1](coarses + m * next, next, elements, lines,
                                  gradient + (m * all * kLanes + e) * kLanes, all * kLanes, add);
    }
  }
}

void conv_sum_tiles(const ConvSumArgs& x, Index begin, Index end) {
  const ConvWeights& w = x.weights;
  const Index run = w.kernel * w.fine, padded = vectors(run) * kLanes;
  for (Index c = 0; c < w.coarse; ++c) {
    for (Index e = begin, next = 0; e < end; e = next) {  // by rows of the kernel
      const Index ky = e / run;
      next = least(end, (ky + 1) * run);
      const float* from = x.parts + (c * w.kernel + ky) * padded - ky * run;
      by_vectors(e, next, [&](Index i, auto get, auto put) __attribute__((always_inline)) {
        Vec sum = fill(0.0f);
        for (Index part = 0; part < x.count; ++part) sum = sum + get(from + part * x.stride + i);
        put(x.weight_grad + c * w.kernel * run + i, sum * fill(x.scale));
      });
    }
  }
}

}  // namespace
}  // namespace fastdreamer
#endif
