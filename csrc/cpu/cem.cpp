#include "cpu/cem.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>

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

// Waits for what other threads are at work on to be counted.
void await(const std::atomic<Index>& count, Index least) {
  constexpr int kSpins = 1000;
  for (int spins = 0; count.load(std::memory_order_acquire) < least; ++spins) {
    if (spins >= kSpins) std::this_thread::yield();  // the core may be wanted for it
  }
}

}  // namespace

// What the threads have done so far, in all iterations; by tile where there is an array.
struct Cem::Progress {
  explicit Progress(std::size_t tiles) : rolled(tiles), evaluated(tiles), scored(tiles) {}

  std::atomic<Index> taken{0}, scores{0}, refits{0};  // jobs; tiles; start states
  std::vector<std::atomic<Index>> rolled, evaluated, scored;
};

Cem::Cem(const CemArgs& args, Arena& scratch, int threads) : args_(args) {
  const Kernels& k = kernels_for(*args.kernels, args.B * args.N);
  const Rssm& rssm = *args.rssm;
  const Tiling tiling = tiling_for(k, args.B * args.N, threads);
  tile_ = tiling.size;
  head_tile_ = k.tile_rows;
  threads_ = usable_threads(threads);
  slots_ = std::min<Index>(tiling.count, threads_);
  for (Index begin = 0; begin < tiling.rows; begin += tile_) {
    const Index index = begin / tile_, rows = std::min(tile_, tiling.rows - begin);
    const Tiling heads(args.H * rows, k.tile_rows, 1, k.tile_unit);
    tiles_.push_back({begin, rows, index % slots_, heads.size, heads.count});
  }
  const Index tiles = tiling.count;
  for (Index group = 0; group < tiles; group += slots_) {
    const Index end = std::min(tiles, group + slots_);
    for (Index tile = group; tile < end; ++tile) jobs_.push_back({Job::roll, tile, 0});
    for (Index tile = group; tile < end; ++tile) {
      for (Index part = 0; part < tiles_[static_cast<std::size_t>(tile)].head_tiles; ++part) {
        jobs_.push_back({Job::evaluate, tile, part});
      }
    }
  }
  for (Index b = 0; b < args.B; ++b) jobs_.push_back({Job::refit, b, 0});

  const Index rows = threads_ * tile_, head_rows = threads_ * head_tile_;
  states_ = take_rows(scratch, k, slots_ * (args.H + 1) * tile_, rssm.width());
  drawn_ = take_drawn(scratch, rssm, slots_ * (args.H + 1) * tile_);
  h_ = take_floats(scratch, 2 * rows, rssm.D);
  deter_ = take_deter(scratch, k, rssm, rows, false);
  prior_ = take_mlp(scratch, k, rssm.prior, rows, false);
  raw_ = take_floats(scratch, rows, rssm.raw());
  reward_hidden_ = take_mlp(scratch, k, *args.reward, head_rows, false);
  reward_ = take_floats(scratch, slots_, args.H * tile_);
  if (args.bootstrap != nullptr) {
    bootstrap_hidden_ = take_mlp(scratch, k, *args.bootstrap, head_rows, false);
    value_ = take_floats(scratch, slots_, args.H * tile_);
    returns_ = take_floats(scratch, slots_, args.H * tile_);
    discount_ = take_floats(scratch, slots_, args.H * tile_);
    if (args.discount != nullptr) {
      discount_hidden_ = take_mlp(scratch, k, *args.discount, head_rows, false);
    } else {
      std::fill_n(discount_.data, slots_ * args.H * tile_, args.gamma);
    }
  }
  Index outputs = 1;
  for (const Mlp* head : {args.reward, args.bootstrap, args.discount}) {
    if (head != nullptr) outputs = std::max(outputs, head->out());
  }
  if (outputs > 1) outputs_ = take_floats(scratch, head_rows, outputs);
  elites_ = take_floats(scratch, threads_ * args.K, rssm.A);
  order_ = scratch.take<Index>(threads_ * args.N);
  if (args.P > 0) {
    zero_ = scratch.take<float>(rssm.A);
    one_ = scratch.take<float>(rssm.A);
    std::fill_n(zero_, rssm.A, 0.0f);
    std::fill_n(one_, rssm.A, 1.0f);
  }
}

