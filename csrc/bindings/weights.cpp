#include "bindings/weights.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "bindings/gil.h"
#include "cpu/parallel.h"

namespace fastdreamer {
namespace {

Activation activation_of(const std::string& name) {
  if (name == "elu") return Activation::elu;
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  if (name == "tanh") return Activation::tanh;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "mish") return Activation::mish;
  fail("activation must be elu, relu, silu, tanh, gelu, gelu_tanh or mish, got '" + name + "'");
}

// Throws unless there are 1 to kMaxLayers weights, as many biases and a norm for `active` layers at
// most; returns how many layers there are.
int depth_of(const std::string& op, const py::list& weights, const py::list& biases,
             const py::list& norms, bool act_last) {
  const std::size_t depth = weights.size();
  if (depth < 1 || depth > kMaxLayers || biases.size() != depth) {
    fail(op + ": there must be 1 to " + std::to_string(kMaxLayers) +
         " layers with a bias or None each, got " + std::to_string(depth) + " weights and " +
         std::to_string(biases.size()) + " biases");
  }
  const std::size_t active = act_last ? depth : depth - 1;
  if (norms.size() > active) {
    fail(op + ": there are " + std::to_string(norms.size()) + " norms, but an activation after " +
         std::to_string(active) + " layers");
  }
  return static_cast<int>(depth);
}

Panels take_panels(Arena& arena, const Kernels& k, Index K, Index N) {
  return {arena.bytes(k.panels_size(K, N)), K, N};
}

float* copy_floats(Arena& arena, const float* from, Index count) {
  float* to = arena.take<float>(count);
  std::copy_n(from, count, to);
  return to;
}

// Of (kind, weight, bias, eps) over so many outputs, or None.
Norm make_norm(Arena& arena, Arrays& arrays, py::handle norm, Index out) {
  if (norm.is_none()) return {};
  const py::tuple four = py::cast<py::tuple>(norm);
  if (four.size() != 4) fail("norm must be (kind, weight, bias, eps)");
  const std::string kind = four[0].cast<std::string>();
  if (kind != "layer" && kind != "rms") fail("norm must be layer or rms, got '" + kind + "'");
  const auto copied = [&](const char* name, py::handle array) -> const float* {
    const float* from = arrays.maybe_in(name, array, {out});
    return from == nullptr ? from : copy_floats(arena, from, out);
  };
  return {kind == "rms" ? NormKind::rms : NormKind::layer, four[3].cast<float>(),
          copied("norm weight", four[1]), copied("norm bias", four[2])};
}

// Where the gradients of a layer's bias and norm go, in a list of `depth` weights, as many biases
// and, perhaps, norms.
LayerGrad layer_grad(Arrays& arrays, const py::list& flat, std::size_t depth, std::size_t i,
                     const Layer& layer, float* weight, Index stride) {
  LayerGrad grad{weight, stride, arrays.maybe_out("bias gradient", flat[depth + i], {layer.out})};
  if (flat.size() > 2 * depth && layer.norm) {
    grad.norm_weight = arrays.maybe_out("norm's weight gradient", flat[2 * depth + i], {layer.out});
    grad.norm_bias = arrays.maybe_out("norm's bias gradient", flat[3 * depth + i], {layer.out});
  }
  return grad;
}

// Items [begin, end).
py::list part_of(const py::sequence& items, std::size_t begin, std::size_t end) {
  py::list part;
  for (std::size_t i = begin; i < end; ++i) part.append(items[i]);
  return part;
}

}  // namespace

