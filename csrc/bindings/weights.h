// Packed weights as Python holds them: immutable, so that calls on several threads, and tapes, may
// share them while others are packed anew.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bindings/array.h"
#include "cpu/rssm_step.h"

namespace fastdreamer {

// The layers of an MLP. Of the first layer's columns a range can be taken ([deter, embed] is used
// in two parts), and rotated: input element i meets column (i + rotate) % inputs of the range.
class PackedMlp {
 public:
  // norms: none, or (kind, weight, bias, eps) or None per layer.
  PackedMlp(py::list weights, py::list biases, py::list norms, const std::string& activation,
            bool act_last, bool bf16, bool gradients, Index first_column, Index columns,
            Index rotate, int threads);

  const Mlp& mlp() const { return mlp_; }
  Precision precision() const { return precision_; }
  bool gradients() const { return gradients_; }
  Index rotate() const { return rotate_; }
  Index first_column() const { return first_column_; }

  // Destinations for the gradients of these weights: a list of all weights, then all biases, of
  // layers with norms then the norms' weights and their biases; arrays, or None where there is
  // none.
  std::vector<LayerGrad> grads(Arrays& arrays, py::list flat) const;

 private:
  Precision precision_;
  bool gradients_;
  Index first_column_, total_columns_, rotate_;
  Mlp mlp_;
  Arena arena_;
};

class PackedGru {
 public:
  PackedGru(py::handle weight_ih, py::handle weight_hh, py::handle bias_ih, py::handle bias_hh,
            bool bf16, bool gradients, int threads);

  // That of LateGruArgs: weight [3D, K + D] of [x, h] or, with deter_first, of [h, x]; bias [3D] or
  // None; norm as of a PackedMlp; gates: an order of "rcu".
  PackedGru(py::handle weight, py::handle bias, py::object norm, bool deter_first,
            const std::string& gates, double update_bias, bool bf16, bool gradients, int threads);

  const Gru& gru() const { return gru_; }
  Precision precision() const { return precision_; }
  bool gradients() const { return gradients_; }

  // Of (weight_ih, weight_hh, bias_ih, bias_hh) arrays, or (weight, bias, norm's weight, its bias).
  void grads(Arrays& arrays, py::sequence four, LayerGrad& ih, LayerGrad& hh) const;

 private:
  Precision precision_;
  bool gradients_;
  Gru gru_;
  Arena arena_;
};

// Packs matrices and a GRU's weights (null: none), each panel a task: the largest matrix is half of
// a model's weights.
void pack_all(const Kernels& k, const std::vector<PackArgs>& matrices, const GruPackArgs* gru,
              int threads);

// Of (kind, scale, slope, offset, min, floor).
StdTransform make_std(const char* op, py::tuple std);
// Of the same, or of (classes, unimix), for prior or posterior with so many outputs.
Latent make_latent(const char* op, py::tuple latent, Index outputs);

// Of (mlp, mean_scale, std or (classes, unimix), squash), for features and actions of those sizes.
Actor make_actor(const char* op, py::tuple four, Precision precision, Index feat, Index A,
                 bool gradients);

// Of (bins or None, squashed), for a head with so many outputs.
Readout make_readout(const char* name, Arrays& arrays, py::tuple readout, Index outputs);

// Puts the parts of a model together; throws if their sizes or precisions do not fit.
Rssm make_rssm(const char* op, const PackedMlp& inp, const PackedGru& gru, const PackedMlp& prior,
               py::tuple latent);
void check_mlp(const char* op, const char* name, const PackedMlp& mlp, Precision precision,
               Index in, Index out, bool gradients);

// Throws unless λ is in [0, 1]; returns it.
double check_lam(const char* op, double lam);

// The λ-return's constants in a loop's arguments, each rounded once from double.
template <class Args>
void set_returns(const char* op, py::handle gamma, py::handle lam, Args& to) {
  const double checked = check_lam(op, lam.cast<double>());
  to.gamma = gamma.cast<float>();
  to.lam = static_cast<float>(checked);
  to.mix = static_cast<float>(1.0 - checked);
}

void bind_weights(py::module_& m);

}  // namespace fastdreamer
