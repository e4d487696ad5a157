#include "cpu/imagine.h"

#include <algorithm>

#include "cpu/task.h"

namespace fastdreamer {
namespace {

Head take_head(Arena& arena, const Kernels& k, const Mlp* mlp, const Readout& as, Index rows,
               bool kept, Index first, bool gradients) {
  Head head;
  if (mlp == nullptr) return head;
  head.mlp = mlp;
  head.as = as;
  head.kept = kept;
  head.first = first;
  head.hidden = take_mlp(arena, k, *mlp, rows, gradients);
  if (gradients) {
    const auto take = plain(*mlp, as) ? take_unit_deltas : take_deltas;
    head.deltas = take(arena, k, *mlp, rows);
  }
  return head;
}

}  // namespace

Imagine::Imagine(const ImagineArgs& args, const ImagineWants& wants, ImagineTape* tape,
                 Arena& scratch, int threads)
    : tape_(tape != nullptr ? tape : &own_),
      taped_(tape != nullptr) {
  const Kernels& k = *args.kernels;
  const Rssm& rssm = *args.rssm;
  const Tiling tiling = tiling_for(k, args.B, threads);
  threads_ = threads;
  tile_ = tiling.size;
  const Index tiles = tiling.threads * tile_, all = args.H * args.B;
  Arena& arena = taped_ ? tape->arena : scratch;
  ImagineTape& t = *tape_;
  t.args = args;
  t.wants = wants;
  const bool sweep = taped_ && wants.through;
  const Index rows = sweep ? all : tiles;
  // the critic's weight gradients need the states, too
  t.states = take_rows(arena, k, taped_ ? all + args.B : 2 * tiles, rssm.width());
  if (args.actor != nullptr) {
    t.actor = take_mlp(arena, k, args.actor->mlp, rows, sweep);
    t.actor_raw = take_floats(arena, rows, args.actor->raw(rssm.A));
    if (sweep && args.actor->one_hot()) {
      t.actor_slope = take_floats(arena, rows, args.actor->latent.slopes(rssm.A));
    }
  }
  t.deter = take_deter(arena, k, rssm, rows, sweep);
  t.prior = take_mlp(arena, k, rssm.prior, rows, sweep);
  if (sweep) t.slope = take_floats(arena, all, rssm.latent.slopes(rssm.S));
  raw_ = take_floats(scratch, tiles, rssm.raw());
  if (args.deter == nullptr) h_ = take_floats(scratch, 2 * tiles, rssm.D);
  drawn_ = take_drawn(scratch, rssm, 2 * tiles);
  if (args.reward == nullptr) return;

  const bool critic = taped_ && wants.critic, reward = sweep && wants.reward;
  const Index to_value = args.target == nullptr ? all + args.B : all;
  t.reward = take_head(arena, k, args.reward, args.reward_as, reward ? all : tiles, reward,
                       args.departure ? 0 : 1, sweep);
  t.critic = take_head(arena, k, args.critic, args.value_as, critic ? to_value : tiles, critic, 0,
                       critic || (sweep && args.target == nullptr));
  t.target = take_head(arena, k, args.target, args.value_as, tiles, false, 1, sweep);
  const bool discount = sweep && wants.discount, soft = sweep && !args.hard_discount;
  t.discount = take_head(arena, k, args.discount, {}, discount ? all : tiles, discount, 1, soft);
  Index outputs = 1;
  for (const Mlp* head : {args.reward, args.critic, args.target, args.discount}) {
    if (head != nullptr) outputs = std::max(outputs, head->out());
  }
  if (outputs > 1) outputs_ = take_floats(scratch, tiles, outputs);
  if (sweep) {
    t.reward_unit = take_rows(arena, k, all, rssm.feat());
    t.value_unit = take_rows(arena, k, all, rssm.feat());
    if (args.discount != nullptr && soft) {
      t.discount_unit = take_rows(arena, k, all, rssm.feat());
      t.discount_slope = take_floats(arena, args.H, args.B);
    }
  }
  if (args.discount == nullptr && args.returns != nullptr) {
    t.gamma = take_floats(arena, args.H, args.B);
    std::fill_n(t.gamma.data, all, args.gamma);
  }
}

void Imagine::run() const {
  parallel_tiles(tiling_for(*tape_->args.kernels, tape_->args.B, threads_),
                 [&](Index begin, Index rows, int thread) { tile(begin, rows, thread); });
}

void Imagine::tile(Index begin, Index rows, int thread) const {
  const ImagineTape& tape = *tape_;
  const ImagineArgs& x = tape.args;
  const Task task(*x.kernels, x.B, rows);
  const Kernels& k = task.kernels;
  const Rssm& rssm = *x.rssm;
  const Index A = rssm.A, D = rssm.D, S = rssm.S, B = x.B, F = rssm.feat();
  const bool sweep = taped_ && tape.wants.through;
  const Index scratch = thread * tile_;
  const auto states = [&](Index t, Index col) {
    return tape.states.at(taped_ ? t * B + begin : (2 * thread + t % 2) * tile_, col);
  };
  const auto h = [&](Index t) {  // of state t, in float
    if (t == 0) return rows_of(x.start_deter, D).at(begin);
    if (x.deter != nullptr) return rows_of(x.deter, D).at((t - 1) * B + begin);
    return h_.at((2 * thread + t % 2) * tile_);
  };
  const auto drawn = [&](Index t) {  // in state t; the start is anybody's
    return t == 0 ? Drawn{} : drawn_.at((2 * thread + t % 2) * tile_);
  };
  const auto ones = [&](Index t) { return drawn(t).ones(rssm, D); };  // of its features
  const Floats raw = raw_.at(scratch);
  const auto unit = [&](const Buffer& of, Index t) {
    return sweep ? of.at(t * B + begin) : kNoRows;
  };

  k.copy({h(0), nullptr, D, rows, states(0, 0), kNoFloats, false});
  k.copy({rows_of(x.start_stoch, S).at(begin), nullptr, S, rows, states(0, D), kNoFloats, false});
  for (Index t = 0; t < x.H; ++t) {
    const Index row = t * B + begin;           // in the caller's arrays
    const Index kept = sweep ? row : scratch;  // in the tape
    // value[t] = v(feat_t)
    if (x.value != nullptr) {
      const bool bootstraps = x.target == nullptr && t > 0;
      evaluate(k, tape.critic, t, begin, rows, thread, states(t, 0), ones(t), x.value + row,
               bootstraps ? unit(tape.value_unit, t - 1) : kNoRows, tape.wants.critic);
      if (bootstraps) std::copy_n(x.value + row, rows, x.next_value + row - B);
    }
    // r_t = reward(feat_t) or, below, reward(feat_{t+1})
    const auto pay = [&](Index state) {
      evaluate(k, tape.reward, state, begin, rows, thread, states(state, 0), ones(state),
               x.reward_out + row, unit(tape.reward_unit, t), tape.wants.reward);
    };
    if (x.reward != nullptr && x.departure) pay(t);
    // a_t from the actor or as given
    const Floats action = rows_of(x.action, A).at(row);
    if (x.actor != nullptr) {
      const Floats actor_raw = tape.actor_raw.at(kept);
      forward(k, x.actor->mlp, states(t, 0), rows, tape.actor, kept, actor_raw, kNoFloats, ones(t));
      act(k, *x.actor, A, rows, actor_raw, rows_of(x.action_noise, x.actor->noise(A)).at(row),
          states(t, F), action, tape.actor_slope.at(kept));
    } else {
      k.copy({action, nullptr, A, rows, states(t, F), kNoFloats, false});
    }
    // h_{t+1} = GRU(act(W [s_t, a_t]), h_t), s_{t+1} from the prior of it
    deter_step(k, rssm, states(t, 0), drawn(t), h(t), rows, tape.deter, kept, states(t + 1, 0),
               h(t + 1));
    forward(k, rssm.prior, states(t + 1, 0), rows, tape.prior, kept, raw);
    k.sample({S, rows, raw, rows_of(x.state_noise, rssm.noise()).at(row), rssm.latent,
              states(t + 1, D), rows_of(x.stoch, S).at(row), rows_of(x.prior_mean, S).at(row),
              rows_of(x.prior_std, S).at(row), sweep ? tape.slope.at(row) : kNoFloats,
              drawn(t + 1).data});
    if (x.reward != nullptr && !x.departure) pay(t + 1);
    if (x.discount != nullptr) {
      evaluate(k, tape.discount, t + 1, begin, rows, thread, states(t + 1, 0), ones(t + 1),
               x.discount_out + row, unit(tape.discount_unit, t), tape.wants.discount);
      k.discount({rows, x.gamma, x.hard_discount, x.discount_out + row,
                  tape.discount_slope.at(t, begin).data});
    }
    // and the bootstrap value there, if it is not the critic's own at the next turn
    const Head& bootstrap = x.target != nullptr ? tape.target : tape.critic;
    if (x.next_value != nullptr && (x.target != nullptr || x.value == nullptr || t == x.H - 1)) {
      evaluate(k, bootstrap, t + 1, begin, rows, thread, states(t + 1, 0), ones(t + 1),
               x.next_value + row, unit(tape.value_unit, t), false);
    }
  }
  if (x.returns != nullptr) {
    const auto matrix = [&](const float* data) { return Matrix<const float>{data, x.H, B}; };
    k.lambda_return_forward({matrix(x.reward_out),
                             matrix(x.next_value),
                             matrix(x.discount != nullptr ? x.discount_out : tape.gamma.data),
                             x.lam,
                             x.mix,
                             {x.returns, x.H, B}},
                            begin, begin + rows);
  }
}

// out = head(feat_t); with `unit` its gradient by feat_t, which with `deltas` leaves those of the
// layers on the tape.
void Imagine::evaluate(const Kernels& k, const Head& head, Index t, Index begin, Index rows,
                       int thread, Rows feat, const Ones& ones, float* out, Rows unit,
                       bool deltas) const {
  const ImagineArgs& x = tape_->args;
  const Index row = head.kept ? (t - head.first) * x.B + begin : thread * tile_;
  const Mlp& mlp = *head.mlp;
  const bool gradients = unit.data != nullptr || (deltas && head.kept);
  const Rows slope = gradients ? head.deltas.hidden[mlp.depth - 1].at(row) : kNoRows;
  read_forward(k, mlp, head.as, feat, rows, head.hidden, row, outputs_.at(thread * tile_), out,
               slope, ones);
  if (!gradients) return;
  backward(k, mlp, head.hidden, row, head.deltas, row, rows, kNoFloats, false, unit);
}

ImagineBackward::ImagineBackward(const ImagineTape& tape, const ImagineGrads& grads, Arena& scratch,
                                 int threads)
    : tape_(tape),
      grads_(grads),
      threads_(threads),
      weights_(*tape.args.kernels) {
  const ImagineArgs& x = tape.args;
  const Kernels& k = *x.kernels;
  const Rssm& rssm = *x.rssm;
  const Tiling tiling = tiling_for(k, x.B, threads);
  tile_ = tiling.size;
  const Index tiles = tiling.threads * tile_, all = x.H * x.B;
  const Index rows = tape.wants.rssm ? all : tiles;
  deter_ = take_deter_deltas(scratch, k, rssm, rows);
  prior_ = take_deltas(scratch, k, rssm.prior, rows);
  const bool through_feat = x.actor != nullptr && x.actor->through_feat;
  if (tape.wants.actor || through_feat) {
    actor_ = take_deltas(scratch, k, x.actor->mlp, tape.wants.actor ? all : tiles);
  }
  if (through_feat) d_feat_ = take_floats(scratch, tiles, rssm.feat());
  if (tape.wants.actor) {
    weights_.add(x.actor->mlp, tape.states.at(0), tape.actor, actor_, all, nullptr,
                 grads.actor.data(), grads.actor_rotate);
  }
  dh_ = take_floats(scratch, tiles, rssm.D);
  ds_ = take_floats(scratch, tiles, rssm.S);
  ds_da_ = take_floats(scratch, tiles, rssm.S + rssm.A);
  if (x.reward != nullptr) {
    d_reward_ = take_floats(scratch, x.H, x.B);
    d_value_ = take_floats(scratch, x.H, x.B);
    d_discount_ = take_floats(scratch, x.H, x.B);
    if (tape.wants.reward) {
      weights_.add(*x.reward, tape.states.at(x.departure ? 0 : x.B), tape.reward.hidden,
                   tape.reward.deltas, all, d_reward_.data, grads.reward_head.data(),
                   grads.reward_rotate);
    }
    if (tape.wants.discount) {
      weights_.add(*x.discount, tape.states.at(x.B), tape.discount.hidden, tape.discount.deltas,
                   all, d_discount_.data, grads.discount_head.data(), grads.discount_rotate);
    }
  }
  if (tape.wants.rssm) {
    add_deter_gradients(weights_, k, rssm, tape.states, tape.deter, deter_, all, grads.dynamics);
    weights_.add(rssm.prior, tape.states.at(x.B), tape.prior, prior_, all, nullptr,
                 grads.prior.data());
  }
  weights_.prepare(scratch, threads);
}

void ImagineBackward::run() const {
  parallel_tiles(tiling_for(*tape_.args.kernels, tape_.args.B, threads_),
                 [&](Index begin, Index rows, int thread) { tile(begin, rows, thread); });
  weights_.run();
}

void ImagineBackward::tile(Index begin, Index rows, int thread) const {
  const ImagineArgs& x = tape_.args;
  const ImagineGrads& g = grads_;
  const Task task(*x.kernels, x.B, rows);
  const Kernels& k = task.kernels;
  const Rssm& rssm = *x.rssm;
  const Index A = rssm.A, D = rssm.D, S = rssm.S, H = x.H, B = x.B;
  const Index scratch = thread * tile_;
  const Floats dh = dh_.at(scratch), ds = ds_.at(scratch), ds_da = ds_da_.at(scratch);
  const Floats ds_before{ds_da.data, S + A}, da{ds_da.data + S, S + A};

  const bool soft = tape_.discount_slope.data != nullptr;  // whether a discount has a gradient

  // What reaches every reward and bootstrap value, before the sweep: the λ-return is linear.
  if (x.reward != nullptr) {
    const auto in = [&](const float* data) { return Matrix<const float>{data, H, B}; };
    if (g.returns != nullptr) {
      k.lambda_return_backward({in(g.returns),
                                in(x.next_value),
                                in(x.discount != nullptr ? x.discount_out : tape_.gamma.data),
                                in(x.returns),
                                x.lam,
                                x.mix,
                                {d_reward_.data, H, B},
                                {d_value_.data, H, B},
                                {d_discount_.data, H, B}},
                               begin, begin + rows);
    } else {
      for (Index t = 0; t < H; ++t) {
        std::fill_n(d_reward_.data + t * B + begin, rows, 0.0f);
        std::fill_n(d_discount_.data + t * B + begin, rows, 0.0f);
      }
    }
    for (Index t = 0; t < H && g.reward != nullptr; ++t) {
      for (Index i = t * B + begin; i < t * B + begin + rows; ++i) d_reward_.data[i] += g.reward[i];
    }
    for (Index t = 0; t < H && g.discount != nullptr; ++t) {
      for (Index i = t * B + begin; i < t * B + begin + rows; ++i) {
        d_discount_.data[i] += g.discount[i];
      }
    }
    for (Index t = 0; t < H && soft; ++t) {  // of the logit from here on
      for (Index i = t * B + begin; i < t * B + begin + rows; ++i) {
        d_discount_.data[i] *= tape_.discount_slope.data[i];
      }
    }
  }

  const auto add_reward = [&](Index row) {
    k.add_scaled({tape_.reward_unit.at(row), d_reward_.data + row, D, rows, dh});
    k.add_scaled({tape_.reward_unit.at(row, D), d_reward_.data + row, S, rows, ds});
  };
  std::fill_n(dh.data, rows * D, 0.0f);
  std::fill_n(ds.data, rows * S, 0.0f);
  for (Index t = H - 1; t >= 0; --t) {
    const Index row = t * B + begin;
    const Index delta = tape_.wants.rssm ? row : scratch;
    // all that reaches state t + 1 from outside
    add_rows(k, rows_of(g.deter, D).at(row), D, rows, dh);
    add_rows(k, rows_of(g.stoch, S).at(row), S, rows, ds);
    if (x.reward != nullptr) {
      if (!x.departure) add_reward(row);
      if (g.returns != nullptr) {
        k.add_scaled({tape_.value_unit.at(row), d_value_.data + row, D, rows, dh});
        k.add_scaled({tape_.value_unit.at(row, D), d_value_.data + row, S, rows, ds});
      }
      if (soft) {
        k.add_scaled({tape_.discount_unit.at(row), d_discount_.data + row, D, rows, dh});
        k.add_scaled({tape_.discount_unit.at(row, D), d_discount_.data + row, S, rows, ds});
      }
    }
    // s_{t+1} ~ prior(h_{t+1})
    k.sample_backward({S, rows, rssm.latent, ds, rows_of(g.prior_mean, S).at(row),
                       rows_of(g.prior_std, S).at(row),
                       rows_of(x.state_noise, rssm.noise()).at(row), tape_.slope.at(row),
                       prior_.hidden[rssm.prior.depth - 1].at(delta)});
    backward(k, rssm.prior, tape_.prior, row, prior_, delta, rows, dh, true);
    // h_{t+1} = GRU(act(W [s_t, a_t]), h_t)
    deter_step_backward(k, rssm, tape_.states.at(row), tape_.deter, row, deter_, delta, rows, dh,
                        ds_da);
    k.copy({ds_before, nullptr, S, rows, kNoRows, ds, false});
    // a_t: unless the actor's input is detached, this comes back to the state
    const Floats own = rows_of(g.action, A).at(row);
    if (x.actor == nullptr) {
      add_rows(k, own, A, rows, da);
      if (g.given_action != nullptr) {
        k.copy({da, nullptr, A, rows, kNoRows, rows_of(g.given_action, A).at(row), false});
      }
    } else if (tape_.wants.actor || x.actor->through_feat) {
      const Index to = tape_.wants.actor ? row : scratch;
      const Floats d_feat = d_feat_.at(scratch);
      act_backward(k, *x.actor, A, rows, da, own, tape_.actor_raw.at(row),
                   rows_of(x.action_noise, x.actor->noise(A)).at(row), rows_of(x.action, A).at(row),
                   tape_.actor_slope.at(row), actor_.hidden[x.actor->mlp.depth - 1].at(to));
      backward(k, x.actor->mlp, tape_.actor, row, actor_, to, rows, d_feat, false);
      add_rows(k, d_feat, D, rows, dh);
      add_rows(k, d_feat_.at(scratch, D), S, rows, ds);
    }
    if (x.reward != nullptr && x.departure) add_reward(row);  // of state t
  }
  if (g.start_deter != nullptr) {
    k.copy({dh, nullptr, D, rows, kNoRows, rows_of(g.start_deter, D).at(begin), false});
  }
  if (g.start_stoch != nullptr) {
    k.copy({ds, nullptr, S, rows, kNoRows, rows_of(g.start_stoch, S).at(begin), false});
  }
}

CriticBackward::CriticBackward(const ImagineTape& tape, const float* value_grad,
                               const std::vector<LayerGrad>& grads, Index rotate, Arena& scratch,
                               int threads)
    : weights_(*tape.args.kernels) {
  weights_.add(*tape.args.critic, tape.states.at(0), tape.critic.hidden, tape.critic.deltas,
               tape.args.H * tape.args.B, value_grad, grads.data(), rotate);
  weights_.prepare(scratch, threads);
}

}  // namespace fastdreamer
