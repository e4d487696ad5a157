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
  const Tiling tiling = tiling_for(k, args.B * args.N, threads);
  tile_ = tiling.size;
  const Index rows = tiling.threads * tile_;
  states_ = take_rows(scratch, k, 2 * rows, rssm.width());
  h_ = take_floats(scratch, 2 * rows, rssm.D);
  deter_ = take_deter(scratch, k, rssm, rows, false);
  prior_ = take_mlp(scratch, k, rssm.prior, rows, false);
  raw_ = take_floats(scratch, rows, 2 * rssm.S);
  reward_hidden_ = take_mlp(scratch, k, *args.reward, rows, false);
  reward_ = take_floats(scratch, tiling.threads, args.H * tile_);
  if (args.bootstrap != nullptr) {
    bootstrap_hidden_ = take_mlp(scratch, k, *args.bootstrap, rows, false);
    value_ = take_floats(scratch, tiling.threads, args.H * tile_);
    returns_ = take_floats(scratch, tiling.threads, args.H * tile_);
    if (args.discount != nullptr) {
      discount_hidden_ = take_mlp(scratch, k, *args.discount, rows, false);
      discount_ = take_floats(scratch, tiling.threads, args.H * tile_);
    } else {
      discount_ = take_floats(scratch, 1, args.H * tile_);
      std::fill_n(discount_.data, args.H * tile_, args.gamma);
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

void Cem::run() const {
  const Tiling tiling = tiling_for(*args_.kernels, args_.B * args_.N, threads_);
  for (Index i = 0; i < args_.I; ++i) {
    parallel_tiles(tiling,
                   [&](Index begin, Index rows, int thread) { tile(i, begin, rows, thread); });
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

// The scores of some rows in iteration i.
void Cem::tile(Index i, Index begin, Index rows, int thread) const {
  const CemArgs& x = args_;
  const Task task(*x.kernels, x.B * x.N, rows);
  const Kernels& k = task.kernels;
  const Rssm& rssm = *x.rssm;
  const Index D = rssm.D, S = rssm.S, B = x.B, N = x.N, H = x.H;
  const Index scratch = thread * tile_;
  const auto turn = [&](Index t) { return (2 * thread + t % 2) * tile_; };
  const auto states = [&](Index t, Index col) { return states_.at(turn(t), col); };
  float *reward = reward_.at(thread).data, *value = value_.at(thread).data,
        *discount = discount_.at(x.discount != nullptr ? thread : 0).data;

  by_start(begin, rows, N, [&](Index first, Index count, Index b) {
    // one row for all of them
    const Floats deter{rows_of(x.start_deter, D).at(b).data, 0};
    const Floats stoch{rows_of(x.start_stoch, S).at(b).data, 0};
    k.copy({deter, nullptr, D, count, states_.at(turn(0) + first), h_.at(turn(0) + first), false});
    k.copy({stoch, nullptr, S, count, states_.at(turn(0) + first, D), kNoFloats, false});
  });
  for (Index t = 0; t < H; ++t) {
    const Index row = (i * H + t) * B * N + begin;  // in the noise
    by_start(begin, rows, N, [&](Index first, Index count, Index b) {
      candidates(i, t, b, begin + first - b * N, count, states_, turn(t) + first, {});
    });
    deter_step(k, rssm, states(t, 0), h_.at(turn(t)), rows, deter_, scratch, states(t + 1, 0),
               h_.at(turn(t + 1)));
    forward(k, rssm.prior, states(t + 1, 0), rows, prior_, scratch, raw_.at(scratch));
    k.sample({S, rows, raw_.at(scratch), rows_of(x.state_noise, S).at(row), rssm.std,
              states(t + 1, D), kNoFloats, kNoFloats, kNoFloats, kNoFloats});
    forward(k, *x.reward, states(t + 1, 0), rows, reward_hidden_, scratch, {reward + t * rows, 1});
    if (x.bootstrap != nullptr) {
      forward(k, *x.bootstrap, states(t + 1, 0), rows, bootstrap_hidden_, scratch,
              {value + t * rows, 1});
    }
    if (x.discount != nullptr) {
      forward(k, *x.discount, states(t + 1, 0), rows, discount_hidden_, scratch,
              {discount + t * rows, 1});
      k.discount({rows, x.gamma, discount + t * rows, nullptr});
    }
  }

  float* scores = x.scores + i * B * N + begin;
  if (x.bootstrap == nullptr) {
    std::copy_n(reward, rows, scores);
    for (Index t = 1; t < H; ++t) {
      for (Index r = 0; r < rows; ++r) scores[r] += reward[t * rows + r];
    }
  } else {
    float* returns = returns_.at(thread).data;
    k.lambda_return_forward({{reward, H, rows},
                             {value, H, rows},
                             {discount, H, rows},
                             x.lam,
                             x.mix,
                             {returns, H, rows}},
                            0, rows);
    std::copy_n(returns, rows, scores);  // G_0
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
