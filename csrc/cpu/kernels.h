// The kernels as one table of function pointers per instruction set and precision. No STL here or
// below.
//
// A kernel works on a tile of rows: rows are independent, so that a thread takes a tile through a
// whole loop while its activations stay in cache. `Elem` is what activations and packed weights
// are stored as, float or bfloat16 by the table's precision; sums, states, outputs and master
// weights are float always. Strides count elements. Outputs alias no input unless said.
//
// Panels, biases and rows of weights belong to a PackedMlp or PackedGru (bindings/weights.h), which
// outlives every call and tape that uses them; all other memory belongs to the caller for the
// length of the call.
#pragma once

#include <cstdint>

#include "common/view.h"
#include "cpu/isa.h"

namespace fastdreamer {

// GELU by the normal distribution, and by the tanh that is nearly it.
enum class Activation : int { none, elu, relu, silu, tanh, gelu, gelu_tanh, mish };

// Whether its derivative is no function of what it puts out, so that it is saved itself; inlined
// wherever it is compiled, for whatever CPU.
__attribute__((always_inline)) constexpr bool saves_slope(Activation act) {
  return act == Activation::silu || act >= Activation::gelu;
}

// Rows of Elem.
struct Rows {
  void* data;
  Index stride;
};

// Rows of float.
struct Floats {
  float* data;
  Index stride;
};

// A matrix [K, N], packed for products of rows of length K: vectors of columns in panels, the
// panel's columns of one k (for bfloat16 of two) side by side, so that it is read in order.
struct Panels {
  void* data;
  Index K, N;
};

// Where Panels come from. Element (k, n) is source[k * stride + n], or with `transposed`
// source[n * stride + k]; either index is taken modulo its size after adding its rotation (which
// turns [action, stoch] into [stoch, action], or reset-update-new into new-reset-update).
struct PackArgs {
  const float* source;
  Index stride;
  bool transposed;
  Index rotate_k, rotate_n;
  Panels to;
};

// The weights of a GRU cell packed by vectors of units: per vector reset, update, new for every k
// of the input, then for every k of the state.
struct GruPanels {
  void* data;
  Index K, D;
};

struct GruPackArgs {
  const float *weight_ih, *weight_hh;  // [3D, K], [3D, D]: reset, update, new
  GruPanels to;
};

// Inputs [begin, begin + size), at the beginning or the end of a row, that are one-hot vectors side
// by side: `count` ones a row, `at[row * count + i]` from `begin` on, the rest zeros.
struct Ones {
  const std::int32_t* at;  // null: there are none
  Index count, begin, size;

  static constexpr std::int32_t none = -1;       // zeros alone
  static constexpr std::int32_t undefined = -2;  // NaN
};

// out = act(in · w + bias + add), or with `slope_of` the product times the derivative of the
// activation at those saved outputs (where saves_slope(): `slope_of` holds the derivative itself).
struct LinearArgs {
  Panels w;
  Rows in;
  Index rows;
  const float* bias;  // [N] or null
  Floats add;         // null data: nothing; may be out32
  Activation act;
  Rows slope_of;   // null data: apply act itself
  Rows out;        // null data: not wanted
  Floats out32;    // likewise
  Rows out_slope;  // the derivative where saves_slope(), likewise
  Ones ones{};     // of in: their part of the product is a sum of rows of w
};

enum class NormKind : int { none, layer, rms };

// What a row of N sums passes through before its activation: x̂ = (x - mean) / sqrt(variance + eps),
// or with rms x / sqrt(mean of x² + eps); then times weight, plus bias. In float.
struct Norm {
  NormKind kind = NormKind::none;
  float eps = 0.0f;
  const float *weight = nullptr, *bias = nullptr;  // [N] or null

