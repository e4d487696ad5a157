#include "bindings/weights.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"

namespace fastdreamer {
namespace {

Activation activation_of(const std::string& name) {
  if (name == "elu") return Activation::elu;
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  if (name == "tanh") return Activation::tanh;
  fail("PackedMlp: activation must be elu, relu, silu or tanh, got '" + name + "'");
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
  py::gil_scoped_release release;
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
  const Index depth = static_cast<Index>(weights.size());
  if (depth < 1 || depth > kMaxLayers || static_cast<Index>(biases.size()) != depth) {
    fail("PackedMlp: there must be 1 to " + std::to_string(kMaxLayers) +
         " layers with a bias or None each, got " + std::to_string(depth) + " weights and " +
         std::to_string(biases.size()) + " biases");
  }
  const Index active = act_last ? depth : depth - 1;
  if (static_cast<Index>(norms.size()) > active) {
    fail("PackedMlp: there are " + std::to_string(norms.size()) +
         " norms, but an activation after " + std::to_string(active) + " layers");
  }
  mlp_.depth = static_cast<int>(depth);
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
  const bool norms = flat.size() == 4 * depth;
  if (flat.size() != 2 * depth && !norms) fail("PackedMlp: a gradient for every parameter");
  for (std::size_t i = 0; i < depth; ++i) {
    const Layer& layer = mlp_.layers[i];
    const Index stride = i == 0 ? total_columns_ : layer.in;
    float* weight = arrays.out("weight gradient", flat[i], {layer.out, stride});
    list.push_back({weight + (i == 0 ? first_column_ : 0), stride,
                    arrays.maybe_out("bias gradient", flat[depth + i], {layer.out})});
    if (!norms || !layer.norm) continue;
    list.back().norm_weight =
        arrays.maybe_out("norm's weight gradient", flat[2 * depth + i], {layer.out});
    list.back().norm_bias =
        arrays.maybe_out("norm's bias gradient", flat[3 * depth + i], {layer.out});
  }
  return list;
}

PackedGru::PackedGru(py::handle weight_ih, py::handle weight_hh, py::handle bias_ih,
                     py::handle bias_hh, bool bf16, bool gradients, int threads)
    : precision_(bf16 ? Precision::bf16 : Precision::fp32),
      gradients_(gradients) {
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
          {nullptr, 3 * D, D},
          {},
          {},
          {},
          0};
  std::vector<PackArgs> backward;
  if (gradients) {
    gru_.backward_ih = take_panels(arena_, k, 3 * D, K);
    gru_.backward_hh = take_panels(arena_, k, 3 * D, D);
    backward = {{ih, K, false, 2 * D, 0, gru_.backward_ih}, {hh, D, false, 0, 0, gru_.backward_hh}};
  }
  const GruPackArgs forward{ih, hh, gru_.forward};
  pack_all(k, backward, &forward, threads);
}

PackedGru::PackedGru(py::handle weight, py::handle bias, py::object norm, bool deter_first,
                     const std::string& gates, double update_bias, bool bf16, bool gradients,
                     int threads)
    : precision_(bf16 ? Precision::bf16 : Precision::fp32),
      gradients_(gradients) {
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
  gru_.forward = {nullptr, K, D};
  gru_.bias = added == nullptr ? added : copy_floats(arena_, added, 3 * D);
  gru_.backward_ih = {nullptr, 3 * D, K};
  gru_.backward_hh = {nullptr, 3 * D, D};
  gru_.joint = take_panels(arena_, k, all, 3 * D);
  gru_.norm = make_norm(arena_, arrays, norm, 3 * D);
  gru_.at = {D, column('r'), column('c'), column('u'), static_cast<float>(update_bias)};
  gru_.rotate = deter_first ? D : 0;
  std::vector<PackArgs> jobs{{from, all, true, gru_.rotate, 0, gru_.joint}};
  if (gradients) {
    gru_.backward_ih = take_panels(arena_, k, 3 * D, K);
    gru_.backward_hh = take_panels(arena_, k, 3 * D, D);
    jobs.push_back({from + gru_.rotate, all, false, 0, 0, gru_.backward_ih});
    jobs.push_back({from + (deter_first ? 0 : K), all, false, 0, 0, gru_.backward_hh});
  }
  pack_all(k, jobs, nullptr, threads);
}

void PackedGru::grads(Arrays& arrays, py::sequence four, LayerGrad& ih, LayerGrad& hh) const {
  const Index D = gru_.forward.D, K = gru_.forward.K;
  if (gru_.late()) {
    ih = {arrays.out("weight gradient", four[0], {3 * D, K + D}), K + D,
          arrays.maybe_out("bias gradient", four[1], {3 * D}),
          arrays.maybe_out("norm's weight gradient", four[2], {3 * D}),
          arrays.maybe_out("norm's bias gradient", four[3], {3 * D})};
    return;
  }
  ih = {arrays.out("weight_ih gradient", four[0], {3 * D, K}), K,
        arrays.out("bias_ih gradient", four[2], {3 * D})};
  hh = {arrays.out("weight_hh gradient", four[1], {3 * D, D}), D,
        arrays.out("bias_hh gradient", four[3], {3 * D})};
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
  if (latent.size() != 2) return {0, 0.0f, make_std(op, latent)};
  const Index classes = latent[0].cast<Index>();
  const float unimix = latent[1].cast<float>();
  if (classes < 1 || outputs % classes != 0 || !(unimix >= 0 && unimix <= 1)) {
    fail(std::string(op) + ": " + std::to_string(outputs) + " logits make no categoricals of " +
         std::to_string(classes) + " classes, " + std::to_string(unimix) + " of them uniform");
  }
  return {classes, unimix, {}};
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

Rssm make_rssm(const char* op, const PackedMlp& inp, const PackedGru& gru, const PackedMlp& prior,
               py::tuple latent) {
  const Index D = gru.gru().forward.D, outputs = prior.mlp().out();
  const Latent made = make_latent(op, latent, outputs);
  const Index S = made.classes > 0 ? outputs : outputs / 2;
  const Index A = inp.mlp().in() - S;
  if (A < 1 || S < 1) fail(std::string(op) + ": the model has no action or no stochastic state");
  const Rssm rssm{A, D, S, inp.mlp(), gru.gru(), prior.mlp(), made};
  check_mlp(op, "inp", inp, gru.precision(), S + A, gru.gru().forward.K, false);
  check_mlp(op, "prior", prior, gru.precision(), D, rssm.raw(), false);
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
      .def(py::init<py::handle, py::handle, py::handle, py::handle, bool, bool, int>(),
           py::arg("weight_ih"), py::arg("weight_hh"), py::arg("bias_ih"), py::arg("bias_hh"),
           py::arg("bf16"), py::arg("gradients"), py::arg("threads"))
      .def(py::init<py::handle, py::handle, py::object, bool, const std::string&, double, bool,
                    bool, int>(),
           py::arg("weight"), py::arg("bias"), py::arg("norm"), py::arg("deter_first"),
           py::arg("gates"), py::arg("update_bias"), py::arg("bf16"), py::arg("gradients"),
           py::arg("threads"))
      .def_property_readonly("gradients", &PackedGru::gradients);
}

}  // namespace fastdreamer
