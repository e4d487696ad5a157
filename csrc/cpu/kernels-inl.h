// The bodies of the kernels, once. Each kernels_<isa>.cpp includes this file compiled with its own
// flags and exports one table; everything here has internal linkage.
#pragma once

#include "cpu/cells-inl.h"
#include "cpu/conv-inl.h"
#include "cpu/conv-tiles-inl.h"
#include "cpu/gemm-inl.h"
#include "cpu/lambda_return-inl.h"
#include "cpu/norm-inl.h"
#include "cpu/readout-inl.h"

namespace fastdreamer {
namespace {

// Registers of tiles belong to the thread's task alone; without tiles there is nothing to do.
template <class P>
void enter([[maybe_unused]] Index rows) {
#if FD_AMX
  if (P::tiles) amx::configure(&kTileShapes.of[tile_rows(rows) - 1]);
#endif
}
template <class P>
void leave() {
#if FD_AMX
  if (P::tiles) amx::release();
#endif
}

template <class P>
double peak([[maybe_unused]] Index iterations) {
#if FD_AMX
  if constexpr (P::tiles) {
    return peak_of_tiles(iterations);
  } else
#endif
  {
    return peak_of_vectors<P>(iterations);
  }
}

// `few`: null, or the table for calls of few rows.
template <class P>
constexpr Kernels table(const Kernels* few = nullptr) {
  using Cells = typename P::Cells;
  Kernels k{};
  // AMX has the same peak with 32 rows and with 400; the more, the less often weights stream past
  k.tile_rows = P::tiles ? 256 : 50;
  k.tile_unit = P::tiles ? 16 : 1;
  k.few_rows = few == nullptr ? 0 : 16;
  k.few = few;
  k.enter = enter<P>;
  k.leave = leave<P>;
  k.elem_size = sizeof(typename P::Elem);
  k.panels_size = panels_size<P>;
  k.panel_count = panel_count<P>;
  k.pack = pack<P>;
  k.gru_panels_size = gru_panels_size<P>;
  k.gru_panel_count = gru_panel_count<P>;
  k.pack_gru = pack_gru<P>;
  k.linear = linear<P>;
  k.gru = gru<P>;
  k.gru_backward = gru_backward<Cells>;
  k.late_gru = late_gru<Cells>;
  k.late_gru_backward = late_gru_backward<Cells>;
  k.normalise = normalise<Cells>;
  k.norm_backward = norm_backward<Cells>;
  k.norm_gradient = norm_gradient<Cells>;
  k.sample = sample<Cells>;
  k.sample_backward = sample_backward<Cells>;
  k.read_out = read_out<Cells>;
  k.act = act<Cells>;
  k.act_backward = act_backward<Cells>;
  k.bound_backward = bound_backward<Cells>;
  k.discount = discount<Cells>;
  k.perturb = perturb<Cells>;
  k.dot = dot<Cells>;
  k.dot_backward = dot_backward<Cells>;
  k.add_scaled = add_scaled<Cells>;
  k.copy = copy<Cells>;
  k.weight_gradient_scratch = weight_gradient_scratch<P>;
  k.weight_gradient = weight_gradient<P>;
  k.conv_shrink_size = conv_shrink_size<Cells>;
  k.conv_grow_size = conv_grow_size<Cells>;
  k.conv_pack_shrink = conv_pack_shrink<Cells>;
  k.conv_pack_grow = conv_pack_grow<Cells>;
  k.conv_shrink = conv_shrink<Cells>;
  k.conv_grow = conv_grow<Cells>;
  k.conv_gradient_size = conv_gradient_size;
  k.conv_gradient_scratch = conv_gradient_scratch<Cells>;
  k.conv_gradient = conv_gradient<Cells>;
  k.conv_sum = conv_sum;
  k.conv_images = 10;
#if FD_AMX
  if constexpr (P::tiles) {
    k.conv_shrink = conv_shrink_tiles;
    k.conv_grow = conv_grow_tiles;
    k.conv_gradient_size = conv_gradient_size_tiles;
    k.conv_gradient_scratch = conv_gradient_scratch_tiles;
    k.conv_gradient = conv_gradient_tiles;
    k.conv_sum = conv_sum_tiles;
    k.conv_images = amx::kRows;
  }
#endif
  k.conv_pixels = conv_pixels<Cells>;
  k.conv_channel_sums = conv_channel_sums<Cells>;
  k.conv_relu_backward = conv_relu_backward<Cells>;
  k.lambda_return_forward = lambda_return_forward;
  k.lambda_return_backward = lambda_return_backward;
  k.evaluate = evaluate<Cells>;
  k.peak = peak<P>;
  return k;
}

}  // namespace
}  // namespace fastdreamer