void pack_all(const Kernels& k, const std::vector<PackArgs>& matrices, const GruPackArgs* gru,
              int threads) {
  struct Task {
    const PackArgs* matrix;  // null: the GRU's
    Index panel;
  };
  std::vector<Task> tasks;
  for (Index i = 0; gru != nullptr && i < k.gru_panel_count(gru->to.D); ++i) {
    tasks.push_back({nullptr, i});
  }
  for (const PackArgs& matrix : matrices) {
    for (Index i = 0; i < k.panel_count(matrix.to.N); ++i) tasks.push_back({&matrix, i});
  }
  const WithoutGil released;
  parallel_tasks(static_cast<Index>(tasks.size()), threads, [&](Index i, int) {
    const Task& task = tasks[static_cast<std::size_t>(i)];
    if (task.matrix == nullptr) {
      k.pack_gru(*gru, task.panel);
    } else {
      k.pack(*task.matrix, task.panel);
    }
  });
}

PackedMlp::PackedMlp(py::list weights, py::list biases, py::list norms,
                     const std::string& activation, bool act_last, bool bf16, bool gradients,
                     Index first_column, Index columns, Index rotate, int threads)
    : precision_(bf16 ? Precision::bf16 : Precision::fp32),
      gradients_(gradients),
      first_column_(first_column),
      rotate_(rotate) {
  const char* op = "PackedMlp";
  const Kernels& k = kernels(precision_);
  mlp_.depth = depth_of(op, weights, biases, norms, act_last);
  parameters_ = static_cast<std::size_t>(mlp_.depth) * (norms.empty() ? 2 : 4);
  mlp_.act = activation_of(activation);
  mlp_.act_last = act_last;
  Arrays arrays(op);
  std::vector<PackArgs> jobs;
  for (int i = 0; i < mlp_.depth; ++i) {
    const Array shape(op, "weight", weights[static_cast<std::size_t>(i)]);
    if (shape.ndim() != 2 || shape.size(0) < 1 || shape.size(1) < 1) {
      fail("PackedMlp: a weight must have 2 dimensions, none of them 0");
    }
    const Index out = shape.size(0), total = shape.size(1);
    Index in = total;
    const float* weight = arrays.in("weight", weights[static_cast<std::size_t>(i)], {out, total});
    if (i == 0) {
      total_columns_ = total;
      if (columns > 0) in = columns;
      if (first_column < 0 || first_column + in > total || rotate < 0 || rotate >= in) {
        fail("PackedMlp: columns or rotation are out of range");
      }
      weight += first_column;
    } else if (in != mlp_.layers[i - 1].out) {
      fail("PackedMlp: a layer takes " + std::to_string(in) + " inputs, the one before has " +
           std::to_string(mlp_.layers[i - 1].out) + " outputs");
    }
    Layer& layer = mlp_.layers[i];
    layer = {in, out, take_panels(arena_, k, in, out), {nullptr, out, in}, nullptr, nullptr};
    const Index turn = i == 0 ? rotate : 0;
    jobs.push_back({weight, total, true, turn, 0, layer.forward});
    if (gradients) {
      layer.backward = take_panels(arena_, k, out, in);
      jobs.push_back({weight, total, false, 0, turn, layer.backward});
    }
    const float* bias = arrays.maybe_in("bias", biases[static_cast<std::size_t>(i)], {out});
    if (bias != nullptr) layer.bias = copy_floats(arena_, bias, out);
    if (i < static_cast<int>(norms.size())) {
      layer.norm = make_norm(arena_, arrays, norms[static_cast<std::size_t>(i)], out);
    }
    if (out == 1) {
      float* row = arena_.take<float>(in);
      for (Index c = 0; c < in; ++c) row[c] = weight[(c + turn) % in];
      layer.row = row;
    }
  }
  pack_all(k, jobs, nullptr, threads);
}

std::vector<LayerGrad> PackedMlp::grads(Arrays& arrays, py::list flat) const {
  std::vector<LayerGrad> list;
  const auto depth = static_cast<std::size_t>(mlp_.depth);
  if (flat.size() != parameters_) fail("PackedMlp: a gradient for every parameter");
  for (std::size_t i = 0; i < depth; ++i) {
    const Layer& layer = mlp_.layers[i];
    const Index stride = i == 0 ? total_columns_ : layer.in;
    float* weight = arrays.out("weight gradient", flat[i], {layer.out, stride});
    if (i == 0) weight += first_column_;
    list.push_back(layer_grad(arrays, flat, depth, i, layer, weight, stride));
  }
  return list;
}

