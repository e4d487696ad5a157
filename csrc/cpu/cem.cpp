#include "cpu/cem.h"

#include <algorithm>
#include <cmath>

#include "cpu/task.h"

namespace fastdreamer {
namespace {

// Calls body(first, count, b) on the parts of the rows [begin, begin + rows) that share their start
// state b; `first` counts from `begin`.
template <class Body>
void by_start(Index begin, Index rows, Index N, const Body& body) {
  for (Index first = 0; first < rows;) {
    const Index b = (begin + first) / N;
    const Index count = std::min(rows, (b + 1) * N - begin) - first;
    body(first, count, b);
    first += count;
  }
}

}  // namespace

Cem::Cem(const CemArgs& args, Arena& scratch, int threads) : args_(args), threads_(threads) {
  const Kernels& k = *args.kernels;
  const Rssm& rssm = *args.rssm;
  const Index all = args.B * args.N;
  const Tiling rolls = tiling(all);
  tile_ = rolls.size;
  head_tile_ = kernels_for(k, all).tile_rows;
  part_ = std::min(all, rolls.threads * tile_);
  const Index tiles = rolls.threads * tile_, head_tiles = usable_threads(threads) * head_tile_;
  states_ = take_rows(scratch, k, (args.H + 1) * part_, rssm.width());
  h_ = take_floats(scratch, 2 * tiles, rssm.D);
  deter_ = take_deter(scratch, k, rssm, tiles, false);
  prior_ = take_mlp(scratch, k, rssm.prior, tiles, false);
  raw_ = take_floats(scratch, tiles, 2 * rssm.S);
  reward_hidden_ = take_mlp(scratch, k, *args.reward, head_tiles, false);
  reward_ = take_floats(scratch, args.H, part_);
  if (args.bootstrap != nullptr) {
    bootstrap_hidden_ = take_mlp(scratch, k, *args.bootstrap, head_tiles, false);
    value_ = take_floats(scratch, args.H, part_);
    returns_ = take_floats(scratch, args.H, part_);
    discount_ = take_floats(scratch, args.H, part_);
    if (args.discount != nullptr) {
      discount_hidden_ = take_mlp(scratch, k, *args.discount, head_tiles, false);
    } else {
      std::fill_n(discount_.data, args.H * part_, args.gamma);
    }
  }
  const Index fits = std::min<Index>(args.B, threads);
  elites_ = take_floats(scratch, fits * args.K, rssm.A);
  order_ = scratch.take<Index>(fits * args.N);
  if (args.P > 0) {
    zero_ = scratch.take<float>(rssm.A);
    one_ = scratch.take<float>(rssm.A);
    std::fill_n(zero_, rssm.A, 0.0f);
    std::fill_n(one_, rssm.A, 1.0f);
  }
}

// Of rows of a part, or of as many rows for each of its states.
Tiling Cem::tiling(Index rows) const {
  const Kernels& k = kernels_for(*args_.kernels, args_.B * args_.N);
  return Tiling(rows, k.tile_rows, threads_, k.tile_unit);
}

void Cem::run() const {
  const Index all = args_.B * args_.N;
  for (Index i = 0; i < args_.I; ++i) {
    for (Index begin = 0; begin < all; begin += part_) {
      const Part part{i, begin, std::min(part_, all - begin)};
      parallel_tiles(tiling(part.rows),
                     [&](Index first, Index rows, int thread) { roll(part, first, rows, thread); });
      const Tiling heads = tiling(args_.H * part.rows);
      parallel_tasks(heads.count, threads_, [&](Index tile, int thread) {
        const Index first = tile * heads.size;
        evaluate(part, first, std::min(heads.size, heads.rows - first), thread);
      });
      score(part);
    }
    parallel_tasks(args_.B, threads_, [&](Index b, int thread) { refit(i, b, thread); });
  }
}

// The actions at t of the candidates [n, n + count) of start state b in iteration i, into rows of
// states from `row` on, and into plain ones.
void Cem::candidates(Index i, Index t, Index b, Index n, Index count, const Buffer& packed,
                     Index row, const FloatBuffer& plain) const {
  const CemArgs& x = args_;
  const Rssm& rssm = *x.rssm;
  const Index A = rssm.A, place = t * x.B + b;
  const Index given = std::clamp<Index>(x.P - n, 0, count);
  if (given > 0) {  // a proposal is the noise of a standard Normal: 0 + 1 · a = a
    const float* actions = x.proposals + (place * x.P + n) * A;
    x.kernels->perturb({A, given, zero_, one_, rows_of(actions, A).at(0), x.clip,
                        packed.at(row, rssm.D + rssm.S), plain.at(0)});
  }
  if (given < count) {
    const float* noise = x.action_noise + ((i * x.H * x.B + place) * x.N + n + given) * A;
    x.kernels->perturb({A, count - given, x.mean + place * A, x.std + place * A,
                        rows_of(noise, A).at(0), x.clip, packed.at(row + given, rssm.D + rssm.S),
                        plain.at(given)});
  }
}

// The states 0..H of some rows of a part.
void Cem::roll(const Part& part, Index first, Index rows, int thread) const {
  const CemArgs& x = args_;
  const Task task(*x.kernels, x.B * x.N, rows);
  const Kernels& k = task.kernels;
  const Rssm& rssm = *x.rssm;
  const Index D = rssm.D, S = rssm.S, B = x.B, N = x.N;
  const Index scratch = thread * tile_, begin = part.begin + first;
  const auto states = [&](Index t, Index col) { return states_.at(t * part.rows + first, col); };
  const auto h = [&](Index t) { return h_.at((2 * thread + t % 2) * tile_); };

  by_start(begin, rows, N, [&](Index row, Index count, Index b) {
    // one row for all of them
    const Floats deter{rows_of(x.start_deter, D).at(b).data, 0};
    const Floats stoch{rows_of(x.start_stoch, S).at(b).data, 0};
    const Floats h32 = h_.at(2 * scratch + row);
    k.copy({deter, nullptr, D, count, states_.at(first + row), h32, false});
    k.copy({stoch, nullptr, S, count, states_.at(first + row, D), kNoFloats, false});
  });
  for (Index t = 0; t < x.H; ++t) {
    by_start(begin, rows, N, [&](Index row, Index count, Index b) {
      candidates(part.i, t, b, begin + row - b * N, count, states_, t * part.rows + first + row,
                 {});
    });
    deter_step(k, rssm, states(t, 0), h(t), rows, deter_, scratch, states(t + 1, 0), h(t + 1));
    forward(k, rssm.prior, states(t + 1, 0), rows, prior_, scratch, raw_.at(scratch));
    const Floats noise = rows_of(x.state_noise, S).at((part.i * x.H + t) * B * N + begin);
    k.sample({S, rows, raw_.at(scratch), noise, rssm.std, states(t + 1, D), kNoFloats, kNoFloats,
              kNoFloats, kNoFloats});
  }
}

// The heads in some of a part's states 1..H, which are rows one behind the other.
void Cem::evaluate(const Part& part, Index first, Index rows, int thread) const {
  const CemArgs& x = args_;
  const Task task(*x.kernels, x.B * x.N, rows);
  const Kernels& k = task.kernels;
  const Rows feat = states_.at(part.rows + first);
  const Index scratch = thread * head_tile_;
  forward(k, *x.reward, feat, rows, reward_hidden_, scratch, {reward_.data + first, 1});
  if (x.bootstrap != nullptr) {
    forward(k, *x.bootstrap, feat, rows, bootstrap_hidden_, scratch, {value_.data + first, 1});
  }
  if (x.discount != nullptr) {
    forward(k, *x.discount, feat, rows, discount_hidden_, scratch, {discount_.data + first, 1});
    k.discount({rows, x.gamma, discount_.data + first, nullptr});
  }
}

void Cem::score(const Part& part) const {
  const CemArgs& x = args_;
  const Index H = x.H, rows = part.rows;
  const float* reward = reward_.data;
  float* scores = x.scores + part.i * x.B * x.N + part.begin;
  if (x.bootstrap == nullptr) {
    std::copy_n(reward, rows, scores);
    for (Index t = 1; t < H; ++t) {
      for (Index r = 0; r < rows; ++r) scores[r] += reward[t * rows + r];
    }
  } else {
    x.kernels->lambda_return_forward({{reward, H, rows},
                                      {value_.data, H, rows},
                                      {discount_.data, H, rows},
                                      x.lam,
                                      x.mix,
                                      {returns_.data, H, rows}},
                                     0, rows);
    std::copy_n(returns_.data, rows, scores);  // G_0
  }
}

// mean and std of the elites of start state b in iteration i.
void Cem::refit(Index i, Index b, int thread) const {
  const CemArgs& x = args_;
  const Index A = x.rssm->A, B = x.B, N = x.N, H = x.H;
  const float* scores = x.scores + (i * B + b) * N;
  Index* order = order_ + thread * N;
  for (Index n = 0; n < N; ++n) order[n] = n;
  // highest first, NaN last, and the lower n first among equals
  std::partial_sort(order, order + x.K, order + N, [&](Index m, Index n) {
    const float p = scores[m], q = scores[n];
    if (std::isnan(p) != std::isnan(q)) return std::isnan(q);
    return p > q || (!(p < q) && m < n);
  });
  Index count = 0;
  while (count < x.K && !std::isnan(scores[order[count]])) ++count;

  const FloatBuffer elites{elites_.at(thread * x.K).data, A};
  for (Index t = 0; t < H; ++t) {
    float *mean = x.mean + (t * B + b) * A, *std = x.std + (t * B + b) * A;
    // again, as they were never stored
    for (Index e = 0; e < count; ++e) {
      candidates(i, t, b, order[e], 1, {}, 0, {elites.at(e).data, A});
    }
    // in double, where K equal floats have exactly their own mean; of nothing, 0 / 0 is NaN
    for (Index a = 0; a < A; ++a) {
      double sum = 0, squares = 0;
      for (Index e = 0; e < count; ++e) sum += elites.data[e * A + a];
      const double center = sum / static_cast<double>(count);
      for (Index e = 0; e < count; ++e) {
        const double d = elites.data[e * A + a] - center;
        squares += d * d;
      }
      const float fitted = static_cast<float>(std::sqrt(squares / static_cast<double>(count)));
      mean[a] = static_cast<float>(center);
      std[a] = fitted < x.min_std ? x.min_std : fitted;  // NaN stays
    }
  }
}

}  // namespace fastdreamer
