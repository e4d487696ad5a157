// The bodies of the kernels, once. Each kernels_<isa>.cpp includes this file compiled with its own
// flags and exports one table; everything here has internal linkage.
#pragma once

#include "cpu/cells-inl.h"
#include "cpu/conv-inl.h"
#include "cpu/gemm-inl.h"
#include "cpu/scan-inl.h"

namespace fastdreamer {
namespace {

template <class P>
constexpr Kernels table() {
  Kernels k{};
  k.elem_size = sizeof(typename P::Elem);
  k.panels_size = panels_size<P>;
  k.panel_count = panel_count<P>;
  k.pack = pack<P>;
  k.gru_panels_size = gru_panels_size<P>;
  k.gru_panel_count = gru_panel_count<P>;
  k.pack_gru = pack_gru<P>;
  k.linear = linear<P>;
  k.gru = gru<P>;
  k.gru_backward = gru_backward<P>;
  k.sample = sample<P>;
  k.sample_backward = sample_backward<P>;
  k.act = act<P>;
  k.act_backward = act_backward<P>;
  k.discount = discount<P>;
  k.perturb = perturb<P>;
  k.dot = dot<P>;
  k.dot_backward = dot_backward<P>;
  k.add_scaled = add_scaled<P>;
  k.copy = copy<P>;
  k.weight_gradient_scratch = weight_gradient_scratch<P>;
  k.weight_gradient = weight_gradient<P>;
  k.conv_shrink_size = conv_shrink_size<P>;
  k.conv_grow_size = conv_grow_size<P>;
  k.conv_pack_shrink = conv_pack_shrink<P>;
  k.conv_pack_grow = conv_pack_grow<P>;
  k.conv_shrink = conv_shrink<P>;
  k.conv_grow = conv_grow<P>;
  k.conv_gradient_size = conv_gradient_size;
  k.conv_gradient_scratch = conv_gradient_scratch<P>;
  k.conv_gradient = conv_gradient<P>;
  k.conv_sum = conv_sum;
  k.conv_pixels = conv_pixels<P>;
  k.conv_channel_sums = conv_channel_sums<P>;
  k.conv_relu_backward = conv_relu_backward<P>;
  k.lambda_return_forward = lambda_return_forward;
  k.lambda_return_backward = lambda_return_backward;
  k.evaluate = evaluate<P>;
  k.peak = peak<P>;
  return k;
}

}  // namespace
}  // namespace fastdreamer
