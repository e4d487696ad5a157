#include "cpu/rssm_step.h"

namespace fastdreamer {
namespace {

// The same floats from column `begin` on.
Floats columns(Floats rows, Index begin) { return {rows.data + begin, rows.stride}; }

// One of the GRUs that a block-diagonal one consists of.
LateGates of_block(const Rssm& rssm) {
  const Index units = rssm.D / rssm.gru.blocks->count;
  return {units, 0, units, 2 * units, rssm.gru.at.update_bias};
}

// h' of the features, h and in float h32.
void block_step(const Kernels& k, const Rssm& rssm, Rows state, Floats h32, Index rows,
                const DeterBuffers& to, Index row, Rows next, Floats out32) {
  const Blocks& blocks = *rssm.gru.blocks;
  const Mlp& mlp = blocks.mlp;
  const Index G = blocks.count;
  forward(k, blocks.features, state, rows, to.features, row, kNoFloats);
  Rows in = state;
  for (int i = 0; i < mlp.depth; ++i) {
    const Layer& layer = mlp.layers[i];
    const bool active = i < mlp.depth - 1;
    const Rows hidden = active ? to.blocks.hidden[i].at(row) : to.sums.at(row);
    const Rows slope = to.blocks.slope[i].at(row), normed = to.blocks.normed[i].at(row);
    const Rows sums = normed.data == nullptr ? hidden : normed;
    const Activation act = active && !layer.norm ? mlp.act : Activation::none;
    for (Index g = 0; g < G; ++g) {
      const Index from = g * (layer.in / G), first = g * (layer.out / G);
      Floats add = kNoFloats;
      if (i == 0) {
        add = to.shared.at(row);
        k.linear({blocks.at(blocks.shared, 0, g), to.x.at(row), rows, nullptr, kNoFloats,
                  Activation::none, kNoRows, kNoRows, add, kNoRows});
      }
      k.linear({blocks.at(blocks.forward, i, g), columns(k, in, from), rows,
                layer.bias == nullptr ? nullptr : layer.bias + first, add, act, kNoRows,
                columns(k, sums, first), kNoFloats,
                layer.norm ? kNoRows : columns(k, slope, first)});
    }
    if (layer.norm) {
      k.normalise({layer.norm, layer.out, rows, mlp.act, sums, normed, to.blocks.inverse[i].at(row),
                   hidden, slope});
    }
    in = hidden;
  }
  const LateGates units = of_block(rssm);
  for (Index g = 0; g < G; ++g) {
    const Index first = g * units.D;
    k.late_gru({units,
                {},
                rows,
                columns(k, in, 3 * first),
                kNoFloats,
                columns(h32, first),
                columns(k, next, first),
                columns(out32, first),
                columns(k, to.gates.at(row), 4 * first)});
  }
}

// Down to the first block layer's deltas, and to all of dh.
void block_step_backward(const Kernels& k, const Rssm& rssm, Rows state, const DeterBuffers& saved,
                         Index saved_row, const DeterDeltas& deltas, Index delta_row, Index rows,
                         Floats dh) {
  const Blocks& blocks = *rssm.gru.blocks;
  const Mlp &mlp = blocks.mlp, &features = blocks.features;
  const Index G = blocks.count;
  const LateGates units = of_block(rssm);
  for (Index g = 0; g < G; ++g) {
    const Index first = g * units.D;
    k.late_gru_backward({units, rows, columns(k, saved.gates.at(saved_row), 4 * first),
                         columns(k, state, first), columns(dh, first),
                         columns(k, deltas.blocks.hidden[mlp.depth - 1].at(delta_row), 3 * first)});
  }
  for (int i = mlp.depth - 1; i >= 0; --i) {
    const Layer& layer = mlp.layers[i];
    const Rows of_sums = deltas.blocks.hidden[i].at(delta_row);
    for (Index g = 0; g < G; ++g) {
      const Panels& w = blocks.at(blocks.backward, i, g);
      const Index into = g * (layer.in / G);
      const Rows delta = columns(k, of_sums, g * (layer.out / G));
      if (i == 0) {
        const Floats to = columns(dh, into);
        k.linear({w, delta, rows, nullptr, to, Activation::none, kNoRows, kNoRows, to, kNoRows});
      } else {
        k.linear({w, delta, rows, nullptr, kNoFloats, mlp.act,
                  columns(k, slope_of(mlp, saved.blocks, i - 1, saved_row), into),
                  columns(k, behind_norm(mlp, deltas.blocks, i - 1, delta_row), into), kNoFloats,
                  kNoRows});
      }
    }
    if (i > 0) {
      through_norm(k, mlp, i - 1, saved.blocks, saved_row, deltas.blocks, delta_row, rows);
    }
  }
  backward_through(k, features, blocks.backward_features, deltas.blocks.hidden[0].at(delta_row),
                   saved.features, saved_row, deltas.features, delta_row, rows);
  backward(k, features, saved.features, saved_row, deltas.features, delta_row, rows, dh, true);
}

// A block's weight is [in, out]: its gradient is that of a layer whose inputs are the deltas.
void add_block_gradients(WeightGradients& jobs, const Kernels& k, const Blocks& blocks,
                         const Buffer& states, const DeterBuffers& saved, const DeterDeltas& deltas,
                         Index K, Index rows, const DeterGrads& grads) {
  const Mlp& mlp = blocks.mlp;
  const Index G = blocks.count;
  for (int i = 0; i < mlp.depth; ++i) {
    const Layer& layer = mlp.layers[i];
    const LayerGrad& grad = grads.blocks[static_cast<std::size_t>(i)];
    const Index in = layer.in / G, out = layer.out / G, features = i == 0 ? blocks.all(K) : 0;
    const Buffer& before = i == 0 ? states : saved.blocks.hidden[i - 1];
    const Rows delta = deltas.blocks.hidden[i].at(0);
    for (Index g = 0; g < G; ++g) {
      const Rows d = columns(k, delta, g * out);
      float* weight = grad.weight + g * (in + features) * out;
      jobs.add(d, out, before.at(0, g * in), in, rows, nullptr, {weight, out, nullptr});
      if (i > 0) continue;
      jobs.add(d, out, saved.x.at(0), features, rows, nullptr, {weight + in * out, out, nullptr});
    }
    jobs.add_sums(delta, layer.out, rows, grad.bias);
    jobs.add_norm(deltas.blocks.normed[i].at(0), saved.blocks.normed[i].at(0), layer.out, rows,
                  nullptr, grad);
  }
  jobs.add(blocks.features, states.at(0), saved.features, deltas.features, rows, nullptr,
           grads.features.data());
}

}  // namespace

DeterBuffers take_deter(Arena& arena, const Kernels& k, const Rssm& rssm, Index rows, bool keep) {
  const Index K = rssm.hidden(), D = rssm.D;
  const Gru& gru = rssm.gru;
  DeterBuffers buffers;
  buffers.inp = take_mlp(arena, k, rssm.inp, rows, keep);
  if (rssm.action != nullptr) buffers.action = take_mlp(arena, k, *rssm.action, rows, keep);
  if (keep) buffers.gates = take_rows(arena, k, rows, 4 * D);
  Buffer& inp = buffers.inp.hidden[rssm.inp.depth - 1];
  if (gru.blocks == nullptr && !gru.late() && rssm.action == nullptr) {
    buffers.x = inp;
    return buffers;
  }
  const Blocks* blocks = gru.blocks;
  const Index width = blocks != nullptr ? blocks->all(K) : gru.late() ? K + D : K;
  buffers.x = take_rows(arena, k, rows, width);
  Index first = 0;  // of x where K begins
  if (blocks != nullptr) {
    const Mlp& features = blocks->features;
    buffers.features = take_mlp(arena, k, features, rows, keep);
    buffers.features.hidden[features.depth - 1] = buffers.x.from(blocks->features_first ? 0 : K);
    first = blocks->features_first ? features.out() : 0;
    buffers.blocks = take_mlp(arena, k, blocks->mlp, rows, keep);
    buffers.shared = take_floats(arena, rows, blocks->mlp.layers[0].out / blocks->count);
  }
  inp = buffers.x.from(first + rssm.of_stoch());
  if (rssm.action != nullptr) {
    buffers.action.hidden[rssm.action->depth - 1] = buffers.x.from(first + rssm.of_action());
  }
  if (blocks != nullptr || gru.late()) buffers.sums = take_rows(arena, k, rows, 3 * D);
  if (keep && gru.norm) buffers.inverse = take_floats(arena, rows, 1);
  return buffers;
}

Drawn take_drawn(Arena& arena, const Rssm& rssm, Index rows) {
  const Index count = rssm.latent.count(rssm.S);
  if (count == 0) return {};
  return {arena.take<std::int32_t>(rows * count), count};
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
  if (rssm.action != nullptr) {
    forward(k, *rssm.action, columns(k, state, rssm.D + rssm.S), rows, to.action, row, kNoFloats);
  }
  const Gru& gru = rssm.gru;
  if (gru.blocks != nullptr) {
    return block_step(k, rssm, state, h32, rows, to, row, next, out32);
  }
  const Rows x = to.x.at(row);
  if (gru.late()) {
    const Rows sums = to.sums.at(row);
    k.copy({h32, nullptr, rssm.D, rows, to.x.at(row, rssm.hidden()), kNoFloats, false});
    k.linear({gru.joint, x, rows, gru.bias, kNoFloats, Activation::none, kNoRows, sums, kNoFloats,
              kNoRows});
    k.late_gru(
        {gru.at, gru.norm, rows, sums, to.inverse.at(row), h32, next, out32, to.gates.at(row)});
    return;
  }
  k.gru({gru.forward, gru.bias, x, state, h32, rows, next, out32, to.gates.at(row)});
}

DeterDeltas take_deter_deltas(Arena& arena, const Kernels& k, const Rssm& rssm, Index rows) {
  const Index D = rssm.D;
  DeterDeltas deltas;
  deltas.inp = take_deltas(arena, k, rssm.inp, rows);
  if (rssm.action != nullptr) deltas.action = take_deltas(arena, k, *rssm.action, rows);
  if (const Blocks* blocks = rssm.gru.blocks) {
    deltas.features = take_deltas(arena, k, blocks->features, rows);
    deltas.blocks = take_deltas(arena, k, blocks->mlp, rows);
    return deltas;
  }
  deltas.gates = take_rows(arena, k, rows, rssm.gru.late() ? 3 * D : 4 * D);
  if (rssm.gru.norm) deltas.sums = take_rows(arena, k, rows, 3 * D);
  return deltas;
}

void deter_step_backward(const Kernels& k, const Rssm& rssm, Rows state, const DeterBuffers& saved,
                         Index saved_row, const DeterDeltas& deltas, Index delta_row, Index rows,
                         Floats dh, Floats ds_da) {
  const Index D = rssm.D, S = rssm.S;
  const Gru& gru = rssm.gru;
  Rows gates = deltas.gates.at(delta_row);
  if (gru.blocks != nullptr) {
    block_step_backward(k, rssm, state, saved, saved_row, deltas, delta_row, rows, dh);
    gates = deltas.blocks.hidden[0].at(delta_row);
  } else if (gru.late()) {
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
  if (gru.blocks == nullptr) {
    k.linear({gru.backward_hh, gru.late() ? gates : columns(k, gates, D), rows, nullptr, dh,
              Activation::none, kNoRows, kNoRows, dh, kNoRows});
  }
  backward_through(k, rssm.inp, gru.backward_ih, gates, saved.inp, saved_row, deltas.inp, delta_row,
                   rows);
  backward(k, rssm.inp, saved.inp, saved_row, deltas.inp, delta_row, rows, ds_da, false);
  if (rssm.action == nullptr) return;
  backward_through(k, *rssm.action, gru.backward_action, gates, saved.action, saved_row,
                   deltas.action, delta_row, rows);
  backward(k, *rssm.action, saved.action, saved_row, deltas.action, delta_row, rows,
           columns(ds_da, S), false);
}

void add_deter_gradients(WeightGradients& jobs, const Kernels& k, const Rssm& rssm,
                         const Buffer& states, const DeterBuffers& saved, const DeterDeltas& deltas,
                         Index rows, const DeterGrads& grads) {
  const Index D = rssm.D, K = rssm.hidden();
  const Rows x = saved.x.at(0), gates = deltas.gates.at(0);
  const auto below = [](LayerGrad grad, Index row) {
    return LayerGrad{grad.weight + row * grad.stride, grad.stride, grad.bias + row};
  };
  if (rssm.gru.blocks != nullptr) {
    add_block_gradients(jobs, k, *rssm.gru.blocks, states, saved, deltas, K, rows, grads);
  } else if (rssm.gru.late()) {
    jobs.add(x, K + D, gates, 3 * D, rows, nullptr, grads.ih, rssm.gru.rotate);
    jobs.add_norm(deltas.sums.at(0), saved.sums.at(0), 3 * D, rows, nullptr, grads.ih);
  } else {
    jobs.add(x, K, columns(k, gates, D), 2 * D, rows, nullptr, grads.ih);  // reset, update
    jobs.add(x, K, gates, D, rows, nullptr, below(grads.ih, 2 * D));       // new
    jobs.add(states.at(0), D, columns(k, gates, D), 3 * D, rows, nullptr, grads.hh);
  }
  jobs.add(rssm.inp, states.at(0, D), saved.inp, deltas.inp, rows, nullptr, grads.inp.data(),
           grads.rotate);
  if (rssm.action == nullptr) return;
  jobs.add(*rssm.action, states.at(0, D + rssm.S), saved.action, deltas.action, rows, nullptr,
           grads.action.data());
}

}  // namespace fastdreamer