  // inlined wherever it is compiled, for whatever CPU
  __attribute__((always_inline)) explicit operator bool() const { return kind != NormKind::none; }
};

// out = act(norm(in)).
struct NormArgs {
  Norm norm;
  Index N, rows;
  Activation act;
  Rows in;
  Rows normed;     // x̂, may be in; and
  Floats inverse;  // [1] what the row was multiplied by; null data: neither is wanted
  Rows out;        // may be in, unless normed is
  Rows out_slope;  // as LinearArgs
};

// out = the gradient of the norm's input, of that of its output.
struct NormBackwardArgs {
  Norm norm;
  Index N, rows;
  Rows grad, normed;
  Floats inverse;
  Rows out;
};

// weight_grad[c] = Σ_r scale[r] grad[r, c] normed[r, c], bias_grad[c] = Σ_r scale[r] grad[r, c];
// at most kNormColumns of them.
struct NormGradientArgs {
  Rows grad, normed;
  Index cols, rows;
  const float* scale;              // [rows] or null
  float *weight_grad, *bias_grad;  // or null
};
constexpr Index kNormColumns = 256;

// Where the sums of the GRU below have their gates, D columns each, and what is added to update.
struct LateGates {
  Index D, reset, fresh, update;
  float update_bias;
};

// h' = u tanh(r c) + (1 - u) h, where r, c and u are sums [3D] of x and h together behind the norm,
// r and u through a sigmoid: the GRU of DreamerV2, its reset inside the candidate.
struct LateGruArgs {
  LateGates at;
  Norm norm;
  Index rows;
  Rows sums;       // where `inverse` is wanted, x̂ afterwards
  Floats inverse;  // as NormArgs
  Floats h32;
  Rows out;      // h' as Elem
  Floats out32;  // h'
  Rows gates;    // as GruArgs
};

// grad [3D] = the gradients of what is behind the norm, in the columns of the sums. dh as in
// GruBackwardArgs.
struct LateGruBackwardArgs {
  LateGates at;
  Index rows;
  Rows gates, h;
  Floats dh;
  Rows grad;
};

// h' = GRU(x, h) with the equations of torch.nn.GRUCell.
struct GruArgs {
  GruPanels w;
  const float* bias;  // [4D]: reset, update (input and state biases added), new of input, of state
  Rows x, h;
  Floats h32;
  Index rows;
  Rows out;      // h' as Elem
  Floats out32;  // h'
  Rows gates;    // [4D] reset, update, new, and what the reset gate multiplies; null: not wanted
};

// gates_grad [4D] = gradients before the activations of new, reset, update, and of what the reset
// gate multiplies: its first 3D belong to the input's weights (new first), its last 3D to the
// state's. dh (in place) becomes the part of the gradient of h that does not go through weights.
struct GruBackwardArgs {
  Index D, rows;
  Rows gates, h;
  Floats dh;  // in: gradient of h'
  Rows gates_grad;
};

enum class StdKind : int { softplus, sigmoid, exp };

// std(y) = max(scale * f(slope * y + offset) + min, floor), f by the kind.
struct StdTransform {
  StdKind kind;
  float scale, slope, offset, min, floor;
};

// How raw outputs become a stochastic state.
struct Latent {
  Index classes;     // of every categorical, which divides S; 0: Gaussian
  float unimix;      // u, the part of the uniform distribution in a categorical
  bool gumbel;       // whether categoricals are Gumbel-softmax samples
  StdTransform std;  // of a Gaussian