PackedInp::PackedInp(py::handle given) {
  if (py::isinstance<PackedMlp>(given)) {
    stoch_ = given.cast<const PackedMlp*>();
    return;
  }
  const py::tuple three = given.cast<py::tuple>();
  stoch_ = three[0].cast<const PackedMlp*>();
  action_ = three[1].cast<const PackedMlp*>();
  action_first_ = three[2].cast<bool>();
}

void PackedInp::grads(Arrays& arrays, py::list flat, DeterGrads& to) const {
  const std::size_t count = stoch_->parameters();
  to.rotate = stoch_->rotate();
  if (action_ == nullptr) {
    to.inp = stoch_->grads(arrays, flat);
    return;
  }
  if (flat.size() < count) fail("PackedMlp: a gradient for every parameter");
  to.inp = stoch_->grads(arrays, part_of(flat, 0, count));
  to.action = action_->grads(arrays, part_of(flat, count, flat.size()));
}

void PackedGru::pack_backward(const Kernels& k, std::vector<PackArgs>& jobs, const float* x,
                              Index stride, bool transposed, Index rotate, Index rows, Index K) {
  const auto part = [&](Index first, Index count) {
    const Panels to = take_panels(arena_, k, rows, count);
    jobs.push_back({x + first * (transposed ? stride : 1), stride, transposed, rotate, 0, to});
    return to;
  };
  const Index count = action_.count;
  if (count < 0 || count >= K) fail("PackedGru: action has a part of the inputs");
  gru_.backward_ih = part(action_.first ? count : 0, K - count);
  if (count > 0) gru_.backward_action = part(action_.first ? 0 : K - count, count);
}

PackedGru::PackedGru(py::handle weight_ih, py::handle weight_hh, py::handle bias_ih,
                     py::handle bias_hh, py::tuple action, bool bf16, bool gradients, int threads)
    : precision_(bf16 ? Precision::bf16 : Precision::fp32),
      gradients_(gradients),
      action_{action[0].cast<Index>(), action[1].cast<bool>()} {
  const char* op = "PackedGru";
  const Kernels& k = kernels(precision_);
  const Array shape(op, "weight_ih", weight_ih);
  if (shape.ndim() != 2 || shape.size(0) < 3 || shape.size(0) % 3 != 0 || shape.size(1) < 1) {
    fail("PackedGru: weight_ih must be [3D, inputs]");
  }
  const Index D = shape.size(0) / 3, K = shape.size(1);
  Arrays arrays(op);
  const float* ih = arrays.in("weight_ih", weight_ih, {3 * D, K});
  const float* hh = arrays.in("weight_hh", weight_hh, {3 * D, D});
  const float* bi = arrays.in("bias_ih", bias_ih, {3 * D});
  const float* bh = arrays.in("bias_hh", bias_hh, {3 * D});
  float* bias = arena_.take<float>(4 * D);
  for (Index i = 0; i < D; ++i) {
    bias[i] = bi[i] + bh[i];
    bias[D + i] = bi[D + i] + bh[D + i];
    bias[2 * D + i] = bi[2 * D + i];
    bias[3 * D + i] = bh[2 * D + i];
  }
  gru_ = {{arena_.bytes(k.gru_panels_size(K, D)), K, D},
          bias,
          {nullptr, 3 * D, K},
          {nullptr, 3 * D, D}};
  std::vector<PackArgs> backward;
  if (gradients) {
    pack_backward(k, backward, ih, K, false, 2 * D, 3 * D, K);
    gru_.backward_hh = take_panels(arena_, k, 3 * D, D);
    backward.push_back({hh, D, false, 0, 0, gru_.backward_hh});
  }
  const GruPackArgs forward{ih, hh, gru_.forward};
  pack_all(k, backward, &forward, threads);
}

