// The recurrent state-space model and the policy, one step of a tile of rows at a time.
//
// A row of `states` is [h | s | a] as Elem, so that feat = [h | s] and the input layer's [s | a]
// are contiguous slices of it; h itself is carried in float.
#pragma once

#include "cpu/mlp.h"

namespace fastdreamer {

// The block-diagonal layers of a GRU: block g of count takes its part of a layer's inputs to its
// part of the outputs, in the first layer of h, whose other inputs, the features, all blocks share.
struct Blocks {
  Index count;
  Mlp mlp;                                // sizes (the features apart), biases, norms; no panels
  std::vector<Panels> forward, backward;  // [in / count, out / count] of layer i and block g at
                                          // i * count + g, and [out / count, in / count]
  std::vector<Panels> shared;             // [features, out / count] of the first layer's blocks
  Mlp features;                           // h -> those of it, the activation last
  Panels backward_features;               // [out, those of it] of the first layer
  bool features_first;                    // whether those of it come before x

  const Panels& at(const std::vector<Panels>& panels, int layer, Index g) const {
    return panels[static_cast<std::size_t>(layer * count + g)];
  }
  Index all(Index K) const { return K + features.out(); }  // the features, of an x [K]
};

struct Gru {
  GruPanels forward;         // of a late or a block-diagonal one, below, the sizes alone
  const float* bias;         // as GruArgs; of a late one [3D] or null
  Panels backward_ih;        // [3D, K], rows new, reset, update; of a late one its own; of blocks
                             // [out, K] of their first layer. Of branches the columns of stoch
  Panels backward_hh;        // [3D, D], rows reset, update, new; null data unless for gradients
  Panels backward_action{};  // of branches the columns of action
  // That of LateGruArgs:
  Panels joint{};  // [K + D, 3D], of [x | h]
  Norm norm{};
  LateGates at{};
  Index rotate = 0;  // of its columns
  // One of DreamerV3: each block's last outputs are the sums of a late one of its D / count units.
  const Blocks* blocks = nullptr;

  bool late() const { return joint.data != nullptr; }
};

struct Rssm {
  Index A, D, S;
  Mlp inp;  // [s, a] -> hidden, activation last
  Gru gru;
  Mlp prior;  // h -> raw()
  Latent latent;
  // Of branches inp is s -> its part of hidden, and this a -> its own.
  const Mlp* action = nullptr;
  bool action_first = false;  // whether that is the first part

  Index hidden() const { return inp.out() + (action == nullptr ? 0 : action->out()); }
  Index of_stoch() const { return action_first ? action->out() : 0; }  // first columns of hidden
  Index of_action() const { return action_first ? 0 : inp.out(); }
  Index raw() const { return latent.classes > 0 ? S : 2 * S; }  // of a distribution
  Index noise() const { return latent.noise(S); }               // of a sample
  Index width() const { return D + S + A; }
  Index feat() const { return D + S; }
};

struct Actor {
  Mlp mlp;           // feat -> raw()
  float mean_scale;  // of a Normal, as ActArgs, and so is squash
  Latent latent;     // one-hot actions are drawn as categorical latents are
  Squash squash;
  bool through_feat;  // whether gradients reach the features that it looks at
  bool bound;         // whether the dynamics take its actions bounded, as ActArgs

  bool one_hot() const { return latent.classes > 0; }
  Index raw(Index A) const { return one_hot() ? A : 2 * A; }
  Index noise(Index A) const { return latent.noise(A); }
};

// The actions of raw outputs, which are scratch afterwards: as the dynamics take them to `out`
// (or no data), themselves to `out32`. Of one-hot ones the softmax goes to `slope` (or no data).
void act(const Kernels& k, const Actor& actor, Index A, Index rows, Floats raw, Floats noise,
         Rows out, Floats out32, Floats slope);

// The gradient of the raw outputs, of `grad`, that of the actions as the dynamics take them, and of
// `own` (or no data), that of the actions themselves, which is added to it.
void act_backward(const Kernels& k, const Actor& actor, Index A, Index rows, Floats grad,
                  Floats own, Floats raw, Floats noise, Floats action, Floats slope, Rows raw_grad);

// What the steps of the dynamics leave for a backward pass, or scratch for one step.
struct DeterBuffers {
  MlpBuffers inp, action;  // the input layers' outputs; the last of them put theirs into
  Buffer x;                // [K], of a late GRU [x | h], of a block-diagonal one the features
  Buffer gates;            // [4D], as GruArgs, block by block; no data: not wanted
  // of a late or a block-diagonal GRU:
  Buffer sums;          // [3D], as LateGruArgs
  FloatBuffer inverse;  // [1], likewise
  // of a block-diagonal one:
  MlpBuffers features, blocks;
  FloatBuffer shared;  // a block's part of its first layer's sums that comes of the features
};
DeterBuffers take_deter(Arena& arena, const Kernels& k, const Rssm& rssm, Index rows, bool keep);

// Which classes were drawn, of rows of states: as Ones has them, [rows, C].
struct Drawn {
  std::int32_t* data = nullptr;  // null: latents are Gaussian, or the states are anybody's
  Index count = 0;               // C

  Drawn at(Index row) const { return {data == nullptr ? nullptr : data + row * count, count}; }
  // Of rows whose stochastic state begins at a column.
  Ones ones(const Rssm& rssm, Index begin) const { return {data, count, begin, rssm.S}; }
};
Drawn take_drawn(Arena& arena, const Rssm& rssm, Index rows);

// h' = GRU(act(W [s, a]), h): from the rows `state` (and h in float, `h32`) to the first D columns
// of the rows `next`, and to `out32`.
void deter_step(const Kernels& k, const Rssm& rssm, Rows state, const Drawn& drawn, Floats h32,
                Index rows, const DeterBuffers& to, Index row, Rows next, Floats out32);

// Gradients before the activations that the steps' weight gradients need, or scratch for one step.
struct DeterDeltas {
  MlpBuffers inp, action;
  Buffer gates;  // [4D], as GruBackwardArgs; of a late GRU the gradients of the sums [3D], and
  Buffer sums;   // those behind the norm
  MlpBuffers features, blocks;  // of a block-diagonal GRU
};
DeterDeltas take_deter_deltas(Arena& arena, const Kernels& k, const Rssm& rssm, Index rows);

// dh: in, the gradient of h'; out, that of h. The gradient of [s, a] goes to `ds_da` [S + A].
void deter_step_backward(const Kernels& k, const Rssm& rssm, Rows state, const DeterBuffers& saved,
                         Index saved_row, const DeterDeltas& deltas, Index delta_row, Index rows,
                         Floats dh, Floats ds_da);

// Where the gradients of the dynamics go, of MLPs one a layer.
struct DeterGrads {
  std::vector<LayerGrad> inp, action;
  Index rotate;                             // of the input layer's columns
  LayerGrad ih, hh;                         // of a late GRU the first is all of it
  std::vector<LayerGrad> features, blocks;  // of a block-diagonal one; weights [count, in, out]
};

// Adds the weight gradients of all steps: row i of every buffer belongs together.
void add_deter_gradients(WeightGradients& jobs, const Kernels& k, const Rssm& rssm,
                         const Buffer& states, const DeterBuffers& saved, const DeterDeltas& deltas,
                         Index rows, const DeterGrads& grads);

}  // namespace fastdreamer
