// Convolutions of stride 2 without padding, their transposes, and the gradients of their weights,
// on a tile of images.
//
// A convolution maps a fine image to a coarse one, its transpose a coarse one to a fine one; with
// the gradients the two change places, so that these kernels serve encoder and decoder, forward and
// backward. The rows of a product are the images of the tile at one and the same pixel: every row
// has the same taps inside the image, so that nothing is computed for a border, and what a tap
// reads, kernel × channels elements of an image row, lies side by side.
#pragma once

#include "cpu/gemm-inl.h"

namespace fastdreamer {
namespace {

// Vectors of columns, and rows by vectors, so that at most 20 of the 32 registers of AVX-512 are
// sums (10 of the 16 of AVX2): a tile of ten images divides evenly.
#if defined(__AVX512F__)
constexpr int kConvVectors = 4;
constexpr int conv_rows(int vectors) { return vectors <= 2 ? 10 : 5; }
#elif defined(__AVX2__)
constexpr int kConvVectors = 2;
constexpr int conv_rows(int vectors) { return vectors == 1 ? 10 : 5; }
#else
constexpr int kConvVectors = 4;
constexpr int conv_rows(int) { return 3; }
#endif

// A byte's value as the networks see it.
template <bool fast>
FD_INLINE Vec pixel_value(Vec byte) {
  return (fast ? byte * fill(1.0f / 255) : byte / fill(255.0f)) - fill(0.5f);
}

// --- products ------------------------------------------------------------------------------------

// Elements side by side that meet consecutive steps of a panel.
struct Run {
  Index from, step, length;  // offset of the elements, first step, elements
};

// sums[r][v] = Σ over runs of a[r, run] · w[run, v] for R rows and V vectors.
template <class P, int R, int V>
__attribute__((noinline)) void multiply_runs(const typename P::Elem* a, Index row, const Run* runs,
                                             int count, const typename P::Elem* panel,
                                             float* sums) {
  using Elem = typename P::Elem;
  constexpr int step = V * kLanes * P::pair;
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = fill(0.0f);
  }
  const auto one = [&](const Elem* from, const Elem* w, auto broadcast)
                       __attribute__((always_inline)) {
                         typename P::Weight weights[V];
#pragma GCC unroll 16
                         for (int v = 0; v < V; ++v)
                           weights[v] = P::weight(w + v * kLanes * P::pair);
#pragma GCC unroll 16
                         for (int r = 0; r < R; ++r) {
                           const typename P::Broadcast x = broadcast(from + r * row);
#pragma GCC unroll 16
                           for (int v = 0; v < V; ++v)
                             acc[r][v] = P::multiply_add(acc[r][v], weights[v], x);
                         }
                       };
  for (int i = 0; i < count; ++i) {
    const Elem *from = a + runs[i].from, *w = panel + runs[i].step * step;
    for (Index k = runs[i].length / P::pair; k > 0; --k, from += P::pair, w += step) {
      one(from, w, [](const auto* p) __attribute__((always_inline)) { return P::broadcast(p); });
    }
    if (runs[i].length % P::pair != 0) {
      one(from, w,
          [](const auto* p) __attribute__((always_inline)) { return P::broadcast_one(p); });
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(sums + (r * V + v) * kLanes, acc[r][v]);
  }
}

template <class P, int R, int V>
FD_INLINE void multiply_runs_of(int rows, const typename P::Elem* a, Index row, const Run* runs,
                                int count, const typename P::Elem* panel, float* sums) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_runs_of<P, R - 1, V>(rows, a, row, runs, count, panel, sums);
  }
  multiply_runs<P, R, V>(a, row, runs, count, panel, sums);
}

// All columns of `rows` rows: epilogue(row, rows, first column, vectors, sums). Panels have
// `steps` steps.
template <class P, int V = kConvVectors, class Epilogue>
FD_INLINE void multiply_panel(int vectors, const typename P::Elem* a, Index row, Index rows,
                              const Run* runs, int count, const typename P::Elem* panel,
                              Epilogue epilogue) {
  if constexpr (V > 1) {
    if (vectors < V) {
      return multiply_panel<P, V - 1>(vectors, a, row, rows, runs, count, panel, epilogue);
    }
  }
  constexpr int most = conv_rows(V);
  alignas(64) float sums[most * V * kLanes];
  evenly(rows, most, [&](Index first, int R) __attribute__((always_inline)) {
    multiply_runs_of<P, most, V>(R, a + first * row, row, runs, count, panel, sums);
    epilogue(first, R, V, sums);
  });
}