void Cem::run() const {
  Progress progress(tiles_.size());
  parallel_tasks(threads_, threads_, [&](Index, int thread) { work(progress, thread); });
}

// Takes jobs in their order, in which each comes after all that it waits for: of those that are
// taken the first is never waiting, whatever the number of threads.
void Cem::work(Progress& done, int thread) const {
  const Index jobs = static_cast<Index>(jobs_.size()), tiles = static_cast<Index>(tiles_.size());
  for (Index n = done.taken++; n < args_.I * jobs; n = done.taken++) {
    const Index i = n / jobs;  // the iteration; counts of the ones before are complete
    const Job& job = jobs_[static_cast<std::size_t>(n % jobs)];
    const auto index = static_cast<std::size_t>(job.index);
    switch (job.kind) {
      case Job::roll:
        if (job.index < slots_) {
          await(done.refits, i * args_.B);
        } else {  // for the tile that was in its place
          await(done.scored[index - static_cast<std::size_t>(slots_)], i + 1);
        }
        roll(i, tiles_[index], thread);
        done.rolled[index].store(i + 1, std::memory_order_release);
        break;
      case Job::evaluate: {
        const Tile& tile = tiles_[index];
        await(done.rolled[index], i + 1);
        evaluate(tile, job.part, thread);
        if (++done.evaluated[index] == (i + 1) * tile.head_tiles) {
          score(i, tile);
          done.scored[index].store(i + 1, std::memory_order_release);
          ++done.scores;
        }
        break;
      }
      case Job::refit:
        await(done.scores, (i + 1) * tiles);
        refit(i, job.index, thread);
        ++done.refits;
        break;
    }
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
    x.kernels->perturb({A, given, zero_, one_, rows_of(actions, A).at(0), x.clip, x.bound_action,
                        packed.at(row, rssm.D + rssm.S), plain.at(0)});
  }
  if (given < count) {
    const float* noise = x.action_noise + ((i * x.H * x.B + place) * x.N + n + given) * A;
    x.kernels->perturb({A, count - given, x.mean + place * A, x.std + place * A,
                        rows_of(noise, A).at(0), x.clip, x.bound_action,
                        packed.at(row + given, rssm.D + rssm.S), plain.at(given)});
  }
}

// The states 0..H of a tile.
void Cem::roll(Index i, const Tile& tile, int thread) const {
  const CemArgs& x = args_;
  const Index rows = tile.rows;
  const Task task(*x.kernels, x.B * x.N, rows);
  const Kernels& k = task.kernels;
  const Rssm& rssm = *x.rssm;
  const Index D = rssm.D, S = rssm.S, B = x.B, N = x.N, H = x.H;
  const Index scratch = thread * tile_;
  const auto turn = [&](Index t) { return (2 * thread + t % 2) * tile_; };
  const auto place = [&](Index t) { return tile.slot * (H + 1) * tile_ + t * rows; };
  const auto states = [&](Index t, Index col) { return states_.at(place(t), col); };

  by_start(tile.begin, rows, N, [&](Index first, Index count, Index b) {
    // one row for all of them
    const Floats deter{rows_of(x.start_deter, D).at(b).data, 0};
    const Floats stoch{rows_of(x.start_stoch, S).at(b).data, 0};
    const Index row = place(0) + first;
    k.copy({deter, nullptr, D, count, states_.at(row), h_.at(turn(0) + first), false});
    k.copy({stoch, nullptr, S, count, states_.at(row, D), kNoFloats, false});
  });
  for (Index t = 0; t < H; ++t) {
    by_start(tile.begin, rows, N, [&](Index first, Index count, Index b) {
      candidates(i, t, b, tile.begin + first - b * N, count, states_, place(t) + first, {});
    });
    const Drawn drawn = t == 0 ? Drawn{} : drawn_.at(place(t));  // the start is anybody's
    deter_step(k, rssm, states(t, 0), drawn, h_.at(turn(t)), rows, deter_, scratch,
               states(t + 1, 0), h_.at(turn(t + 1)));
    forward(k, rssm.prior, states(t + 1, 0), rows, prior_, scratch, raw_.at(scratch));
    const Index row = (i * H + t) * B * N + tile.begin;  // in the noise
    k.sample({S, rows, raw_.at(scratch), rows_of(x.state_noise, rssm.noise()).at(row), rssm.latent,
              states(t + 1, D), kNoFloats, kNoFloats, kNoFloats, kNoFloats,
              drawn_.at(place(t + 1)).data});
  }
}