PackedGru::PackedGru(py::handle weight, py::handle bias, py::object norm, bool deter_first,
                     const std::string& gates, double update_bias, py::tuple action, bool bf16,
                     bool gradients, int threads)
    : precision_(bf16 ? Precision::bf16 : Precision::fp32),
      gradients_(gradients),
      action_{action[0].cast<Index>(), action[1].cast<bool>()} {
  const char* op = "PackedGru";
  const Kernels& k = kernels(precision_);
  const Array shape(op, "weight", weight);
  const Index D = shape.ndim() == 2 ? shape.size(0) / 3 : 0, all = D > 0 ? shape.size(1) : 0;
  const Index K = all - D;
  if (D < 1 || K < 1 || shape.size(0) != 3 * D) fail("PackedGru: weight must be [3D, inputs + D]");
  const auto column = [&](char gate) {
    const auto place = gates.find(gate);
    if (gates.size() != 3 || place == std::string::npos) {
      fail("PackedGru: gates must be r, c and u in some order, got '" + gates + "'");
    }
    return static_cast<Index>(place) * D;
  };
  Arrays arrays(op);
  const float* from = arrays.in("weight", weight, {3 * D, all});
  const float* added = arrays.maybe_in("bias", bias, {3 * D});
  gru_ = {{nullptr, K, D},
          added == nullptr ? added : copy_floats(arena_, added, 3 * D),
          {nullptr, 3 * D, K},
          {nullptr, 3 * D, D}};
  gru_.joint = take_panels(arena_, k, all, 3 * D);
  gru_.norm = make_norm(arena_, arrays, norm, 3 * D);
  gru_.at = {D, column('r'), column('c'), column('u'), static_cast<float>(update_bias)};
  gru_.rotate = deter_first ? D : 0;
  std::vector<PackArgs> jobs{{from, all, true, gru_.rotate, 0, gru_.joint}};
  if (gradients) {
    pack_backward(k, jobs, from + gru_.rotate, all, false, 0, 3 * D, K);
    gru_.backward_hh = take_panels(arena_, k, 3 * D, D);
    jobs.push_back({from + (deter_first ? 0 : K), all, false, 0, 0, gru_.backward_hh});
  }
  pack_all(k, jobs, nullptr, threads);
}

