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
  std::size_t parameters() const { return parameters_; }  // arrays of a list of gradients

  // Destinations for the gradients of these weights: a list of all weights, then all biases, of
  // layers with norms then the norms' weights and their biases; arrays, or None where there is
  // none.
  std::vector<LayerGrad> grads(Arrays& arrays, py::list flat) const;

 private:
  Precision precision_;
  bool gradients_;
  Index first_column_, total_columns_, rotate_;
  std::size_t parameters_;
  Mlp mlp_;
  Arena arena_;
};

// The input layers of a model: a PackedMlp of [s, a], or of branches (that of s, that of a, whether
// the outputs of a come first). It refers to them.
class PackedInp {
 public:
  explicit PackedInp(py::handle given);

  const PackedMlp& stoch() const { return *stoch_; }  // or all
  const PackedMlp* action() const { return action_; }
  bool action_first() const { return action_first_; }
  bool gradients() const {
    return stoch_->gradients() && (action_ == nullptr || action_->gradients());
  }

  // Of lists as PackedMlp takes them, one behind the other.
  void grads(Arrays& arrays, py::list flat, DeterGrads& to) const;

 private:
  const PackedMlp *stoch_, *action_ = nullptr;
  bool action_first_ = false;
};

// Which columns of a GRU's x come of the action where there are branches.
struct OfAction {
  Index count;  // 0: there are none
  bool first;   // else they are the last
};

// `action`: an OfAction's two.
class PackedGru {
 public:
  PackedGru(py::handle weight_ih, py::handle weight_hh, py::handle bias_ih, py::handle bias_hh,
            py::tuple action, bool bf16, bool gradients, int threads);

  // That of LateGruArgs: weight [3D, K + D] of [x, h] or, with deter_first, of [h, x]; bias [3D] or
  // None; norm as of a PackedMlp; gates: an order of "rcu".
  PackedGru(py::handle weight, py::handle bias, py::object norm, bool deter_first,
            const std::string& gates, double update_bias, py::tuple action, bool bf16,
            bool gradients, int threads);

  // That of Blocks: features a PackedMlp of h, the activation last; weights [G, in, out] of the
  // block layers, the first of [h's part, features]; biases, norms and activation as of a
  // PackedMlp.
  PackedGru(py::object features, py::list weights, py::list biases, py::list norms,
            const std::string& activation, bool features_first, double update_bias,
            py::tuple action, bool bf16, bool gradients, int threads);

  const Gru& gru() const { return gru_; }
  Precision precision() const { return precision_; }
  bool gradients() const { return gradients_; }
  const OfAction& action() const { return action_; }

  // Of (weight_ih, weight_hh, bias_ih, bias_hh) arrays, or (weight, bias, norm's weight, its bias);
  // of blocks the features' and the block layers', as PackedMlp takes them.
  void grads(Arrays& arrays, py::sequence flat, DeterGrads& to) const;

 private:
  // The panels of the gradient of x, of which K columns begin at `x` (see PackArgs).
  void pack_backward(const Kernels& k, std::vector<PackArgs>& jobs, const float* x, Index stride,
                     bool transposed, Index rotate, Index rows, Index K);

  Precision precision_;
  bool gradients_;
  OfAction action_;
  Gru gru_;
  py::object features_;  // kept: the blocks point into it
  std::unique_ptr<Blocks> blocks_;
  Arena arena_;
};

// Packs matrices and a GRU's weights (null: none), each panel a task: the largest matrix is half of
// a model's weights.
void pack_all(const Kernels& k, const std::vector<PackArgs>& matrices, const GruPackArgs* gru,
              int threads);

// Of (kind, scale, slope, offset, min, floor).
StdTransform make_std(const char* op, py::tuple std);
// Of the same, or of (classes, unimix, gumbel), for prior or posterior with so many outputs.
Latent make_latent(const char* op, py::tuple latent, Index outputs);

// Of (mlp, mean_scale, std or (classes, unimix, gumbel), squash), for features and actions of those
// sizes.
Actor make_actor(const char* op, py::tuple four, Precision precision, Index feat, Index A,
                 bool gradients);

// Of (bins or None, squashed), for a head with so many outputs.
Readout make_readout(const char* name, Arrays& arrays, py::tuple readout, Index outputs);

// Puts the parts of a model together; throws if their sizes or precisions do not fit. The latter is
// for one whose distribution has so many outputs, its prior unchecked.
Rssm make_rssm(const char* op, const PackedInp& inp, const PackedGru& gru, const PackedMlp& prior,
               py::tuple latent);
Rssm make_dynamics(const char* op, const PackedInp& inp, const PackedGru& gru, const Mlp& prior,
                   py::tuple latent, Index outputs);
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
