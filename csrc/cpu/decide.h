// One decision: the posterior of one observation, and what the policy does in it. Rows are
// environments; a thread takes a tile of them through all layers.
#pragma once

#include "cpu/rssm_step.h"

namespace fastdreamer {

// The layers of a decision.
struct Decider {
  Rssm rssm;  // without a prior: nothing is imagined
  Mlp post;   // [h, embed, embedded vector] -> rssm.raw()
  bool sees, acts;
  Mlp encoder;  // symlog(vector) -> its embedding, the activation last; none unless it sees
  Actor actor;  // of [s, h]; none unless it acts

  Index vector() const { return sees ? encoder.in() : 0; }
  Index embed() const { return post.in() - rssm.D - (sees ? encoder.out() : 0); }
};

// Float arrays, contiguous, the caller's, valid during the call; outputs alias nothing. Those
// marked * are null where the decider has no use for them.
struct DecideArgs {
  const Kernels* kernels;
  const Decider* decider;
  Index B;
  const float *deter, *stoch, *action;  // [B, D], [B, S], [B, A]: before, and what was done
  const float *embed, *vector;          // * [B, embed()], * [B, vector()]
  const float* state_noise;             // [B, rssm.noise()]
  const float* action_noise;            // * [B, actor.noise(A)], or null: the mode
  float *next_deter, *next_stoch, *next_action;  // [B, D], [B, S], * [B, A]
};

// The constructor takes memory (with the GIL held), run() computes (without). A row's results
// depend neither on the number of threads nor on the other rows.
class Decide {
 public:
  Decide(const DecideArgs& args, Arena& scratch, int threads);
  void run() const;

 private:
  void tile(Index begin, Index rows, int thread) const;

  DecideArgs args_;
  int threads_;
  // scratch of one tile a thread
  Index tile_;   // rows
  Buffer used_;  // [h | s | a]
  // [s' | h' | embed | embedded vector]: what posterior and policy take are slices of it
  Buffer found_, vector_;
  FloatBuffer h_, raw_, actor_raw_, vector32_;
  Drawn drawn_;
  DeterBuffers deter_;
  MlpBuffers encoder_, post_, actor_;
  float* zeros_ = nullptr;  // [A], the mode's noise
};

}  // namespace fastdreamer