PackedGru::PackedGru(py::object features, py::list weights, py::list biases, py::list norms,
                     const std::string& activation, bool features_first, double update_bias,
                     py::tuple action, bool bf16, bool gradients, int threads)
    : precision_(bf16 ? Precision::bf16 : Precision::fp32),
      gradients_(gradients),
      action_{action[0].cast<Index>(), action[1].cast<bool>()},
      features_(features),
      blocks_(std::make_unique<Blocks>()) {
  const char* op = "PackedGru";
  const Kernels& k = kernels(precision_);
  const PackedMlp& packed = features.cast<const PackedMlp&>();
  const Index D = packed.mlp().in();
  check_mlp(op, "features", packed, precision_, D, packed.mlp().out(), gradients);
  if (!packed.mlp().act_last) fail("PackedGru: an activation follows the features");
  Blocks& blocks = *blocks_;
  Mlp& mlp = blocks.mlp;
  mlp.depth = depth_of(op, weights, biases, norms, false);
  mlp.act = activation_of(activation);
  mlp.act_last = false;
  blocks.features = packed.mlp();
  blocks.features_first = features_first;
  Arrays arrays(op);
  std::vector<PackArgs> jobs;
  std::vector<float> joined;  // [features, out] of the first layer: of all blocks
  const auto take = [&](std::vector<Panels>& to, Index K, Index N, const float* from, Index stride,
                        bool transposed) {
    to.push_back(take_panels(arena_, k, K, N));
    jobs.push_back({from, stride, transposed, 0, 0, to.back()});
  };
  for (int i = 0; i < mlp.depth; ++i) {
    const py::handle given = weights[static_cast<std::size_t>(i)];
    const Array shape(op, "weight", given);
    const Index G = i > 0 ? blocks.count : shape.ndim() == 3 ? shape.size(0) : 0;
    if (shape.ndim() != 3 || G < 1 || D % G != 0 || shape.size(1) < 1 || shape.size(2) < 1) {
      fail("PackedGru: a block layer's weight must be [blocks, in, out], with blocks that divide " +
           std::to_string(D));
    }
    blocks.count = G;
    const Index total = shape.size(1), out = shape.size(2);
    const Index in = i == 0 ? D / G : mlp.layers[i - 1].out / G, all = i == 0 ? total - in : 0;
    const Index K = all - packed.mlp().out();
    if (i == 0 && K < 1) fail("PackedGru: the first block layer takes h's part and all features");
    const float* weight = arrays.in("weight", given, {G, in + all, out});
    Layer& layer = mlp.layers[i];
    layer = {G * in,  G * out, {nullptr, G * in, G * out}, {nullptr, G * out, G * in},
             nullptr, nullptr};
    const float* bias = arrays.maybe_in("bias", biases[static_cast<std::size_t>(i)], {G * out});
    if (bias != nullptr) layer.bias = copy_floats(arena_, bias, G * out);
    if (i < static_cast<int>(norms.size())) {
      layer.norm = make_norm(arena_, arrays, norms[static_cast<std::size_t>(i)], G * out);
    }
    for (Index g = 0; g < G; ++g) {
      const float* from = weight + g * (in + all) * out;
      take(blocks.forward, in, out, from, out, false);
      if (i == 0) take(blocks.shared, all, out, from + in * out, out, false);
      if (gradients) take(blocks.backward, out, in, from, out, true);
    }
    if (i > 0) continue;
    gru_ = {{nullptr, K, D}, nullptr, {nullptr, G * out, K}, {nullptr, 3 * D, D}};
    if (!gradients) continue;
    joined.resize(static_cast<std::size_t>(all * G * out));
    float* to = joined.data();
    for (Index f = 0; f < all; ++f) {
      for (Index g = 0; g < G; ++g, to += out) {
        std::copy_n(weight + (g * (in + all) + in + f) * out, out, to);
      }
    }
    const Index width = G * out, own = packed.mlp().out();
    blocks.backward_features = take_panels(arena_, k, width, own);
    jobs.push_back({joined.data() + (features_first ? 0 : K * width), width, true, 0, 0,
                    blocks.backward_features});
    pack_backward(k, jobs, joined.data() + (features_first ? own * width : 0), width, true, 0,
                  width, K);
  }
  if (mlp.out() != 3 * D) fail("PackedGru: the last block layer must put out 3 times what h has");
  gru_.at.update_bias = static_cast<float>(update_bias);
  gru_.blocks = &blocks;
  pack_all(k, jobs, nullptr, threads);
}

void PackedGru::grads(Arrays& arrays, py::sequence flat, DeterGrads& to) const {
  const Index D = gru_.forward.D, K = gru_.forward.K;
  if (blocks_ != nullptr) {
    const PackedMlp& features = features_.cast<const PackedMlp&>();
    const Mlp& mlp = blocks_->mlp;
    const std::size_t count = features.parameters(), depth = static_cast<std::size_t>(mlp.depth);
    const std::size_t rest = flat.size() - std::min(count, flat.size());
    if (rest != 2 * depth && rest != 4 * depth) fail("PackedGru: a gradient for every parameter");
    to.features = features.grads(arrays, part_of(flat, 0, count));
    const py::list own = part_of(flat, count, flat.size());
    for (std::size_t i = 0; i < depth; ++i) {
      const Layer& layer = mlp.layers[i];
      const Index G = blocks_->count, out = layer.out / G;
      const Index in = layer.in / G + (i == 0 ? blocks_->all(K) : 0);
      float* weight = arrays.out("weight gradient", own[i], {G, in, out});
      to.blocks.push_back(layer_grad(arrays, own, depth, i, layer, weight, out));
    }
  } else if (gru_.late()) {
    to.ih = {arrays.out("weight gradient", flat[0], {3 * D, K + D}), K + D,
             arrays.maybe_out("bias gradient", flat[1], {3 * D}),
             arrays.maybe_out("norm's weight gradient", flat[2], {3 * D}),
             arrays.maybe_out("norm's bias gradient", flat[3], {3 * D})};
  } else {
    to.ih = {arrays.out("weight_ih gradient", flat[0], {3 * D, K}), K,
             arrays.out("bias_ih gradient", flat[2], {3 * D})};
    to.hh = {arrays.out("weight_hh gradient", flat[1], {3 * D, D}), D,
             arrays.out("bias_hh gradient", flat[3], {3 * D})};
  }
}

