#include "cpu/rssm_step.h"

namespace fastdreamer {
DeterBuffers take_deter(Arena& arena, const Kernels& k, const Rssm& rssm, Index rows, bool keep) {
  DeterBuffers buffers;
  buffers.inp = take_mlp(arena, k, rssm.inp, rows, keep);
  if (keep) buffers.gates = take_rows(arena, k, rows, 4 * rssm.D);
  return buffers;
}

Drawn take_drawn(Arena& arena, const Rssm& rssm, Index rows) {
  if (rssm.latent.classes == 0) return {};
  return {arena.take<std::int32_t>(rows * rssm.noise()), rssm.noise()};
}

void deter_step(const Kernels& k, const Rssm& rssm, Rows state, const Drawn& drawn, Floats h32,
                Index rows, const DeterBuffers& to, Index row, Rows next, Floats out32) {
  forward(k, rssm.inp, columns(k, state, rssm.D), rows, to.inp, row, kNoFloats, kNoFloats,
          drawn.ones(rssm, 0));
  const Rows x = to.inp.hidden[rssm.inp.depth - 1].at(row);
  k.gru({rssm.gru.forward, rssm.gru.bias, x, state, h32, rows, next, out32, to.gates.at(row)});
}

DeterDeltas take_deter_deltas(Arena& arena, const Kernels& k, const Rssm& rssm, Index rows) {
  return {take_deltas(arena, k, rssm.inp, rows), take_rows(arena, k, rows, 4 * rssm.D)};
}

void deter_step_backward(const Kernels& k, const Rssm& rssm, Rows state, const DeterBuffers& saved,
                         Index saved_row, const DeterDeltas& deltas, Index delta_row, Index rows,
                         Floats dh, Floats ds_da) {
  const Index D = rssm.D;
  const int last = rssm.inp.depth - 1;
  const Rows gates = deltas.gates.at(delta_row);
  k.gru_backward({D, rows, saved.gates.at(saved_row), state, dh, gates});
  // through the state's weights, and through the input's and the activation before them
  k.linear({rssm.gru.backward_hh, columns(k, gates, D), rows, nullptr, dh, Activation::none,
            kNoRows, kNoRows, dh, kNoRows});
  const MlpBuffers& inp = saved.inp;
  const Buffer& slopes = rssm.inp.act == Activation::silu ? inp.slope[last] : inp.hidden[last];
  k.linear({rssm.gru.backward_ih, gates, rows, nullptr, kNoFloats, rssm.inp.act,
            slopes.at(saved_row), deltas.inp.hidden[last].at(delta_row), kNoFloats, kNoRows});
  backward(k, rssm.inp, inp, saved_row, deltas.inp, delta_row, rows, ds_da, false);
}

void add_deter_gradients(WeightGradients& jobs, const Kernels& k, const Rssm& rssm,
                         const Buffer& states, const DeterBuffers& saved, const DeterDeltas& deltas,
                         Index rows, const DeterGrads& grads) {
  const Index D = rssm.D, K = rssm.hidden();
  const Rows x = saved.inp.hidden[rssm.inp.depth - 1].at(0), gates = deltas.gates.at(0);
  const auto below = [](LayerGrad grad, Index row) {
    return LayerGrad{grad.weight + row * grad.stride, grad.stride, grad.bias + row};
  };
  jobs.add(x, K, columns(k, gates, D), 2 * D, rows, nullptr, grads.ih);  // reset, update
  jobs.add(x, K, gates, D, rows, nullptr, below(grads.ih, 2 * D));       // new
  jobs.add(states.at(0), D, columns(k, gates, D), 3 * D, rows, nullptr, grads.hh);
  jobs.add(rssm.inp, states.at(0, D), saved.inp, deltas.inp, rows, nullptr, grads.inp,
           grads.rotate);
}

}  // namespace fastdreamer