// --- what is packed ------------------------------------------------------------------------------

// Output pixels of a transposed convolution by the parity of their rows and columns: those that the
// same taps reach are columns of one product. An even kernel has one group of four parities, an odd
// one four groups.
struct Parities {
  int row, rows, column, columns;  // first parity and number of them
  Index taps_y, taps_x;            // rows of the coarse image that reach them, and columns
};

FD_INLINE int parity_groups(Index kernel) { return kernel % 2 == 0 ? 1 : 4; }
FD_INLINE Parities parities(Index kernel, int group) {
  if (kernel % 2 == 0) return {0, 2, 0, 2, kernel / 2, kernel / 2};
  const int y = group / 2, x = group % 2;
  return {y, 1, x, 1, (kernel + 1 - y) / 2, (kernel + 1 - x) / 2};
}

FD_INLINE Index grow_columns(const Parities& p, Index fine) { return p.rows * p.columns * fine; }
FD_INLINE Index grow_steps(const Parities& p, Index coarse, int pair) {
  return p.taps_y * p.taps_x * steps(coarse, pair);
}

template <class P>
Index conv_shrink_size(const ConvWeights& w) {
  return vectors(w.coarse) * kLanes * w.kernel * steps(w.kernel * w.fine, P::pair) * P::pair *
         Index{sizeof(typename P::Elem)};
}

template <class P>
Index conv_grow_size(const ConvWeights& w) {
  Index size = 0;
  for (int g = 0; g < parity_groups(w.kernel); ++g) {
    const Parities p = parities(w.kernel, g);
    size += vectors(grow_columns(p, w.fine)) * kLanes * grow_steps(p, w.coarse, P::pair) * P::pair;
  }
  return size * Index{sizeof(typename P::Elem)};
}

template <class Body>
FD_INLINE void by_conv_panels(Index N, Body body) {
  evenly(vectors(N), kConvVectors, body);
}

// Panels of the coarse channels: for every row of the kernel its kernel × fine elements in order.
template <class P>
void conv_pack_shrink(const ConvPackArgs& x) {
  using Elem = typename P::Elem;
  const ConvWeights& w = x.weights;
  const Index run = w.kernel * w.fine, run_steps = steps(run, P::pair);
  Elem* to = static_cast<Elem*>(x.to);
  by_conv_panels(w.coarse, [&](Index first, int V) __attribute__((always_inline)) {
    for (Index ky = 0; ky < w.kernel; ++ky, to += V * kLanes * P::pair * run_steps) {
      pack_transposed<P>(run, V, to,
                         [&](int v, int i) __attribute__((always_inline)) -> const float* {
                           const Index c = (first + v) * kLanes + i;
                           if (c >= w.coarse) return nullptr;
                           return x.source + (c * w.kernel + ky) * run;
                         });
    }
  });
}

// Panels of parities × fine channels: for every tap in y and, from the last to the first, in x, its
// coarse channels: so that the columns of the coarse image that a pixel takes are one run.
template <class P>
void conv_pack_grow(const ConvPackArgs& x) {
  using Elem = typename P::Elem;
  const ConvWeights& w = x.weights;
  Elem* to = static_cast<Elem*>(x.to);
  for (int g = 0; g < parity_groups(w.kernel); ++g) {
    const Parities p = parities(w.kernel, g);
    const Index N = grow_columns(p, w.fine);
    by_conv_panels(N, [&](Index first, int V) __attribute__((always_inline)) {
      for (Index m = 0; m < p.taps_y; ++m) {
        for (Index n = p.taps_x - 1; n >= 0; --n) {
          pack_rows<P>(w.coarse, N, first, V, to, [&](Index c, Index column, Index count) {
            float row[kLanes] = {};
            for (Index i = 0; i < count; ++i) {
              const Index at = column + i, parity = at / w.fine;
              const Index ky = p.row + parity / p.columns + 2 * m;
              const Index kx = p.column + parity % p.columns + 2 * n;
              row[i] = x.source[((c * w.kernel + ky) * w.kernel + kx) * w.fine + at % w.fine];
            }
            return load(row);
          });
          to += V * kLanes * P::pair * steps(w.coarse, P::pair);
        }
      }
    });
  }
}