void check_mlp(const char* op, const char* name, const PackedMlp& packed, Precision precision,
               Index in, Index out, bool gradients) {
  const Mlp& mlp = packed.mlp();
  if (mlp.in() != in || mlp.out() != out) {
    fail(std::string(op) + ": " + name + " must map " + std::to_string(in) + " to " +
         std::to_string(out) + ", not " + std::to_string(mlp.in()) + " to " +
         std::to_string(mlp.out()));
  }
  if (packed.precision() != precision) fail(std::string(op) + ": weights of two precisions");
  if (gradients && !packed.gradients()) {
    fail(std::string(op) + ": " + name + " was not packed for gradients");
  }
}

StdTransform make_std(const char* op, py::tuple std) {
  if (std.size() != 6) {
    fail(std::string(op) + ": std must be (kind, scale, slope, offset, min, floor)");
  }
  const std::string kind = std[0].cast<std::string>();
  StdTransform t{};
  if (kind == "softplus") {
    t.kind = StdKind::softplus;
  } else if (kind == "sigmoid") {
    t.kind = StdKind::sigmoid;
  } else if (kind == "exp") {
    t.kind = StdKind::exp;
  } else {
    fail(std::string(op) + ": std must be softplus, sigmoid or exp, got '" + kind + "'");
  }
  t.scale = std[1].cast<float>(), t.slope = std[2].cast<float>(), t.offset = std[3].cast<float>();
  t.min = std[4].cast<float>(), t.floor = std[5].cast<float>();
  return t;
}

Latent make_latent(const char* op, py::tuple latent, Index outputs) {
  if (latent.size() != 3) return {0, 0.0f, false, make_std(op, latent)};
  const Index classes = latent[0].cast<Index>();
  const float unimix = latent[1].cast<float>();
  if (classes < 1 || outputs % classes != 0 || !(unimix >= 0 && unimix <= 1)) {
    fail(std::string(op) + ": " + std::to_string(outputs) + " logits make no categoricals of " +
         std::to_string(classes) + " classes, " + std::to_string(unimix) + " of them uniform");
  }
  return {classes, unimix, latent[2].cast<bool>(), {}};
}

Actor make_actor(const char* op, py::tuple four, Precision precision, Index feat, Index A,
                 bool gradients) {
  const PackedMlp& packed = four[0].cast<const PackedMlp&>();
  const std::string squash = four[3].cast<std::string>();
  Actor actor{packed.mlp(), four[1].cast<float>(), {}, Squash::tanh, false, false};
  actor.latent = make_latent(op, four[2].cast<py::tuple>(), A);
  check_mlp(op, "actor", packed, precision, feat, actor.raw(A), gradients);
  if (!(actor.mean_scale > 0)) fail(std::string(op) + ": mean_scale must be positive");
  if (squash == "none") {
    actor.squash = Squash::none;
  } else if (squash == "bound") {
    actor.squash = Squash::bound;
  } else if (squash == "clip") {
    actor.squash = Squash::clip;
  } else if (squash != "tanh") {
    fail(std::string(op) + ": squash must be tanh, none, bound or clip, got '" + squash + "'");
  }
  return actor;
}

Readout make_readout(const char* name, Arrays& arrays, py::tuple readout, Index outputs) {
  return {arrays.maybe_in(name, readout[0], {outputs}), readout[1].cast<bool>()};
}

