#include "cpu/observe.h"

#include <algorithm>

#include "cpu/task.h"

namespace fastdreamer {
namespace {

// Where an episode begins, nothing was drawn but what it begins with.
void forget(const Drawn& drawn, const unsigned char* first, const std::int32_t* begin, Index rows) {
  for (Index r = 0; drawn.data != nullptr && first != nullptr && r < rows; ++r) {
    if (first[r] == 0) continue;
    if (begin != nullptr) {
      std::copy_n(begin, drawn.count, drawn.at(r).data);
    } else {
      std::fill_n(drawn.at(r).data, drawn.count, Ones::none);
    }
  }
}

// Keeps the rows of a gradient where an episode begins.
void keep(Floats grad, const unsigned char* first, Index cols, Index rows, Floats to) {
  for (Index r = 0; to.data != nullptr && first != nullptr && r < rows; ++r) {
    if (first[r] != 0) std::copy_n(grad.data + r * grad.stride, cols, to.data + r * to.stride);
  }
}

// to = the sum of those rows.
void add_kept(const FloatBuffer& kept, const unsigned char* first, Index cols, Index rows,
              float* to) {
  if (to == nullptr) return;
  std::fill_n(to, cols, 0.0f);
  for (Index r = 0; first != nullptr && r < rows; ++r) {
    if (first[r] == 0) continue;
    const float* from = kept.at(r).data;
    for (Index c = 0; c < cols; ++c) to[c] += from[c];
  }
}

}  // namespace

Observe::Observe(const ObserveArgs& args, ObserveTape* tape, Arena& scratch, int threads)
    : tape_(tape != nullptr ? tape : &own_),
      taped_(tape != nullptr),
      threads_(threads) {
  const Kernels& k = *args.kernels;
  const Rssm& rssm = *args.rssm;
  const Index all = args.T * args.B, E = args.embed->in;
  const Tiling by_batch = tiling_for(k, args.B, threads), by_row = tiling_for(k, all, threads);
  scan_tile_ = by_batch.size;
  batch_tile_ = by_row.size;
  const Index tiles = by_batch.threads * scan_tile_;
  const Index rows = taped_ ? all : tiles;
  Arena& arena = taped_ ? tape->arena : scratch;
  ObserveTape& t = *tape_;
  t.args = args;
  if (args.embed_elem != nullptr) {
    t.embed = {static_cast<char*>(const_cast<void*>(args.embed_elem)), E, k.elem_size};
  } else {
    t.embed = take_rows(arena, k, all, E);
  }
  t.used = take_rows(arena, k, rows, rssm.width());
  t.h = take_rows(arena, k, all, rssm.D);
  t.deter = take_deter(arena, k, rssm, rows, taped_);
  t.post = take_mlp(arena, k, *args.post, rows, taped_);
  t.prior = take_mlp(arena, k, rssm.prior, taped_ ? all : by_row.threads * batch_tile_, taped_);
  if (taped_) {
    t.post_slope = take_floats(arena, all, rssm.latent.slopes(rssm.S));
    if (rssm.latent.classes == 0) t.prior_slope = take_floats(arena, all, rssm.S);
  }
  projected_ = take_floats(scratch, all, args.embed->out);
  raw_ = take_floats(scratch, std::max(tiles, by_row.threads * batch_tile_), rssm.raw());
  h32_ = take_floats(scratch, tiles, rssm.D);
  drawn_ = take_drawn(scratch, rssm, tiles);
}

void Observe::run() const {
  const ObserveArgs& x = tape_->args;
  const Tiling by_row = tiling_for(*x.kernels, x.T * x.B, threads_);
  parallel_tiles(by_row, [&](Index begin, Index rows, int) { embed(begin, rows); });
  parallel_tiles(tiling_for(*x.kernels, x.B, threads_),
                 [&](Index begin, Index rows, int thread) { scan(begin, rows, thread); });
  parallel_tiles(by_row, [&](Index begin, Index rows, int thread) { prior(begin, rows, thread); });
}

// The embedding's part of the posterior's first layer, for rows of all steps.
void Observe::embed(Index begin, Index rows) const {
  const ObserveTape& tape = *tape_;
  const ObserveArgs& x = tape.args;
  const Task task(*x.kernels, x.T * x.B, rows);
  const Kernels& k = task.kernels;
  const Index E = x.embed->in;
  if (x.embed_elem == nullptr) {
    k.copy({rows_of(x.embed32, E).at(begin), nullptr, E, rows, tape.embed.at(begin), kNoFloats,
            false});
  }
  k.linear({x.embed->forward, tape.embed.at(begin), rows, x.embed->bias, kNoFloats,
            Activation::none, kNoRows, kNoRows, projected_.at(begin), kNoRows});
}

void Observe::scan(Index begin, Index rows, int thread) const {
  const ObserveTape& tape = *tape_;
  const ObserveArgs& x = tape.args;
  const Task task(*x.kernels, x.B, rows);
  const Kernels& k = task.kernels;
  const Rssm& rssm = *x.rssm;
  const Index A = rssm.A, D = rssm.D, S = rssm.S, B = x.B;
  const Floats raw = raw_.at(thread * scan_tile_), h32 = h32_.at(thread * scan_tile_);
  const Drawn drawn = drawn_.at(thread * scan_tile_);
  for (Index t = 0; t < x.T; ++t) {
    const Index row = t * B + begin, kept = taped_ ? row : thread * scan_tile_;
    const auto first = [&](const unsigned char* all) { return all == nullptr ? all : all + row; };
    const Floats h = t == 0 ? rows_of(x.start_deter, D).at(begin) : rows_of(x.deter, D).at(row - B);
    const Floats s = t == 0 ? rows_of(x.start_stoch, S).at(begin) : rows_of(x.stoch, S).at(row - B);
    k.copy({h, first(x.first_deter), D, rows, tape.used.at(kept), h32, false, x.begin_deter});
    k.copy(
        {s, first(x.first_stoch), S, rows, tape.used.at(kept, D), kNoFloats, false, x.begin_stoch});
    k.copy({rows_of(x.action, A).at(row), first(x.first_action), A, rows, tape.used.at(kept, D + S),
            kNoFloats, false});
    forget(drawn, first(x.first_stoch), x.begin_drawn, rows);
    // h' = GRU(act(W [s, a]), h); s' from the posterior of [h', embedding]
    deter_step(k, rssm, tape.used.at(kept), t == 0 ? Drawn{} : drawn, h32, rows, tape.deter, kept,
               tape.h.at(row), rows_of(x.deter, D).at(row));
    forward(k, *x.post, tape.h.at(row), rows, tape.post, kept, raw, projected_.at(row));
    k.sample({S, rows, raw, rows_of(x.noise, rssm.noise()).at(row), rssm.latent, kNoRows,
              rows_of(x.stoch, S).at(row), rows_of(x.post_mean, S).at(row),
              rows_of(x.post_std, S).at(row), tape.post_slope.at(row), drawn.data});
  }
}

void Observe::prior(Index begin, Index rows, int thread) const {
  const ObserveTape& tape = *tape_;
  const ObserveArgs& x = tape.args;
  const Task task(*x.kernels, x.T * x.B, rows);
  const Kernels& k = task.kernels;
  const Rssm& rssm = *x.rssm;
  const Index S = rssm.S;
  const Floats raw = raw_.at(thread * batch_tile_);
  forward(k, rssm.prior, tape.h.at(begin), rows, tape.prior, taped_ ? begin : thread * batch_tile_,
          raw);
  k.sample({S, rows, raw, kNoFloats, rssm.latent, kNoRows, kNoFloats,
            rows_of(x.prior_mean, S).at(begin), rows_of(x.prior_std, S).at(begin),
            tape.prior_slope.at(begin)});
}

ObserveBackward::ObserveBackward(const ObserveTape& tape, const ObserveGrads& grads, Arena& scratch,
                                 int threads)
    : tape_(tape),
      grads_(grads),
      threads_(threads),
      weights_(*tape.args.kernels) {
  const ObserveArgs& x = tape.args;
  const Kernels& k = *x.kernels;
  const Rssm& rssm = *x.rssm;
  const Index all = x.T * x.B;
  const Tiling tiling = tiling_for(k, x.B, threads);
  scan_tile_ = tiling.size;
  const Index tiles = tiling.threads * scan_tile_;
  deter_ = take_deter_deltas(scratch, k, rssm, all);
  post_deltas_ = take_deltas(scratch, k, *x.post, all);
  prior_deltas_ = take_deltas(scratch, k, rssm.prior, all);
  if (grads.prior_mean != nullptr || grads.prior_std != nullptr) {
    prior_dh_ = take_floats(scratch, all, rssm.D);
  }
  dh_ = take_floats(scratch, tiles, rssm.D);
  ds_ = take_floats(scratch, tiles, rssm.S);
  ds_da_ = take_floats(scratch, tiles, rssm.S + rssm.A);
  if (grads.begin_deter != nullptr) begin_dh_ = take_floats(scratch, all, rssm.D);
  if (grads.begin_stoch != nullptr) begin_ds_ = take_floats(scratch, all, rssm.S);
  if (!grads.parameters) return;
  add_deter_gradients(weights_, k, rssm, tape.used, tape.deter, deter_, all, grads.dynamics);
  weights_.add(*x.post, tape.h.at(0), tape.post, post_deltas_, all, nullptr, grads.post.data());
  weights_.add(tape.embed.at(0), x.embed->in, post_deltas_.hidden[0].at(0), x.embed->out, all,
               nullptr, grads.embed_weight);
  if (prior_dh_.data != nullptr) {
    weights_.add(rssm.prior, tape.h.at(0), tape.prior, prior_deltas_, all, nullptr,
                 grads.prior.data());
  }
  weights_.prepare(scratch, threads);
}

void ObserveBackward::run() const {
  const ObserveArgs& x = tape_.args;
  const Tiling by_row = tiling_for(*x.kernels, x.T * x.B, threads_);
  if (prior_dh_.data != nullptr) {
    parallel_tiles(by_row, [&](Index begin, Index rows, int) { prior(begin, rows); });
  }
  parallel_tiles(tiling_for(*x.kernels, x.B, threads_),
                 [&](Index begin, Index rows, int thread) { scan(begin, rows, thread); });
  if (grads_.embed != nullptr) {
    parallel_tiles(by_row, [&](Index begin, Index rows, int) { embed(begin, rows); });
  }
  begin();
  weights_.run();
}

void ObserveBackward::begin() const {
  const ObserveArgs& x = tape_.args;
  const Index all = x.T * x.B;
  add_kept(begin_dh_, x.first_deter, x.rssm->D, all, grads_.begin_deter);
  add_kept(begin_ds_, x.first_stoch, x.rssm->S, all, grads_.begin_stoch);
}

void ObserveBackward::prior(Index begin, Index rows) const {
  const ObserveArgs& x = tape_.args;
  const Task task(*x.kernels, x.T * x.B, rows);
  const Kernels& k = task.kernels;
  const Rssm& rssm = *x.rssm;
  const Index S = rssm.S;
  k.sample_backward({S, rows, rssm.latent, kNoFloats, rows_of(grads_.prior_mean, S).at(begin),
                     rows_of(grads_.prior_std, S).at(begin), kNoFloats, tape_.prior_slope.at(begin),
                     prior_deltas_.hidden[rssm.prior.depth - 1].at(begin)});
  backward(k, rssm.prior, tape_.prior, begin, prior_deltas_, begin, rows, prior_dh_.at(begin),
           false);
}

void ObserveBackward::scan(Index begin, Index rows, int thread) const {
  const ObserveArgs& x = tape_.args;
  const ObserveGrads& g = grads_;
  const Task task(*x.kernels, x.B, rows);
  const Kernels& k = task.kernels;
  const Rssm& rssm = *x.rssm;
  const Index A = rssm.A, D = rssm.D, S = rssm.S, B = x.B;
  const Index scratch = thread * scan_tile_;
  const Floats dh = dh_.at(scratch), ds = ds_.at(scratch), ds_da = ds_da_.at(scratch);
  const Floats ds_before{ds_da.data, S + A}, da{ds_da.data + S, S + A};
  std::fill_n(dh.data, rows * D, 0.0f);
  std::fill_n(ds.data, rows * S, 0.0f);
  for (Index t = x.T - 1; t >= 0; --t) {
    const Index row = t * B + begin;
    const auto first = [&](const unsigned char* all) { return all == nullptr ? all : all + row; };
    add_rows(k, rows_of(g.deter, D).at(row), D, rows, dh);
    add_rows(k, rows_of(prior_dh_.data, D).at(row), D, rows, dh);
    add_rows(k, rows_of(g.stoch, S).at(row), S, rows, ds);
    k.sample_backward({S, rows, rssm.latent, ds, rows_of(g.post_mean, S).at(row),
                       rows_of(g.post_std, S).at(row), rows_of(x.noise, rssm.noise()).at(row),
                       tape_.post_slope.at(row), post_deltas_.hidden[x.post->depth - 1].at(row)});
    backward(k, *x.post, tape_.post, row, post_deltas_, row, rows, dh, true);
    deter_step_backward(k, rssm, tape_.used.at(row), tape_.deter, row, deter_, row, rows, dh,
                        ds_da);
    keep(dh, first(x.first_deter), D, rows, begin_dh_.at(row));
    keep(ds_before, first(x.first_stoch), S, rows, begin_ds_.at(row));
    // nothing reaches what was forgotten
    k.copy({dh, first(x.first_deter), D, rows, kNoRows, dh, false});
    k.copy({ds_before, first(x.first_stoch), S, rows, kNoRows, ds, false});
    if (g.action != nullptr) {
      k.copy({da, first(x.first_action), A, rows, kNoRows, rows_of(g.action, A).at(row), false});
    }
  }
  if (g.start_deter != nullptr) {
    k.copy({dh, nullptr, D, rows, kNoRows, rows_of(g.start_deter, D).at(begin), false});
  }
  if (g.start_stoch != nullptr) {
    k.copy({ds, nullptr, S, rows, kNoRows, rows_of(g.start_stoch, S).at(begin), false});
  }
}

void ObserveBackward::embed(Index begin, Index rows) const {
  const ObserveArgs& x = tape_.args;
  const Task task(*x.kernels, x.T * x.B, rows);
  task.kernels.linear({x.embed->backward, post_deltas_.hidden[0].at(begin), rows, nullptr,
                       kNoFloats, Activation::none, kNoRows, kNoRows,
                       rows_of(grads_.embed, x.embed->in).at(begin), kNoRows});
}

}  // namespace fastdreamer