// --- fine to coarse ------------------------------------------------------------------------------

// What becomes of the sums of a call. What every update asks for is known to the compiler: next to
// a product of a few channels, asking anew at every pixel takes a tenth of the time.
enum class Ending {
  hidden,    // relu(y + bias)
  gradient,  // y · relu'(slope_of)
  error,     // y + bias against the target, and its gradient
  any        // what the arguments say
};

template <Ending E>
FD_INLINE bool ends_with_bias(const ConvArgs& x) {
  return E == Ending::any ? x.bias != nullptr : E != Ending::gradient;
}
template <Ending E>
FD_INLINE bool ends_in_relu(const ConvArgs& x) {
  return E == Ending::any ? x.relu : E == Ending::hidden;
}
template <Ending E>
FD_INLINE bool ends_in_slope(const ConvArgs& x) {
  return E == Ending::any ? x.slope_of.data != nullptr : E == Ending::gradient;
}
template <Ending E>
FD_INLINE bool ends_in_error(const ConvArgs& x) {
  return E == Ending::any ? x.target != nullptr : E == Ending::error;
}

template <Ending E>
struct EndingIs {
  static constexpr Ending value = E;
};

// Calls body(EndingIs<how a call ends>()).
template <class Body>
FD_INLINE void by_ending(const ConvArgs& x, Body body) {
  const bool out = x.out.data != nullptr && x.out32.data == nullptr;
  const bool bias = x.bias != nullptr, slope = x.slope_of.data != nullptr;
  if (out && bias && x.relu && !slope && x.target == nullptr) {
    body(EndingIs<Ending::hidden>());
  } else if (out && !bias && !x.relu && slope && x.target == nullptr) {
    body(EndingIs<Ending::gradient>());
  } else if (out && bias && !x.relu && !slope && x.target != nullptr) {
    body(EndingIs<Ending::error>());
  } else {
    body(EndingIs<Ending::any>());
  }
}

// y = act(y), or y · act'(slope_of); where and in which formats it is wanted.
template <class P, Ending E, class Get, class Put>
FD_INLINE void conv_finish(const ConvArgs& x, Index image, Index place, Vec y, Get get, Put put) {
  using Elem = typename P::Elem;
  if (ends_in_slope<E>(x)) {
    y = through<Activation::relu>(y, get(at<const Elem>(x.slope_of, image) + place));
  } else if (ends_in_relu<E>(x)) {
    y = activate<Activation::relu, P::fast>(y);
  }
  if (E != Ending::any || x.out.data != nullptr) put(at<Elem>(x.out, image) + place, y);
  if (E == Ending::any && x.out32.data != nullptr) put(at(x.out32, image) + place, y);
}

// The sums of one image's pixel, columns from `column` to `end`.
template <class P, Ending E = Ending::any>
FD_INLINE void shrink_finish(const ConvArgs& x, Index image, Index pixel, Index column, Index end,
                             const float* sums) {
  by_vectors(column, end, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
    Vec y = load(sums + (c - column));
    if (ends_with_bias<E>(x)) y = y + get(x.bias + c);
    conv_finish<P, E>(x, image, pixel * x.weights.coarse + c, y, get, put);
  });
}

