// The posterior filter over a sequence, forward and backward. Only what a step needs of the step
// before is inside the loop: the embeddings' product before it, the priors and all weight
// gradients after it, are one matrix product each over all steps.
#pragma once

#include "cpu/rssm_step.h"

namespace fastdreamer {

// The model outlives the tape. Float arrays [T, B, ...], contiguous, the caller's, valid and
// unchanged as long as the tape is used; those marked * may be null.
struct ObserveArgs {
  const Kernels* kernels;
  const Rssm* rssm;
  const Mlp* post;     // h -> raw(), its first layer without bias, the embedding's part being added
  const Layer* embed;  // that part, with the bias
  Index T, B;
  const float *start_deter, *start_stoch;  // [B, D], [B, S]
  const float* embed32;                    // * [T, B, E]
  const void* embed_elem;                  // * the same as Elem; one of the two is given
  const float* action;
  // * [T, B]: where an episode begins and that part of what was is forgotten
  const unsigned char *first_deter, *first_stoch, *first_action;
  const float *begin_deter, *begin_stoch;  // * [D], [S]: what state it begins with; zeros
  const std::int32_t* begin_drawn;         // * [C]: of a categorical begin_stoch, as Ones
  const float* noise;                      // [S], or of categorical latents one a categorical
  // of categorical latents the means are the logits, and the stds null
  float *deter, *stoch, *post_mean, *post_std, *prior_mean, *prior_std;
};

// What the passes over a sequence share. Row t * B + b of a buffer is step t of row b.
struct ObserveTape {
  ObserveArgs args{};
  Buffer embed;  // as Elem
  Buffer used;   // [h | s | a] that a step starts from: zero where an episode begins
  Buffer h;      // h' as Elem
  DeterBuffers deter;
  MlpBuffers post, prior;
  FloatBuffer post_slope, prior_slope;
  Arena arena;
};

// The forward pass. The constructor takes memory (with the GIL held), run() computes (without).
class Observe {
 public:
  // `tape`: null, or where to leave what the backward pass needs.
  Observe(const ObserveArgs& args, ObserveTape* tape, Arena& scratch, int threads);
  void run() const;

 private:
  void embed(Index begin, Index rows) const;
  void scan(Index begin, Index rows, int thread) const;
  void prior(Index begin, Index rows, int thread) const;

  ObserveTape own_;
  ObserveTape* tape_;
  bool taped_;
  int threads_;
  Index scan_tile_, batch_tile_;
  FloatBuffer projected_;  // [T * B] of the embeddings
  FloatBuffer raw_;        // of one tile a thread, and
  FloatBuffer h32_;
  Drawn drawn_;
};

// Gradients that reach the outputs (null: none) and where those of the inputs go (null: not
// wanted), shaped like them; of parameters, per layer, all or none. The backward pass refers to it.
struct ObserveGrads {
  const float *deter, *stoch, *post_mean, *post_std, *prior_mean, *prior_std;
  float *start_deter, *start_stoch, *embed, *action;
  float *begin_deter, *begin_stoch;
  bool parameters;
  std::vector<LayerGrad> prior, post;
  LayerGrad embed_weight;
  DeterGrads dynamics;
};

class ObserveBackward {
 public:
  ObserveBackward(const ObserveTape& tape, const ObserveGrads& grads, Arena& scratch, int threads);
  void run() const;

 private:
  void prior(Index begin, Index rows) const;
  void scan(Index begin, Index rows, int thread) const;
  void embed(Index begin, Index rows) const;
  void begin() const;

  const ObserveTape& tape_;
  const ObserveGrads& grads_;
  int threads_;
  Index scan_tile_;
  DeterDeltas deter_;
  MlpBuffers post_deltas_, prior_deltas_;
  FloatBuffer prior_dh_;             // [T * B], gradient of h' through the prior
  FloatBuffer dh_, ds_, ds_da_;      // of one tile a thread
  FloatBuffer begin_dh_, begin_ds_;  // [T * B], of what episodes begin with, where they do
  WeightGradients weights_;
};

}  // namespace fastdreamer
