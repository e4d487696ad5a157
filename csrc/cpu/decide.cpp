#include "cpu/decide.h"

#include <algorithm>
#include <cmath>

#include "cpu/task.h"

namespace fastdreamer {
namespace {

// One-hot vectors of the greatest of each `classes` logits, the first of equals; NaN of NaN.
void likeliest(Floats logits, Index classes, Index A, Index rows, Floats out) {
  for (Index r = 0; r < rows; ++r) {
    for (Index first = 0; first < A; first += classes) {
      const float* from = logits.data + r * logits.stride + first;
      float* to = out.data + r * out.stride + first;
      const bool undefined =
          std::any_of(from, from + classes, [](float logit) { return std::isnan(logit); });
      std::fill_n(to, classes, undefined ? std::nanf("") : 0.0f);
      if (!undefined) to[std::max_element(from, from + classes) - from] = 1.0f;
    }
  }
}

}  // namespace

Decide::Decide(const DecideArgs& args, Arena& scratch, int threads)
    : args_(args),
      threads_(threads) {
  const Kernels& k = *args.kernels;
  const Decider& d = *args.decider;
  const Tiling tiling = tiling_for(k, args.B, threads);
  tile_ = tiling.size;
  const Index rows = tiling.threads * tile_;
  used_ = take_rows(scratch, k, rows, d.rssm.width());
  found_ = take_rows(scratch, k, rows, d.rssm.S + d.post.in());
  h_ = take_floats(scratch, rows, d.rssm.D);
  deter_ = take_deter(scratch, k, d.rssm, rows, false);
  post_ = take_mlp(scratch, k, d.post, rows, false);
  raw_ = take_floats(scratch, rows, d.rssm.raw());
  drawn_ = take_drawn(scratch, d.rssm, rows);
  if (d.sees) {
    vector_ = take_rows(scratch, k, rows, d.vector());
    vector32_ = take_floats(scratch, rows, d.vector());
    encoder_ = take_mlp(scratch, k, d.encoder, rows, false);
    const Rows to = found_.at(0, d.rssm.feat() + d.embed());  // its last layer writes in place
    encoder_.hidden[d.encoder.depth - 1] = {static_cast<char*>(to.data), to.stride, k.elem_size};
  }
  if (!d.acts) return;
  actor_ = take_mlp(scratch, k, d.actor.mlp, rows, false);
  actor_raw_ = take_floats(scratch, rows, d.actor.raw(d.rssm.A));
  if (args.action_noise != nullptr) return;
  zeros_ = scratch.take<float>(d.rssm.A);
  std::fill_n(zeros_, d.rssm.A, 0.0f);
}

void Decide::run() const {
  parallel_tiles(tiling_for(*args_.kernels, args_.B, threads_),
                 [&](Index begin, Index rows, int thread) { tile(begin, rows, thread); });
}

void Decide::tile(Index begin, Index rows, int thread) const {
  const DecideArgs& x = args_;
  const Task task(*x.kernels, x.B, rows);
  const Kernels& k = task.kernels;
  const Decider& d = *x.decider;
  const Rssm& rssm = d.rssm;
  const Index A = rssm.A, D = rssm.D, S = rssm.S, V = d.vector(), row = thread * tile_;
  const auto take = [&](const float* from, Index width, Rows to, Floats to32 = kNoFloats) {
    k.copy({rows_of(from, width).at(begin), nullptr, width, rows, to, to32, false});
  };
  take(x.deter, D, used_.at(row), h_.at(row));
  take(x.stoch, S, used_.at(row, D));
  take(x.action, A, used_.at(row, D + S));
  if (x.embed != nullptr) take(x.embed, d.embed(), found_.at(row, S + D));
  if (d.sees) {
    // act(mlp(sign(x) log(1 + |x|)))
    const Floats tamed = vector32_.at(row);
    for (Index i = 0; i < rows * V; ++i) {
      const float v = x.vector[begin * V + i];
      tamed.data[i] = std::copysign(std::log1p(std::fabs(v)), v);
    }
    k.copy({tamed, nullptr, V, rows, vector_.at(row), kNoFloats, false});
    forward(k, d.encoder, vector_.at(row), rows, encoder_, row, kNoFloats);
  }
  // h' = GRU(act(W [s, a]), h); s' from the posterior of [h', embedding]
  deter_step(k, rssm, used_.at(row), {}, h_.at(row), rows, deter_, row, found_.at(row, S),
             rows_of(x.next_deter, D).at(begin));
  forward(k, d.post, found_.at(row, S), rows, post_, row, raw_.at(row));
  k.sample({S, rows, raw_.at(row), rows_of(x.state_noise, rssm.noise()).at(begin), rssm.latent,
            found_.at(row), rows_of(x.next_stoch, S).at(begin), kNoFloats, kNoFloats, kNoFloats,
            drawn_.at(row).data});
  if (!d.acts) return;
  forward(k, d.actor.mlp, found_.at(row), rows, actor_, row, actor_raw_.at(row), kNoFloats,
          drawn_.at(row).ones(rssm, 0));
  const Floats raw = actor_raw_.at(row), action = rows_of(x.next_action, A).at(begin);
  Floats noise = rows_of(x.action_noise, d.actor.noise(A)).at(begin);
  if (noise.data == nullptr && d.actor.one_hot()) {
    return likeliest(raw, d.actor.latent.classes, A, rows, action);
  }
  if (noise.data == nullptr) {  // 0 · std is 0 whatever the policy's std is: it is left out
    noise = {zeros_, 0};
    for (Index i = 0; i < rows; ++i) std::fill_n(raw.data + i * raw.stride + A, A, 0.0f);
  }
  act(k, d.actor, A, rows, raw, noise, kNoRows, action, kNoFloats);
}

}  // namespace fastdreamer