  Index count(Index S) const { return classes > 0 ? S / classes : 0; }          // C: categoricals
  Index noise(Index S) const { return classes > 0 && !gumbel ? count(S) : S; }  // of a sample
  Index slopes(Index S) const { return gumbel ? 2 * S : S; }                    // as SampleArgs
};

// Gaussian: mean, y = raw [2S]; sample = mean + std(y) * noise.
// Categorical: p = (1 - u) softmax(raw [S]) + u / classes in each of its C = S / classes parts; the
// sample is one-hot, the class whose part of the cumulative sums of p holds the noise, or with
// gumbel the greatest of log p + noise.
struct SampleArgs {
  Index S, rows;
  Floats raw;    // categorical: scratch afterwards
  Floats noise;  // as Latent has it, of C in [0, 1); null data: only the distribution is wanted
  Latent latent;
  Rows out;                        // the sample as Elem, and
  Floats out32, mean, std, slope;  // each null data: not wanted. mean: or logits; std: of Gaussian
                                   // latents alone; slope: d std / d y, or the softmax, or with
                                   // gumbel [2S]: softmax(log p + noise), and the softmax
  std::int32_t* ones = nullptr;    // [rows, C], as Ones has them; null: not wanted
};

// raw_grad of the gradient of the sample (categorical: as if it were p, straight-through, or with
// gumbel softmax(log p + noise)), of mean (or logits) and of std (null data: none).
struct SampleBackwardArgs {
  Index S, rows;
  Latent latent;
  Floats grad, mean_grad, std_grad, noise, slope;
  Rows raw_grad;
};

// How a head's outputs y become one number x: y_0, or with bins b Σ softmax(y) b.
struct Readout {
  const float* bins;  // [N] or null
  bool squashed;      // the number is symexp(x)
};

struct ReadoutArgs {
  Index N, rows;
  Readout as;
  Floats raw;  // y [N]; with bins scratch afterwards
  float* out;  // [rows]; of one output it may be raw
  Rows slope;  // the number's derivative by y [N]; null data: not wanted
};

// What a policy's Normal sample a passes through: tanh; a / max(1, |a|), the divisor without a
// gradient; or a within ±kClip, with the gradient of a itself.
enum class Squash : int { tanh, none, bound, clip };
constexpr float kClip = 1.0f - 1e-6f;

// x, y = raw; action = squash(c * tanh(x / c) + std(y) * noise), c = mean_scale; infinite: x
// itself.
struct ActArgs {
  Index A, rows;
  Floats raw, noise;  // [2A], [A]
  float mean_scale;
  StdTransform transform;
  Squash squash;
  bool bound;    // whether `out` is the action / max(1, |action|)
  Rows out;      // null data: not wanted
  Floats out32;  // the action
};

struct ActBackwardArgs {
  Index A, rows;
  Floats grad, raw, noise, action;
  float mean_scale;
  StdTransform transform;
  Squash squash;
  Rows raw_grad;  // [2A]
};

// In place: the gradient of action / max(1, |action|) becomes that of the action.
struct BoundBackwardArgs {
  Index A, rows;
  Floats action, grad;
};

// In place: discount = gamma * sigmoid(logit), n of them; or with `hard` gamma where that is more
// than 1/2, else 0.
struct DiscountArgs {
  Index n;
  float gamma;
  bool hard;
  float* data;
  float* slope;  // d discount / d logit; or null. None of a hard one
};

// out = clamp(mean + std * noise, ±clip), the same mean and std for every row; NaN stays NaN.
struct PerturbArgs {
  Index A, rows;
  const float *mean, *std;  // [A]
  Floats noise;
  float clip;
  bool bound;    // as ActArgs
  Rows out;      // null data: not wanted
  Floats out32;  // likewise
};

// out[r] = in[r] · weight + bias.
struct DotArgs {
  Rows in;
  Index K, rows;
  const float* weight;
  float bias;
  float* out;
};

// out[r, c] = weight[c] * act'(saved[r, c]): the gradient of such a dot, per unit of its own.
struct DotBackwardArgs {
  Rows saved;  // as slope_of
  Index K, rows;
  Activation act;
  const float* weight;
  Rows out;
};

// to[r] += scale[r] * from[r], `cols` elements.
struct AddScaledArgs {
  Rows from;
  const float* scale;
  Index cols, rows;
  Floats to;
};

// to = from, in the rows whose skip is set zero, or what is given instead. to32 may be from.
struct CopyArgs {
  Floats from;
  const unsigned char* skip;  // [rows] or null
  Index cols, rows;
  Rows to;                         // null data: not wanted
  Floats to32;                     // likewise
  bool add;                        // to32 += from instead
  const float* instead = nullptr;  // [cols] or null
};

// weight_grad [out, in] = Σ_r scale[r] delta[r, o] x[r, i], and bias_grad[o] = Σ_r scale[r]
// delta[r, o]. `scratch` has weight_gradient_scratch(in, out) bytes.
struct WeightGradientArgs {
  Rows x, delta;  // null delta: all ones
  Index in, out, rows;
  const float* scale;  // [rows] or null
  Floats weight_grad;
  float* bias_grad;  // or null
  void* scratch;
};

// --- convolutions
// --------------------------------------------------------------------------------- Of stride 2 and
// without padding, between a fine image and a coarse one: a convolution shrinks, a transposed one
// grows, and each is the other's gradient. Images are [height, width, channels], one a row of Rows;
// fine sizes are at least 2 (coarse - 1) + kernel.

constexpr Index kMaxKernel = 8;

// [coarse, kernel, kernel, fine]: the memory of channels_last weights of torch.nn.Conv2d (fine to
// coarse) and ConvTranspose2d (coarse to fine).
struct ConvWeights {
  Index kernel, fine, coarse;  // side of the square kernel; channels
};

struct ConvPackArgs {
  ConvWeights weights;
  const float* source;
  void* to;
};

// Sums that an image's squared error is kept in: of 12 288 numbers none is long.
constexpr Index kErrorSums = 128;

// out = relu(conv(in) + bias), or with `slope_of` conv(in) where that is positive.
struct ConvArgs {
  ConvWeights weights;
  Index images, fine_height, fine_width, coarse_height, coarse_width;
  const void* panels;  // of the direction
  Rows in;
  const float* bias;  // [coarse], or growing four times [fine]; or null
  bool relu;
  Rows slope_of;  // as out; null data: none
  Rows out;       // null data: not wanted
  Floats out32;   // likewise
  // Growing alone: out becomes 2 (y - target), and error the sum of (y - target)², y being what it
  // was and the target's bytes x/255 - 1/2.
  const unsigned char* target;  // or null
  Index target_stride;          // of one image
  float* error;                 // [images, kErrorSums], added to; their sum is meant
};

// weight_grad = scale · the sum of `count` gradients, `stride` floats apart, as conv_gradient
// leaves them.
struct ConvSumArgs {
  ConvWeights weights;
  const float* parts;
  Index count, stride;
  float scale;
  float* weight_grad;  // [coarse, kernel, kernel, fine]
};

// Everything of one λ-return: [H, B] matrices that the caller owns for the length of the call.
// Outputs alias nothing.
struct LambdaReturnForward {
  Matrix<const float> reward, next_value, discount;
  float lam, mix;  // λ and 1 - λ, each rounded once from double
  Matrix<float> returns;
};

struct LambdaReturnBackward {
  Matrix<const float> grad, next_value, discount, returns;  // grad reaches the returns
  float lam, mix;
  Matrix<float> grad_reward, grad_next_value, grad_discount;
};

enum class Precision : int { fp32, bf16 };

// The functions of functions.h, to be measured.
enum class Function : int { exp, expm1, sigmoid, tanh, softplus, symexp, gelu, gelu_tanh, mish };

// A row's (in the scans a column's) result does not depend on the tile it is computed in.
struct Kernels {
  // Rows of a tile: this many at most, and where there are more tiles a multiple of the unit.
  Index tile_rows, tile_unit;
  // Calls of fewer rows than `few_rows`, all of their tiles together, are for the table `few`,
  // whose panels are the same (see kernels_for in task.h).
  Index few_rows;
  const Kernels* few;
  // Before and after a task, on its thread: linear(), gru() and weight_gradient() run in between,
  // of that many rows (weight_gradient(): outputs) or, where they are 16 or more, of any such
  // number. Nothing of other libraries may.
  void (*enter)(Index rows);
  void (*leave)();
  int elem_size;                           // bytes
  Index (*panels_size)(Index K, Index N);  // bytes
  Index (*panel_count)(Index N);
  void (*pack)(const PackArgs& args, Index panel);
  Index (*gru_panels_size)(Index K, Index D);
  Index (*gru_panel_count)(Index D);
  void (*pack_gru)(const GruPackArgs& args, Index panel);
  void (*linear)(const LinearArgs& args);
  void (*gru)(const GruArgs& args);
  void (*gru_backward)(const GruBackwardArgs& args);
  void (*late_gru)(const LateGruArgs& args);
  void (*late_gru_backward)(const LateGruBackwardArgs& args);
  void (*normalise)(const NormArgs& args);
  void (*norm_backward)(const NormBackwardArgs& args);
  void (*norm_gradient)(const NormGradientArgs& args);
  void (*sample)(const SampleArgs& args);
  void (*sample_backward)(const SampleBackwardArgs& args);
  void (*read_out)(const ReadoutArgs& args);
  void (*act)(const ActArgs& args);
  void (*act_backward)(const ActBackwardArgs& args);
  void (*bound_backward)(const BoundBackwardArgs& args);
  void (*discount)(const DiscountArgs& args);
  void (*perturb)(const PerturbArgs& args);
  void (*dot)(const DotArgs& args);
  void (*dot_backward)(const DotBackwardArgs& args);
  void (*add_scaled)(const AddScaledArgs& args);
  void (*copy)(const CopyArgs& args);
  Index (*weight_gradient_scratch)(Index in, Index out);
  void (*weight_gradient)(const WeightGradientArgs& args);
  // Images that a call of the convolutions takes at most: the rows of their products. They give
  // tiles their shapes themselves, so that none is called between enter() and leave().
  Index conv_images;
  Index (*conv_shrink_size)(const ConvWeights& weights);  // bytes of the panels
  Index (*conv_grow_size)(const ConvWeights& weights);
  void (*conv_pack_shrink)(const ConvPackArgs& args);
  void (*conv_pack_grow)(const ConvPackArgs& args);
  void (*conv_shrink)(const ConvArgs& args);
  void (*conv_grow)(const ConvArgs& args);
  // The gradient of the weights in the core's own order, conv_gradient_size floats: set, or with
  // `add` added to. Of args only the sizes count. Scratch: bytes.
  Index (*conv_gradient_size)(const ConvWeights& weights);
  Index (*conv_gradient_scratch)(const ConvArgs& args);
  void (*conv_gradient)(const ConvArgs& args, Rows fine, Rows coarse, float* gradient, bool add,
                        void* scratch);
  // For elements [begin, end) of the kernel · kernel · fine.
  void (*conv_sum)(const ConvSumArgs& args, Index begin, Index end);
  // to = bytes/255 - 1/2, `count` of each image.
  void (*conv_pixels)(const unsigned char* from, Index count, Index images, Rows to);
  // sums[c] += Σ over images and pixels; `line` has width · channels floats of scratch.
  void (*conv_channel_sums)(Rows in, Index images, Index height, Index width, Index channels,
                            float* line, double* sums);
  // In place: nothing passes where `saved` is off.
  void (*conv_relu_backward)(Rows grad, Rows saved, Index cols, Index rows);
  void (*lambda_return_forward)(const LambdaReturnForward& args, Index begin, Index end);
  void (*lambda_return_backward)(const LambdaReturnBackward& args, Index begin, Index end);
  void (*evaluate)(Function function, const float* in, float* out, Index n);
  double (*peak)(Index iterations);  // multiply-adds that nothing holds up; returns their FLOP
};

extern const Kernels scalar_kernels[2];  // by Precision
#if FD_X86
extern const Kernels avx2_kernels[2], avx512_kernels[2], avx512bf16_kernels[2], amx_kernels[2],
    amx_emulated_kernels[2];
#endif

// The table of an instruction set that the host has, and that of the choice in force (see
// choice.h: the first call measures, and may throw).
const Kernels& kernels(Isa isa, Precision precision);
const Kernels& kernels(Precision precision = Precision::fp32);

}  // namespace fastdreamer