template <class P, Ending E>
FD_INLINE void shrink(const ConvArgs x) {
  using Elem = typename P::Elem;
  const ConvWeights& w = x.weights;
  const Index run = w.kernel * w.fine, run_steps = steps(run, P::pair);
  Run runs[kMaxKernel];
  for (Index ky = 0; ky < w.kernel; ++ky)
    runs[ky] = {ky * x.fine_width * w.fine, ky * run_steps, run};
  // A row of pixels as the rows of a product, where there are too few images for one.
  const bool by_pixel = x.images < 4;
  const Index rows = by_pixel ? x.coarse_width : x.images;
  const Index row = by_pixel ? 2 * w.fine : x.in.stride;
  const auto product = [&](const Elem* in, Index image,
                           Index pixel) __attribute__((always_inline)) {
    const Elem* panel = static_cast<const Elem*>(x.panels);
    by_conv_panels(w.coarse, [&](Index first, int vectors) __attribute__((always_inline)) {
      multiply_panel<P>(
          vectors, in, row, rows, runs, static_cast<int>(w.kernel), panel,
          [&](Index r, int R, int V, const float* sums) __attribute__((always_inline)) {
            const Index column = first * kLanes, end = least(column + V * kLanes, w.coarse);
            for (Index i = r; i < r + R; ++i, sums += V * kLanes) {
              shrink_finish<P, E>(x, by_pixel ? image : i, by_pixel ? pixel + i : pixel, column,
                                  end, sums);
            }
          });
      panel += vectors * kLanes * P::pair * w.kernel * run_steps;
    });
  };
  for (Index y = 0; y < x.coarse_height; ++y) {
    const Index line = 2 * y * x.fine_width * w.fine;
    if (by_pixel) {
      for (Index i = 0; i < x.images; ++i) {
        product(at<const Elem>(x.in, i) + line, i, y * x.coarse_width);
      }
    } else {
      for (Index c = 0; c < x.coarse_width; ++c) {
        product(at<const Elem>(x.in, 0) + line + 2 * c * w.fine, 0, y * x.coarse_width + c);
      }
    }
  }
}

template <class P>
void conv_shrink(const ConvArgs& x) {
  by_ending(x, [&](auto ending)
                   __attribute__((always_inline)) { shrink<P, decltype(ending)::value>(x); });
}

// --- coarse to fine ------------------------------------------------------------------------------

// The taps of a group's pixel (i, j) that lie in the coarse image, at rows i - m and columns j - n.
struct Taps {
  Index m_begin, m_end, n_begin, n_end;
};
FD_INLINE Taps taps_of(const ConvArgs& x, const Parities& p, Index i, Index j) {
  return {i < x.coarse_height ? 0 : i - x.coarse_height + 1, least(p.taps_y, i + 1),
          j < x.coarse_width ? 0 : j - x.coarse_width + 1, least(p.taps_x, j + 1)};
}

// Their runs, those of a row together or, unless `whole`, apart; returns how many.
FD_INLINE int grow_runs(const ConvArgs& x, const Parities& p, Index i, Index j, Index tap_steps,
                        bool whole, Run* runs) {
  const Index coarse = x.weights.coarse;
  const Taps t = taps_of(x, p, i, j);
  const Index taps = t.n_end - t.n_begin;
  int count = 0;
  for (Index m = t.m_begin; m < t.m_end && taps > 0; ++m) {
    const Index from = ((i - m) * x.coarse_width + j - t.n_end + 1) * coarse;
    const Index step = (m * p.taps_x + p.taps_x - t.n_end) * tap_steps;
    if (whole) {
      runs[count++] = {from, step, taps * coarse};
    } else {
      for (Index n = 0; n < taps; ++n) {
        runs[count++] = {from + n * coarse, step + n * tap_steps, coarse};
      }
    }
  }
  return count;
}