// The heads in some of a tile's states, which are rows one behind the other: 1..H, but 0..H-1 for
// the reward of departures.
void Cem::evaluate(const Tile& tile, Index part, int thread) const {
  const CemArgs& x = args_;
  const Index H = x.H, first = part * tile.head_rows;
  const Index rows = std::min(tile.head_rows, H * tile.rows - first);
  const Task task(*x.kernels, x.B * x.N, rows);
  const Kernels& k = task.kernels;
  const Index start = tile.slot * (H + 1) * tile_;  // where state 0 is
  const Index scratch = thread * head_tile_;
  // of `count` rows from `place` on, into those from `row` on
  const auto read = [&](const Mlp& mlp, const Readout& as, const MlpBuffers& hidden,
                        const FloatBuffer& to, Index row, Index count, Index place) {
    const bool given = place < start + tile.rows;  // state 0 is anybody's
    const Drawn drawn = given ? Drawn{} : drawn_.at(place);
    read_forward(k, mlp, as, states_.at(place), count, hidden, scratch, outputs_.at(scratch),
                 to.at(tile.slot, row).data, kNoRows, drawn.ones(*x.rssm, x.rssm->D));
  };
  const Index arrived = start + tile.rows + first;
  const auto pay = [&](Index row, Index count, Index place) {
    if (count > 0) read(*x.reward, x.reward_as, reward_hidden_, reward_, row, count, place);
  };
  if (x.departure) {
    const Index given = std::clamp<Index>(tile.rows - first, 0, rows);  // of state 0
    pay(first, given, start + first);
    pay(first + given, rows - given, start + first + given);
  } else {
    pay(first, rows, arrived);
  }
  if (x.bootstrap != nullptr) {
    read(*x.bootstrap, x.value_as, bootstrap_hidden_, value_, first, rows, arrived);
  }
  if (x.discount != nullptr) {
    read(*x.discount, {}, discount_hidden_, discount_, first, rows, arrived);
    k.discount({rows, x.gamma, x.hard_discount, discount_.at(tile.slot, first).data, nullptr});
  }
}

void Cem::score(Index i, const Tile& tile) const {
  const CemArgs& x = args_;
  const Index H = x.H, rows = tile.rows;
  const float* reward = reward_.at(tile.slot).data;
  float* scores = x.scores + i * x.B * x.N + tile.begin;
  if (x.bootstrap == nullptr) {
    std::copy_n(reward, rows, scores);
    for (Index t = 1; t < H; ++t) {
      for (Index r = 0; r < rows; ++r) scores[r] += reward[t * rows + r];
    }
  } else {
    float* returns = returns_.at(tile.slot).data;
    x.kernels->lambda_return_forward({{reward, H, rows},
                                      {value_.at(tile.slot).data, H, rows},
                                      {discount_.at(tile.slot).data, H, rows},
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

  const Index divisor = x.sample_std && count > 1 ? count - 1 : count;
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
      const float fitted = static_cast<float>(std::sqrt(squares / static_cast<double>(divisor)));
      mean[a] = static_cast<float>(center);
      std[a] = fitted < x.min_std ? x.min_std : fitted;  // NaN stays
    }
  }
}

}  // namespace fastdreamer
