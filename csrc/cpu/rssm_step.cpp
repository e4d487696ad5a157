#include "cpu/rssm_step.h"

namespace fastdreamer {
DeterBuffers take_deter(Arena& arena, const Kernels& k, const Rssm& rssm, Index rows, bool keep) {
  DeterBuffers buffers;
  buffers.inp = take_mlp(arena, k, rssm.inp, rows, keep);
  if (keep) buffers.gates = take_rows(arena, k, rows, 4 * rssm.D);
  if (!rssm.gru.late()) return buffers;
  buffers.inp.hidden[rssm.inp.depth - 1] = take_rows(arena, k, rows, rssm.hidden() + rssm.D);
  buffers.sums = take_rows(arena, k, rows, 3 * rssm.D);
  if (keep && rssm.gru.norm) buffers.inverse = take_floats(arena, rows, 1);
  return buffers;
}

Drawn take_drawn(Arena& arena, const Rssm& rssm, Index rows) {
  if (rssm.latent.classes == 0) return {};
  return {arena.take<std::int32_t>(rows * rssm.noise()), rssm.noise()};
}

void act(const Kernels& k, const Actor& actor, Index A, Index rows, Floats raw, Floats noise,
         Rows out, Floats out32, Floats slope) {
  if (actor.one_hot()) {  // within ±1 as they are
    k.sample({A, rows, raw, noise, actor.latent, out, out32, kNoFloats, kNoFloats, slope});
  } else {
    k.act({A, rows, raw, noise, actor.mean_scale, actor.latent.std, actor.squash, actor.bound, out,
           out32});
  }
}

void act_backward(const Kernels& k, const Actor& actor, Index A, Index rows, Floats grad,
                  Floats own, Floats raw, Floats noise, Floats action, Floats slope,
                  Rows raw_grad) {
  if (actor.bound && !actor.one_hot()) k.bound_backward({A, rows, action, grad});
  add_rows(k, own, A, rows, grad);
  if (actor.one_hot()) {
    k.sample_backward({A, rows, actor.latent, grad, kNoFloats, kNoFloats, noise, slope, raw_grad});
  } else {
    k.act_backward({A, rows, grad, raw, noise, action, actor.mean_scale, actor.latent.std,
                    actor.squash, raw_grad});
  }
}

void deter_step(const Kernels& k, const Rssm& rssm, Rows state, const Drawn& drawn, Floats h32,
                Index rows, const DeterBuffers& to, Index row, Rows next, Floats out32) {
  forward(k, rssm.inp, columns(k, state, rssm.D), rows, to.inp, row, kNoFloats, kNoFloats,
          drawn.ones(rssm, 0));
  const Buffer& hidden = to.inp.hidden[rssm.inp.depth - 1];
  const Rows x = hidden.at(row);
  if (rssm.gru.late()) {
    const Gru& gru = rssm.gru;
    const Rows sums = to.sums.at(row);
    k.copy({h32, nullptr, rssm.D, rows, hidden.at(row, rssm.hidden()), kNoFloats, false});
    k.linear({gru.joint, x, rows, gru.bias, kNoFloats, Activation::none, kNoRows, sums, kNoFloats,
              kNoRows});
    k.late_gru(
        {gru.at, gru.norm, rows, sums, to.inverse.at(row), h32, next, out32, to.gates.at(row)});
    return;
  }
  k.gru({rssm.gru.forward, rssm.gru.bias, x, state, h32, rows, next, out32, to.gates.at(row)});
}

DeterDeltas take_deter_deltas(Arena& arena, const Kernels& k, const Rssm& rssm, Index rows) {
  const Index D = rssm.D;
  DeterDeltas deltas{take_deltas(arena, k, rssm.inp, rows), {}, {}};
  deltas.gates = take_rows(arena, k, rows, rssm.gru.late() ? 3 * D : 4 * D);
  if (rssm.gru.norm) deltas.sums = take_rows(arena, k, rows, 3 * D);
  return deltas;
}

void deter_step_backward(const Kernels& k, const Rssm& rssm, Rows state, const DeterBuffers& saved,
                         Index saved_row, const DeterDeltas& deltas, Index delta_row, Index rows,
                         Floats dh, Floats ds_da) {
  const Index D = rssm.D;
  const int last = rssm.inp.depth - 1;
  const Rows gates = deltas.gates.at(delta_row);
  const Gru& gru = rssm.gru;
  if (gru.late()) {
    const Rows behind = gru.norm ? deltas.sums.at(delta_row) : gates;
    k.late_gru_backward({gru.at, rows, saved.gates.at(saved_row), state, dh, behind});
    if (gru.norm) {
      k.norm_backward({gru.norm, 3 * D, rows, behind, saved.sums.at(saved_row),
                       saved.inverse.at(saved_row), gates});
    }
  } else {
    k.gru_backward({D, rows, saved.gates.at(saved_row), state, dh, gates});
  }
  // through the state's weights, and through the input's and the activation before them
  k.linear({gru.backward_hh, gru.late() ? gates : columns(k, gates, D), rows, nullptr, dh,
            Activation::none, kNoRows, kNoRows, dh, kNoRows});
  k.linear({gru.backward_ih, gates, rows, nullptr, kNoFloats, rssm.inp.act,
            slope_of(rssm.inp, saved.inp, last, saved_row),
            behind_norm(rssm.inp, deltas.inp, last, delta_row), kNoFloats, kNoRows});
  through_norm(k, rssm.inp, last, saved.inp, saved_row, deltas.inp, delta_row, rows);
  backward(k, rssm.inp, saved.inp, saved_row, deltas.inp, delta_row, rows, ds_da, false);
}

void add_deter_gradients(WeightGradients& jobs, const Kernels& k, const Rssm& rssm,
                         const Buffer& states, const DeterBuffers& saved, const DeterDeltas& deltas,
                         Index rows, const DeterGrads& grads) {
  const Index D = rssm.D, K = rssm.hidden();
  const Rows x = saved.inp.hidden[rssm.inp.depth - 1].at(0), gates = deltas.gates.at(0);
  const auto below = [](LayerGrad grad, Index row) {
    return LayerGrad{grad.weight + row * grad.stride, grad.stride, grad.bias + row};
  };
  if (rssm.gru.late()) {
    jobs.add(x, K + D, gates, 3 * D, rows, nullptr, grads.ih, rssm.gru.rotate);
    jobs.add_norm(deltas.sums.at(0), saved.sums.at(0), 3 * D, rows, nullptr, grads.ih);
  } else {
    jobs.add(x, K, columns(k, gates, D), 2 * D, rows, nullptr, grads.ih);  // reset, update
    jobs.add(x, K, gates, D, rows, nullptr, below(grads.ih, 2 * D));       // new
    jobs.add(states.at(0), D, columns(k, gates, D), 3 * D, rows, nullptr, grads.hh);
  }
  jobs.add(rssm.inp, states.at(0, D), saved.inp, deltas.inp, rows, nullptr, grads.inp,
           grads.rotate);
}

}  // namespace fastdreamer