// Sums of images [r, r + R) at a group's pixel (i, j), V vectors from `first`; `ones` is what it
// says.
template <class P, Ending E = Ending::any>
FD_INLINE void grow_finish(const ConvArgs& x, const Parities& p, const float* ones, Index i,
                           Index j, Index r, int R, Index first, int V, const float* sums) {
  const ConvWeights& w = x.weights;
  const Index side = p.columns * w.fine;  // elements side by side in an image row
  const Index columns = least(p.columns, x.fine_width - 2 * j - p.column) * w.fine;
  const Index begin = first * kLanes, end = least(begin + V * kLanes, grow_columns(p, w.fine));
  for (int a = 0; a < p.rows && 2 * i + p.row + a < x.fine_height; ++a) {
    const Index from = begin > a * side ? begin : a * side;
    const Index to = least(end, a * side + columns);
    const Index pixel = (2 * i + p.row + a) * x.fine_width + 2 * j + p.column;
    const Index place = pixel * w.fine - a * side;
    for (Index image = r; image < r + R; ++image) {
      const float* s = sums + (image - r) * V * kLanes - begin;
      by_vectors(from, to, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
        Vec y = get(s + c);
        if (ends_with_bias<E>(x)) y = y + get(x.bias + c);
        if (ends_in_error<E>(x)) {
          // mean - target, what of it is squared, and its gradient
          const unsigned char* t = x.target + image * x.target_stride + place + c;
          y = (y - pixel_value<P::fast>(get(t))) * get(ones);
          float* error = x.error + image * kErrorSums + i * kLanes % kErrorSums;
          store(error, fma(y, y, load(error)));
          y = y + y;
        }
        conv_finish<P, E>(x, image, place + c, y, get, put);
      });
    }
  }
}

template <class P, Ending E>
FD_INLINE void grow(const ConvArgs x) {
  using Elem = typename P::Elem;
  const ConvWeights& w = x.weights;
  const Index tap_steps = steps(w.coarse, P::pair);
  const bool whole = w.coarse % P::pair == 0;  // taps side by side are one run
  Run runs[kMaxKernel * kMaxKernel];
  const Elem* panels = static_cast<const Elem*>(x.panels);
  alignas(64) float ones[kLanes];
  store(ones, fill(1.0f));
  for (int g = 0; g < parity_groups(w.kernel); ++g) {
    const Parities p = parities(w.kernel, g);
    const Index N = grow_columns(p, w.fine), group_steps = grow_steps(p, w.coarse, P::pair);
    for (Index i = 0; 2 * i + p.row < x.fine_height; ++i) {
      for (Index j = 0; 2 * j + p.column < x.fine_width; ++j) {
        const int count = grow_runs(x, p, i, j, tap_steps, whole, runs);
        const Elem* panel = panels;
        by_conv_panels(N, [&](Index first, int vectors) __attribute__((always_inline)) {
          multiply_panel<P>(
              vectors, at<const Elem>(x.in, 0), x.in.stride, x.images, runs, count, panel,
              [&](Index r, int R, int V, const float* sums) __attribute__((always_inline)) {
                grow_finish<P, E>(x, p, ones, i, j, r, R, first, V, sums);
              });
          panel += vectors * kLanes * P::pair * group_steps;
        });
      }
    }
    panels += vectors(N) * kLanes * P::pair * group_steps;
  }
}

template <class P>
void conv_grow(const ConvArgs& x) {
  by_ending(
      x, [&](auto ending) __attribute__((always_inline)) { grow<P, decltype(ending)::value>(x); });
}

// --- gradients of the weights --------------------------------------------------------------------

// What multiply_pixels goes through: `pairs` pairs of images, each `height` × `width` coarse
// pixels.
struct Pixels {
  Index pairs, height, width;
  Index fine_pair, fine_row, fine_step;        // elements
  Index coarse_pair, coarse_row, coarse_step;  // elements
};