Rssm make_rssm(const char* op, const PackedInp& inp, const PackedGru& gru, const PackedMlp& prior,
               py::tuple latent) {
  const Rssm rssm = make_dynamics(op, inp, gru, prior.mlp(), latent, prior.mlp().out());
  check_mlp(op, "prior", prior, gru.precision(), rssm.D, rssm.raw(), false);
  return rssm;
}

Rssm make_dynamics(const char* op, const PackedInp& inp, const PackedGru& gru, const Mlp& prior,
                   py::tuple latent, Index outputs) {
  const Index D = gru.gru().forward.D, K = gru.gru().forward.K;
  const Latent made = make_latent(op, latent, outputs);
  const Index S = made.classes > 0 ? outputs : outputs / 2;
  const PackedMlp &stoch = inp.stoch(), *action = inp.action();
  const Index A = action == nullptr ? stoch.mlp().in() - S : action->mlp().in();
  const Index apart = action == nullptr ? 0 : action->mlp().out();  // columns of K
  if (A < 1 || S < 1) fail(std::string(op) + ": the model has no action or no stochastic state");
  check_mlp(op, "inp", stoch, gru.precision(), action == nullptr ? S + A : S, K - apart, false);
  if (action != nullptr) {
    check_mlp(op, "inp's action", *action, gru.precision(), A, apart, false);
  }
  if (gru.action().count != apart || gru.action().first != inp.action_first()) {
    fail(std::string(op) + ": the GRU was packed for other inputs");
  }
  Rssm rssm{A, D, S, stoch.mlp(), gru.gru(), prior, made};
  if (action != nullptr) rssm.action = &action->mlp(), rssm.action_first = inp.action_first();
  return rssm;
}

double check_lam(const char* op, double lam) {
  if (!(lam >= 0.0 && lam <= 1.0)) {
    fail(std::string(op) + ": lam must be in [0, 1], got " + std::to_string(lam));
  }
  return lam;
}

void bind_weights(py::module_& m) {
  py::class_<PackedMlp, std::shared_ptr<PackedMlp>>(m, "PackedMlp",
                                                    "Packed layers; see csrc/bindings/weights.h.")
      .def(py::init<py::list, py::list, py::list, const std::string&, bool, bool, bool, Index,
                    Index, Index, int>(),
           py::arg("weights"), py::arg("biases"), py::arg("norms"), py::arg("activation"),
           py::arg("act_last"), py::arg("bf16"), py::arg("gradients"), py::arg("first_column"),
           py::arg("columns"), py::arg("rotate"), py::arg("threads"))
      .def_property_readonly("gradients", &PackedMlp::gradients);
  py::class_<PackedGru, std::shared_ptr<PackedGru>>(m, "PackedGru", "A packed GRU cell.")
      .def(py::init<py::handle, py::handle, py::handle, py::handle, py::tuple, bool, bool, int>(),
           py::arg("weight_ih"), py::arg("weight_hh"), py::arg("bias_ih"), py::arg("bias_hh"),
           py::arg("action"), py::arg("bf16"), py::arg("gradients"), py::arg("threads"))
      .def(py::init<py::handle, py::handle, py::object, bool, const std::string&, double, py::tuple,
                    bool, bool, int>(),
           py::arg("weight"), py::arg("bias"), py::arg("norm"), py::arg("deter_first"),
           py::arg("gates"), py::arg("update_bias"), py::arg("action"), py::arg("bf16"),
           py::arg("gradients"), py::arg("threads"))
      .def(py::init<py::object, py::list, py::list, py::list, const std::string&, bool, double,
                    py::tuple, bool, bool, int>(),
           py::arg("features"), py::arg("weights"), py::arg("biases"), py::arg("norms"),
           py::arg("activation"), py::arg("features_first"), py::arg("update_bias"),
           py::arg("action"), py::arg("bf16"), py::arg("gradients"), py::arg("threads"))
      .def_property_readonly("gradients", &PackedGru::gradients);
}

}  // namespace fastdreamer
