// Planning by the cross-entropy method: all iterations, candidates, rollouts, scores and refits, in
// one call. Rows are candidates. A thread takes a tile of them through the whole horizon; the heads
// then run on the states of all its steps, in tiles of their own that go to whichever thread is
// free. Threads meet at the refits alone: one that another program holds up delays the others
// little.
#pragma once

#include "cpu/rssm_step.h"

namespace fastdreamer {

// Everything of a call. Float arrays, contiguous, the caller's, valid during the call; outputs
// alias nothing. Candidate n of start state b is row b * N + n.
struct CemArgs {
  const Kernels* kernels;
  const Rssm* rssm;
  const Mlp *reward, *bootstrap;  // of feat; bootstrap null: the score is the sum of rewards,
  float gamma, lam, mix;          // else G_0 of the λ-return with these; mix = 1 - λ
  bool departure;                 // rewards are of states 0..H-1, else of 1..H
  const Mlp* discount;            // * feat -> logit of the episode going on, else γ alone
  Readout reward_as, value_as;    // of their outputs
  bool hard_discount;             // as DiscountArgs
  bool bound_action;              // whether the dynamics take candidates bounded, as ActArgs
  Index I, H, B, N, K, P;         // I and P may be 0; 1 <= K <= N; P <= N
  float min_std, clip;
  bool sample_std;  // the refit divides by one elite less, unless there is only one
  const float *start_deter, *start_stoch;  // [B, D], [B, S]
  // [I, H, B, N, A], [I, H, B, N, S or one a categorical]
  const float *action_noise, *state_noise;
  const float* proposals;  // [H, B, P, A], the first P candidates of every iteration; null if P = 0
  float *mean, *std;       // [H, B, A]; in: the Normal to start from, out: the last
  float* scores;           // [I, B, N]
};

// The constructor takes memory (with the GIL held), run() computes (without). Results are equal
// for every number of threads.
class Cem {
 public:
  Cem(const CemArgs& args, Arena& scratch, int threads);
  void run() const;

 private:
  struct Tile {
    Index begin, rows, slot;      // slot: where its states are
    Index head_rows, head_tiles;  // the heads' tiles of its H * rows states
  };
  struct Job {
    enum { roll, evaluate, refit } kind;
    Index index, part;  // tile and tile of heads; of a refit the start state
  };
  struct Progress;

  void work(Progress& done, int thread) const;
  void roll(Index i, const Tile& tile, int thread) const;
  void evaluate(const Tile& tile, Index part, int thread) const;
  void score(Index i, const Tile& tile) const;
  void refit(Index i, Index b, int thread) const;
  void candidates(Index i, Index t, Index b, Index n, Index count, const Buffer& packed, Index row,
                  const FloatBuffer& plain) const;

  CemArgs args_;
  int threads_;
  Index tile_, head_tile_;  // rows, at most
  Index slots_;             // tiles that have states at the same time
  std::vector<Tile> tiles_;
  std::vector<Job> jobs_;  // of an iteration
  // of one tile a slot
  Buffer states_;                                    // [H + 1, rows] rows [h | s | a]
  Drawn drawn_;                                      // likewise
  FloatBuffer reward_, value_, discount_, returns_;  // [H, rows]
  // scratch of one tile a thread
  FloatBuffer h_;  // twice: h in float
  DeterBuffers deter_;
  MlpBuffers prior_, reward_hidden_, bootstrap_hidden_, discount_hidden_;
  FloatBuffer raw_, outputs_;  // outputs: of one tile of heads a thread, where one is of several
  // scratch of one refit a thread
  FloatBuffer elites_;                      // [K, A]
  Index* order_;                            // [N]
  float *zero_ = nullptr, *one_ = nullptr;  // [A]; with proposals
};

}  // namespace fastdreamer