// sums[r][v] (+)= Σ over pixels of fine[r] · coarse[v] for R fine elements and V vectors.
template <class P, int R, int V>
__attribute__((noinline)) void multiply_pixels(const typename P::Elem* fine,
                                               const typename P::Elem* coarse, const Pixels& x,
                                               float* sums, Index stride, bool add) {
  using Elem = typename P::Elem;
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      acc[r][v] = add ? load(sums + r * stride + v * kLanes) : fill(0.0f);
    }
  }
  for (Index pair = 0; pair < x.pairs; ++pair) {
    for (Index y = 0; y < x.height; ++y) {
      const Elem* a = fine + pair * x.fine_pair + y * x.fine_row;
      const Elem* w = coarse + pair * x.coarse_pair + y * x.coarse_row;
      for (Index n = x.width; n > 0; --n, a += x.fine_step, w += x.coarse_step) {
        typename P::Weight weights[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) weights[v] = P::weight(w + v * kLanes * P::pair);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const typename P::Broadcast b = P::broadcast(a + r * P::pair);
#pragma GCC unroll 16
          for (int v = 0; v < V; ++v) acc[r][v] = P::multiply_add(acc[r][v], weights[v], b);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(sums + r * stride + v * kLanes, acc[r][v]);
  }
}

template <class P, int R, int V>
FD_INLINE void multiply_pixels_of(int rows, const typename P::Elem* fine,
                                  const typename P::Elem* coarse, const Pixels& x, float* sums,
                                  Index stride, bool add) {
  if constexpr (R > 1) {
    if (rows < R) {
      return multiply_pixels_of<P, R - 1, V>(rows, fine, coarse, x, sums, stride, add);
    }
  }
  multiply_pixels<P, R, V>(fine, coarse, x, sums, stride, add);
}

template <class P, int V = kConvVectors>
FD_INLINE void multiply_pixels_any(int vectors, Index run, const typename P::Elem* fine,
                                   const typename P::Elem* coarse, const Pixels& x, float* sums,
                                   Index stride, bool add) {
  if constexpr (V > 1) {
    if (vectors < V) {
      return multiply_pixels_any<P, V - 1>(vectors, run, fine, coarse, x, sums, stride, add);
    }
  }
  constexpr int most = conv_rows(V);
  evenly(run, most, [&](Index e, int R) __attribute__((always_inline)) {
    multiply_pixels_of<P, most, V>(R, fine + e * P::pair, coarse, x, sums + e * stride, stride,
                                   add);
  });
}

FD_INLINE Index conv_gradient_columns(const ConvWeights& w) { return vectors(w.coarse) * kLanes; }

Index conv_gradient_size(const ConvWeights& w) {
  return w.kernel * w.kernel * w.fine * conv_gradient_columns(w);
}

template <class P>
Index conv_gradient_scratch(const ConvArgs& x) {
  const ConvWeights& w = x.weights;
  const Index fine = vectors(x.fine_height * x.fine_width * w.fine) * kLanes;
  const Index coarse = x.coarse_height * x.coarse_width * conv_gradient_columns(w);
  return (steps(x.images, P::pair) * (fine + coarse) * P::pair + 64) *
         Index{sizeof(typename P::Elem)};
}

// Two images (for float32 one) with their elements side by side; `high` null: zeros.
template <class P>
FD_INLINE void zip(typename P::Elem* to, const typename P::Elem* low, const typename P::Elem* high,
                   Index count) {
  for (Index c = 0; c < count; c += kLanes) {
    copy_step(to + c * P::pair, low + c, high == nullptr ? nullptr : high + c,
              least(kLanes, count - c));
  }
}

// Pixels that a sum is worth keeping in registers for.
constexpr Index kPixelsAtOnce = 128;

template <class P>
void conv_gradient(const ConvArgs& x, Rows fine, Rows coarse, float* gradient, bool add,
                   void* scratch) {
  using Elem = typename P::Elem;
  const ConvWeights& w = x.weights;
  const Index pairs = steps(x.images, P::pair), columns = conv_gradient_columns(w);
  const Index fine_count = x.fine_height * x.fine_width * w.fine;
  const Index coarse_pixels = x.coarse_height * x.coarse_width;
  const Index fine_pair = vectors(fine_count) * kLanes * P::pair;
  const Index coarse_pair = coarse_pixels * columns * P::pair;
  Elem* fines = static_cast<Elem*>(scratch);
  Elem* coarses = fines + pairs * fine_pair;
  for (Index i = 0; i < pairs; ++i) {
    const Index low = i * P::pair, high = low + 1;
    const bool two = P::pair == 2 && high < x.images;
    zip<P>(fines + i * fine_pair, at<const Elem>(fine, low),
           two ? at<const Elem>(fine, high) : nullptr, fine_count);
    Elem* to = coarses + i * coarse_pair;
    const Elem *a = at<const Elem>(coarse, low), *b = two ? at<const Elem>(coarse, high) : nullptr;
    if (columns == w.coarse) {
      zip<P>(to, a, b, coarse_pixels * columns);
    } else {
      for (Index pixel = 0; pixel < coarse_pixels; ++pixel) {
        zip<P>(to + pixel * columns * P::pair, a + pixel * w.coarse,
               b == nullptr ? nullptr : b + pixel * w.coarse, w.coarse);
      }
    }
  }
  const Index run = w.kernel * w.fine,
              at_once = (kPixelsAtOnce + coarse_pixels - 1) / coarse_pixels;
  for (Index first = 0; first < pairs; first += at_once) {
    const Pixels pixels{least(at_once, pairs - first),
                        x.coarse_height,
                        x.coarse_width,
                        fine_pair,
                        2 * x.fine_width * w.fine * P::pair,
                        2 * w.fine * P::pair,
                        coarse_pair,
                        x.coarse_width * columns * P::pair,
                        columns * P::pair};
    by_conv_panels(w.coarse, [&](Index vector, int V) __attribute__((always_inline)) {
      for (Index ky = 0; ky < w.kernel; ++ky) {
        multiply_pixels_any<P>(
            V, run, fines + first * fine_pair + ky * x.fine_width * w.fine * P::pair,
            coarses + first * coarse_pair + vector * kLanes * P::pair, pixels,
            gradient + ky * run * columns + vector * kLanes, columns, add || first > 0);
      }
    });
  }
}

// weight_grad [coarse, kernel, kernel, fine] = scale · Σ of the parts, for elements [begin, end) of
// its last three dimensions.
void conv_sum(const ConvSumArgs& x, Index begin, Index end) {
  const ConvWeights& w = x.weights;
  const Index columns = conv_gradient_columns(w), all = w.kernel * w.kernel * w.fine;
  for (Index e = begin; e < end; e += kLanes) {
    for (Index c = 0; c < w.coarse; c += kLanes) {
      Vec square[kLanes];
      for (Index i = 0; i < kLanes; ++i) {
        square[i] = fill(0.0f);
        if (e + i >= end) continue;
        const float* from = x.parts + (e + i) * columns + c;
        for (Index part = 0; part < x.count; ++part) {
          square[i] = square[i] + load(from + part * x.stride);
        }
        square[i] = square[i] * fill(x.scale);
      }
      transpose(square);
      for (Index i = 0; i < kLanes && c + i < w.coarse; ++i) {
        store(x.weight_grad + (c + i) * all + e, square[i], least(kLanes, end - e));
      }
    }
  }
}

// --- passes over images --------------------------------------------------------------------------

template <class P>
void conv_pixels(const unsigned char* from, Index count, Index images, Rows to) {
  using Elem = typename P::Elem;
  for (Index i = 0; i < images; ++i, from += count) {
    by_vectors(0, count, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
      put(at<Elem>(to, i) + c, pixel_value<P::fast>(get(from + c)));
    });
  }
}

// sums[c] += Σ over images and pixels; `line` has width × channels floats.
template <class P>
void conv_channel_sums(Rows in, Index images, Index height, Index width, Index channels,
                       float* line, double* sums) {
  using Elem = typename P::Elem;
  const Index count = width * channels;
  for (Index image = 0; image < images; ++image) {
    for (Index y = 0; y < height; ++y) {
      const Elem* from = at<const Elem>(in, image) + y * count;
      by_vectors(0, count, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
        const Vec v = get(from + c);
        put(line + c, y == 0 ? v : v + get(line + c));
      });
    }
    for (Index x = 0; x < width; ++x) {
      for (Index c = 0; c < channels; ++c) sums[c] += line[x * channels + c];
    }
  }
}

template <class P>
void conv_relu_backward(Rows grad, Rows saved, Index cols, Index rows) {
  using Elem = typename P::Elem;
  for (Index r = 0; r < rows; ++r) {
    by_vectors(0, cols, [&](Index c, auto get, auto put) __attribute__((always_inline)) {
      Elem* g = at<Elem>(grad, r) + c;
      put(g, through<Activation::relu>(get(g), get(at<const Elem>(saved, r) + c)));
    });
  }
}

}  // namespace
}  // namespace fastdreamer
