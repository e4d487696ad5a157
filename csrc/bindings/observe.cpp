#include "bindings/observe.h"

#include <memory>

#include "bindings/gil.h"
#include "bindings/weights.h"
#include "cpu/observe.h"

namespace fastdreamer {
namespace {

constexpr const char* kOp = "observe";

// What Python holds between forward and backward: the tape, and all that it points into.
struct ObserveRun {
  Rssm rssm;
  Mlp post;
  Layer embed;
  py::object inp, gru, prior, post_pack, embed_pack;
  std::vector<std::int32_t> begin_drawn;
  Arrays arrays{kOp};
  ObserveTape tape;
};

// The classes of one-hot vectors side by side, as Ones has them.
std::vector<std::int32_t> drawn_of(const float* stoch, Index S, Index classes) {
  std::vector<std::int32_t> drawn;
  for (Index first = 0; first < S; first += classes) {
    std::int32_t one = Ones::none;
    for (Index c = first; c < first + classes; ++c) {
      if (stoch[c] != stoch[c]) {
        one = Ones::undefined;
      } else if (stoch[c] == 1.0f && one == Ones::none) {
        one = static_cast<std::int32_t>(c);
      } else if (stoch[c] != 0.0f) {
        fail("observe: begin.stoch must be one-hot");
      }
    }
    drawn.push_back(one);
  }
  return drawn;
}

// rssm: (inp, gru, prior, latent, post, embed), inp as PackedInp takes it: `post` is packed without
// the first layer's bias from deter's columns, `embed` is the first layer alone from the
// embedding's. embed_array: [T, B, E] float32, or int16 (the bits of bfloat16) with bfloat16
// weights. resets: whether is_first zeroes deter, stoch and action. begin: deter [1, D] and stoch
// [1, S] in the zeros' place, or None. outputs: deter, stoch, mean and std of the posterior, and of
// the prior; of categorical latents logits and None.
std::unique_ptr<ObserveRun> observe_forward(py::tuple rssm, py::handle start_deter,
                                            py::handle start_stoch, py::handle embed_array,
                                            py::handle action, py::handle is_first,
                                            py::tuple resets, py::handle noise, py::tuple outputs,
                                            bool keep, int threads, py::object begin) {
  auto tape = std::make_unique<ObserveRun>();
  ObserveRun& t = *tape;
  if (threads < 1) fail("observe: threads must be at least 1");
  t.inp = rssm[0], t.gru = rssm[1], t.prior = rssm[2], t.post_pack = rssm[4];
  t.embed_pack = rssm[5];
  const PackedInp inp(t.inp);
  const PackedGru& gru = t.gru.cast<const PackedGru&>();
  const PackedMlp& prior = t.prior.cast<const PackedMlp&>();
  const PackedMlp& post = t.post_pack.cast<const PackedMlp&>();
  const PackedMlp& embed = t.embed_pack.cast<const PackedMlp&>();
  t.rssm = make_rssm(kOp, inp, gru, prior, rssm[3].cast<py::tuple>());
  const Precision precision = gru.precision();
  const Index A = t.rssm.A, D = t.rssm.D, S = t.rssm.S, E = embed.mlp().in();
  check_mlp(kOp, "post", post, precision, D, t.rssm.raw(), keep);
  check_mlp(kOp, "embed", embed, precision, E, post.mlp().layers[0].out, keep);
  if (embed.mlp().depth != 1) fail("observe: embed must be one layer");
  if (keep && !(inp.gradients() && gru.gradients() && prior.gradients())) {
    fail("observe: the model was not packed for gradients");
  }
  t.post = post.mlp();
  t.embed = embed.mlp().layers[0];

  const Array shape(kOp, "noise", noise);
  if (shape.ndim() != 3 || shape.size(0) < 1 || shape.size(1) < 1) {
    fail("observe: noise must have 3 dimensions, none of them 0");
  }
  const Index T = shape.size(0), B = shape.size(1);
  ObserveArgs x{};
  x.kernels = &kernels(precision);
  x.rssm = &t.rssm;
  x.post = &t.post;
  x.embed = &t.embed;
  x.T = T;
  x.B = B;
  x.start_deter = t.arrays.in("start.deter", start_deter, {B, D});
  x.start_stoch = t.arrays.in("start.stoch", start_stoch, {B, S});
  if (precision == Precision::bf16 && Array(kOp, "embed", embed_array).is('h')) {
    x.embed_elem = t.arrays.in_format("embed", embed_array, {T, B, E}, 'h');
  } else {
    x.embed32 = t.arrays.in("embed", embed_array, {T, B, E});
    if (precision == Precision::fp32) x.embed_elem = x.embed32;
  }
  x.action = t.arrays.in("action", action, {T, B, A});
  const auto* first =
      static_cast<const unsigned char*>(t.arrays.in_format("is_first", is_first, {T, B}, '?'));
  if (resets.size() != 3) fail("observe: resets must be (deter, stoch, action)");
  const auto where = [&](std::size_t i) { return resets[i].cast<bool>() ? first : nullptr; };
  x.first_deter = where(0), x.first_stoch = where(1), x.first_action = where(2);
  if (!begin.is_none()) {
    const py::tuple two = begin;
    x.begin_deter = t.arrays.in("begin.deter", two[0], {1, D});
    x.begin_stoch = t.arrays.in("begin.stoch", two[1], {1, S});
  }
  x.noise = t.arrays.in("noise", noise, {T, B, t.rssm.noise()});
  const bool gaussian = t.rssm.latent.classes == 0;
  if (!gaussian && x.begin_stoch != nullptr) {
    t.begin_drawn = drawn_of(x.begin_stoch, S, t.rssm.latent.classes);
    x.begin_drawn = t.begin_drawn.data();
  }
  x.deter = t.arrays.out("deter", outputs[0], {T, B, D});
  x.stoch = t.arrays.out("stoch", outputs[1], {T, B, S});
  x.post_mean = t.arrays.out("post.mean", outputs[2], {T, B, S});
  if (gaussian) x.post_std = t.arrays.out("post.std", outputs[3], {T, B, S});
  x.prior_mean = t.arrays.out("prior.mean", outputs[4], {T, B, S});
  if (gaussian) x.prior_std = t.arrays.out("prior.std", outputs[5], {T, B, S});
  t.arrays.check_overlap();
  Arena scratch;
  const Observe pass(x, keep ? &t.tape : nullptr, scratch, threads);
  {
    const WithoutGil released;
    pass.run();
  }
  if (!keep) return nullptr;
  return tape;
}

// grads: those that reach the six outputs, or None. inputs: where those of start.deter,
// start.stoch, embed, action and begin's two go, or None. parameters: None, or (inp, gru, prior,
// post) as PackedMlp, PackedInp and PackedGru take them.
void observe_backward(ObserveRun& t, py::tuple grads, py::tuple inputs, py::object parameters,
                      int threads) {
  const ObserveArgs& x = t.tape.args;
  const Index A = t.rssm.A, D = t.rssm.D, S = t.rssm.S, T = x.T, B = x.B;
  if (threads < 1) fail("observe: threads must be at least 1");
  Arrays arrays(kOp);
  ObserveGrads g{};
  g.deter = arrays.maybe_in("grad of deter", grads[0], {T, B, D});
  g.stoch = arrays.maybe_in("grad of stoch", grads[1], {T, B, S});
  g.post_mean = arrays.maybe_in("grad of post.mean", grads[2], {T, B, S});
  g.post_std = arrays.maybe_in("grad of post.std", grads[3], {T, B, S});
  g.prior_mean = arrays.maybe_in("grad of prior.mean", grads[4], {T, B, S});
  g.prior_std = arrays.maybe_in("grad of prior.std", grads[5], {T, B, S});
  g.start_deter = arrays.maybe_out("grad of start.deter", inputs[0], {B, D});
  g.start_stoch = arrays.maybe_out("grad of start.stoch", inputs[1], {B, S});
  g.embed = arrays.maybe_out("grad of embed", inputs[2], {T, B, t.embed.in});
  g.action = arrays.maybe_out("grad of action", inputs[3], {T, B, A});
  g.begin_deter = arrays.maybe_out("grad of begin.deter", inputs[4], {1, D});
  g.begin_stoch = arrays.maybe_out("grad of begin.stoch", inputs[5], {1, S});
  g.parameters = !parameters.is_none();
  if (g.parameters) {
    const py::tuple groups = parameters;
    const PackedMlp& post = t.post_pack.cast<const PackedMlp&>();
    PackedInp(t.inp).grads(arrays, groups[0], g.dynamics);
    t.gru.cast<const PackedGru&>().grads(arrays, groups[1], g.dynamics);
    g.prior = t.prior.cast<const PackedMlp&>().grads(arrays, groups[2]);
    g.post = post.grads(arrays, groups[3]);
    const Index from = t.embed_pack.cast<const PackedMlp&>().first_column();
    g.embed_weight = {g.post[0].weight - post.first_column() + from, g.post[0].stride, nullptr};
  }
  arrays.check_overlap();
  Arena scratch;
  const ObserveBackward pass(t.tape, g, scratch, threads);
  const WithoutGil released;
  pass.run();
}

}  // namespace

void bind_observe(py::module_& m) {
  py::class_<ObserveRun>(m, "ObserveTape",
                         "What a filtered sequence leaves for its backward pass.");
  m.def("observe_forward", &observe_forward, py::arg("rssm"), py::arg("start_deter"),
        py::arg("start_stoch"), py::arg("embed"), py::arg("action"), py::arg("is_first"),
        py::arg("resets"), py::arg("noise"), py::arg("outputs"), py::arg("keep"),
        py::arg("threads"), py::arg("begin") = py::none(),
        "The posterior filter; see csrc/bindings/observe.cpp.");
  m.def("observe_backward", &observe_backward, py::arg("tape"), py::arg("grads"), py::arg("inputs"),
        py::arg("parameters"), py::arg("threads"), "Its gradients.");
}

}  // namespace fastdreamer
