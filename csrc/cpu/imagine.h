// Rollouts of the dynamics without observations, forward and backward: the actor inside the loop
// (imagine) or given actions (open_loop, rssm_step), with reward and critic heads and λ-returns in
// the same pass. Rows are independent: a thread takes a tile of them through the whole horizon.
#pragma once

#include "cpu/rssm_step.h"

namespace fastdreamer {

// Which gradients will be asked for.
struct ImagineWants {
  bool through =
      false;  // any that needs the backward sweep: actor, dynamics, reward, start, action
  bool actor = false;
  bool rssm = false;
  bool reward = false;
  bool critic = false;
  bool discount = false;
};

// Everything of a rollout. The model and the heads outlive the tape. Float arrays [H, B, ...],
// contiguous, the caller's, valid and unchanged as long as the tape is used; those marked * may be
// null.
struct ImagineArgs {
  const Kernels* kernels;
  const Rssm* rssm;
  const Actor* actor;                   // *: the actions are given
  const Mlp *reward, *critic, *target;  // *: of feat; the target bootstraps if there is one
  const Mlp* discount;                  // *: feat -> logit of the episode going on, else γ alone
  Readout reward_as, value_as;          // of their outputs; the bins are used by the forward pass
  bool hard_discount;                   // as DiscountArgs
  float gamma, lam, mix;                // mix = 1 - λ
  bool departure;                       // rewards are of states 0..H-1, else of 1..H
  Index H, B;
  const float *start_deter, *start_stoch;    // [B, D], [B, S]
  const float *state_noise, *action_noise;   // [S] or one a categorical; action_noise *
  float *deter, *stoch;                      // * of states 1..H
  float* action;                             // out, or in without an actor
  float *prior_mean, *prior_std;             // *, the mean of categorical latents the logits
  float *reward_out, *next_value, *returns;  // * [H, B]: reward; bootstrap of states 1..H
  float* value;                              // * [H, B]: the critic's of states 0..H-1
  float* discount_out;                       // * [H, B]: the head's factors, as DiscountArgs
};

// A head and its activations: of the whole rollout, or of one tile a thread.
struct Head {
  const Mlp* mlp = nullptr;
  Readout as{};
  MlpBuffers hidden, deltas;
  bool kept = false;  // row t * B + b is state t + first of row b
  Index first = 0;
};

// What the passes over a rollout share. Row t * B + b of a buffer is step t of row b.
struct ImagineTape {
  ImagineArgs args{};
  ImagineWants wants;
  Buffer states;  // [H + 1] × B rows [h | s | a]; a is the action taken there
  MlpBuffers actor;
  FloatBuffer actor_raw, actor_slope;  // the latter of one-hot actions
  DeterBuffers deter;
  MlpBuffers prior;
  FloatBuffer slope;  // as SampleArgs
  // d / d feat of the states they are of: of the reward, the bootstrap and the discount's logit;
  // of a hard discount nothing
  Buffer reward_unit, value_unit, discount_unit;
  Head reward, critic, target, discount;
  FloatBuffer gamma;           // [H, B], where there is no discount head
  FloatBuffer discount_slope;  // [H, B] d discount / d logit; no data: there is none
  Arena arena;
};

// The forward pass. The constructor takes memory (with the GIL held), run() computes (without).
class Imagine {
 public:
  // `tape`: null, or where to leave what `wants` needs.
  Imagine(const ImagineArgs& args, const ImagineWants& wants, ImagineTape* tape, Arena& scratch,
          int threads);
  void run() const;

 private:
  void tile(Index begin, Index rows, int thread) const;
  void evaluate(const Kernels& k, const Head& head, Index t, Index begin, Index rows, int thread,
                Rows feat, const Ones& ones, float* out, Rows unit, bool deltas) const;

  ImagineTape own_;  // where there is no tape: buffers of one tile a thread
  ImagineTape* tape_;
  bool taped_;
  int threads_;
  Index tile_;           // rows
  FloatBuffer raw_;      // of one tile a thread
  FloatBuffer outputs_;  // likewise: a head's
  FloatBuffer h_;        // likewise, twice: h where the caller does not want it
  Drawn drawn_;          // likewise
};

// Gradients that reach the outputs (null: none) and where those of the inputs go (null: not
// wanted), shaped like them; of parameters, per layer. The backward pass refers to it.
struct ImagineGrads {
  const float *deter, *stoch, *action, *prior_mean, *prior_std, *reward, *returns, *discount;
  float *start_deter, *start_stoch, *given_action;
  std::vector<LayerGrad> actor, prior, reward_head, discount_head;
  DeterGrads dynamics;
  Index actor_rotate, reward_rotate, discount_rotate;
};

class ImagineBackward {
 public:
  ImagineBackward(const ImagineTape& tape, const ImagineGrads& grads, Arena& scratch, int threads);
  void run() const;

 private:
  void tile(Index begin, Index rows, int thread) const;

  const ImagineTape& tape_;
  const ImagineGrads& grads_;
  int threads_;
  Index tile_;
  DeterDeltas deter_;
  MlpBuffers prior_, actor_;
  FloatBuffer dh_, ds_, ds_da_, d_feat_;         // of one tile a thread
  FloatBuffer d_reward_, d_value_, d_discount_;  // [H, B]
  WeightGradients weights_;
};

// The critic's weight gradients for a gradient [H, B] of `value`; independent of the sweep above.
class CriticBackward {
 public:
  CriticBackward(const ImagineTape& tape, const float* value_grad,
                 const std::vector<LayerGrad>& grads, Index rotate, Arena& scratch, int threads);
  void run() const { weights_.run(); }

 private:
  WeightGradients weights_;
};

}  // namespace fastdreamer
