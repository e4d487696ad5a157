// Multilayer perceptrons over a tile of rows: forward, gradients of inputs, and the weight
// gradients of a whole batch afterwards.
#pragma once

#include <vector>

#include "cpu/arena.h"
#include "cpu/kernels.h"

namespace fastdreamer {

constexpr int kMaxLayers = 16;
constexpr Floats kNoFloats{nullptr, 0};
constexpr Rows kNoRows{nullptr, 0};

// Activations or gradients of a whole call: rows of Elem in one block.
struct Buffer {
  char* data = nullptr;
  Index stride = 0;  // elements
  int elem_size = 0;

  Rows at(Index row, Index col = 0) const {
    if (data == nullptr) return kNoRows;
    return {data + (row * stride + col) * elem_size, stride};
  }
  // The columns from `col` on.
  Buffer from(Index col) const { return {data + col * elem_size, stride, elem_size}; }
};

// The same of floats; the memory may be a caller's.
struct FloatBuffer {
  float* data = nullptr;
  Index stride = 0;

  Floats at(Index row, Index col = 0) const {
    return {data == nullptr ? nullptr : data + row * stride + col, stride};
  }
};

// The same rows from column `begin` on; no data stays none.
Rows columns(const Kernels& k, Rows rows, Index begin);

// to += from, unless `from` has no data.
void add_rows(const Kernels& k, Floats from, Index cols, Index rows, Floats to);

// Rows of a caller's array, or none of null; they are only read where the caller's data is const.
inline FloatBuffer rows_of(const float* data, Index width) {
  return {const_cast<float*>(data), width};
}

Buffer take_rows(Arena& arena, const Kernels& k, Index rows, Index width);
FloatBuffer take_floats(Arena& arena, Index rows, Index width);

struct Layer {
  Index in, out;
  Panels forward;     // [in, out]
  Panels backward;    // [out, in]; null data unless packed for gradients
  const float* bias;  // [out]
  const float* row;   // [in]: the weight of a layer with one output; else null
  Norm norm{};        // of what an activation follows
};

struct Mlp {
  int depth;
  Activation act;
  bool act_last;  // whether the activation follows the last layer, too
  Layer layers[kMaxLayers];

  Index in() const { return layers[0].in; }
  Index out() const { return layers[depth - 1].out; }
};

// What layers put out behind their activations (`hidden`), or the gradients of their sums.
struct MlpBuffers {
  Buffer hidden[kMaxLayers];
  Buffer slope[kMaxLayers];         // the derivative, where saves_slope(); else without data
  Buffer normed[kMaxLayers];        // x̂ of layers with a norm, or the gradients behind it
  FloatBuffer inverse[kMaxLayers];  // [1], as NormArgs
};

// Buffers for `rows` rows. With `keep` every layer has its own; else the layers take turns on two,
// which is enough for a forward pass.
MlpBuffers take_mlp(Arena& arena, const Kernels& k, const Mlp& mlp, Index rows, bool keep);

// Room for the gradients of the sums of every layer.
MlpBuffers take_deltas(Arena& arena, const Kernels& k, const Mlp& mlp, Index rows);

// The same for an MLP with a single output, whose own gradient is 1: as `backward` takes it.
MlpBuffers take_unit_deltas(Arena& arena, const Kernels& k, const Mlp& mlp, Index rows);

// Runs `rows` rows. A last layer without activation goes to `out` [rows, out]; `add` (or null
// data) is added before the first activation; `ones` are those of `in`. `row` is where in the
// buffers the tile lies.
void forward(const Kernels& k, const Mlp& mlp, Rows in, Index rows, const MlpBuffers& buffers,
             Index row, Floats out, Floats add = kNoFloats, const Ones& ones = {});

// Whether a head's only output is its number.
bool plain(const Mlp& mlp, const Readout& as);

// The numbers of a head, [rows], to `out`: forward(), and what its outputs, which go to `raw` if
// there are several, mean. Their derivatives by the outputs go to `slope` (or no data), of a plain
// head none.
void read_forward(const Kernels& k, const Mlp& mlp, const Readout& as, Rows in, Index rows,
                  const MlpBuffers& buffers, Index row, Floats raw, float* out, Rows slope,
                  const Ones& ones);

// Where the gradient before the activation of layer i goes, which through_norm() takes on to
// deltas.hidden[i]; without a norm it goes there at once.
Rows behind_norm(const Mlp& mlp, const MlpBuffers& deltas, int i, Index row);
void through_norm(const Kernels& k, const Mlp& mlp, int i, const MlpBuffers& saved, Index saved_row,
                  const MlpBuffers& deltas, Index delta_row, Index rows);
// The saved values that its activation's derivative is computed from.
Rows slope_of(const Mlp& mlp, const MlpBuffers& saved, int i, Index row);

// From deltas of what takes an MLP's active outputs, with weights w, to those of its last layer.
void backward_through(const Kernels& k, const Mlp& mlp, const Panels& w, Rows deltas_behind,
                      const MlpBuffers& saved, Index saved_row, const MlpBuffers& deltas,
                      Index delta_row, Index rows);

// From deltas.hidden[depth - 1] (without data: from 1, the single output's) to the deltas of all
// layers before, and the gradient of the input: into `in_grad` (or null), added to it with
// `add`, and into `in_grad_elem` (or null).
void backward(const Kernels& k, const Mlp& mlp, const MlpBuffers& saved, Index saved_row,
              const MlpBuffers& deltas, Index delta_row, Index rows, Floats in_grad, bool add,
              Rows in_grad_elem = kNoRows);

// Where the gradients of one layer go: [out, in] with the columns rotated as the weight's own.
struct LayerGrad {
  float* weight;
  Index stride;
  float* bias;                                         // or null
  float *norm_weight = nullptr, *norm_bias = nullptr;  // or null
};

// Collects weight gradients and computes them together, split by outputs over threads, each a sum
// over all rows in their order: equal for every number of threads.
class WeightGradients {
 public:
  explicit WeightGradients(const Kernels& k) : kernels_(k) {}

  // weight_grad[:, (i + rotate) % in] = Σ scale delta x[:, i]; scale null: 1; delta null: 1.
  void add(Rows x, Index in, Rows delta, Index out, Index rows, const float* scale, LayerGrad grad,
           Index rotate = 0);

  // Of a norm's weight and bias, where they have a gradient.
  void add_norm(Rows delta, Rows normed, Index N, Index rows, const float* scale,
                const LayerGrad& grad);

  // to[c] = Σ delta[:, c], of N columns; to null: not wanted.
  void add_sums(Rows delta, Index N, Index rows, float* to);

  // Every layer of an MLP whose deltas are complete.
  void add(const Mlp& mlp, Rows in, const MlpBuffers& saved, const MlpBuffers& deltas, Index rows,
           const float* scale, const LayerGrad* grads, Index rotate = 0);

  // Takes scratch from the arena (with the GIL held) ...
  void prepare(Arena& arena, int threads);
  // ... and computes (without).
  void run() const;

 private:
  const Kernels& kernels_;
  std::vector<WeightGradientArgs> jobs_;
  std::vector<NormGradientArgs> norms_;
  std::vector<void*> scratch_;
  int threads_ = 1;
};

}  // namespace fastdreamer
