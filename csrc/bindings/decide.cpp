#include "bindings/decide.h"

#include "bindings/gil.h"
#include "bindings/weights.h"
#include "cpu/decide.h"

namespace fastdreamer {
namespace {

constexpr const char* kOp = "decide";

// Packed weights put together once, so that a call for one row has little left to do but compute.
class PackedDecider {
 public:
  // inp: as PackedInp takes it. encoder: of vectors, the activation last, or None. actor: as
  // make_actor takes it, its layers packed for [stoch, deter], or None.
  PackedDecider(py::object inp, py::object gru, py::object post, py::tuple latent,
                py::object encoder, py::object actor)
      : inp_(inp),
        gru_(gru),
        post_(post),
        encoder_(encoder) {
    const PackedGru& cell = gru.cast<const PackedGru&>();
    const PackedMlp& posterior = post.cast<const PackedMlp&>();
    precision_ = cell.precision();
    decider_.rssm = make_dynamics(kOp, PackedInp(inp), cell, {}, latent, posterior.mlp().out());
    const Index A = decider_.rssm.A, D = decider_.rssm.D, S = decider_.rssm.S;
    const Index E = posterior.mlp().in() - D;
    if (E < 1) fail("decide: the model has no embedding");
    check_mlp(kOp, "post", posterior, precision_, D + E, decider_.rssm.raw(), false);
    decider_.post = posterior.mlp();
    decider_.sees = !encoder.is_none();
    decider_.acts = !actor.is_none();
    if (decider_.sees) {
      const PackedMlp& mlp = encoder.cast<const PackedMlp&>();
      if (mlp.mlp().out() > E || !mlp.mlp().act_last) {
        fail("decide: the encoder's output is no part of the embedding");
      }
      check_mlp(kOp, "encoder", mlp, precision_, mlp.mlp().in(), mlp.mlp().out(), false);
      decider_.encoder = mlp.mlp();
    }
    if (!decider_.acts) return;
    const py::tuple four = actor;
    actor_ = four[0];
    decider_.actor = make_actor(kOp, four, precision_, S + D, A, false);
  }

  const Decider& decider() const { return decider_; }
  Precision precision() const { return precision_; }

 private:
  py::object inp_, gru_, post_, encoder_, actor_;  // kept: the decider points into them
  Precision precision_;
  Decider decider_{};
};

// embed, vector: arrays, or None where the decider takes none. action_noise: an array, or None for
// the mode. outputs: deter, stoch and, of a decider with an actor, action.
void decide(const PackedDecider& packed, py::handle deter, py::handle stoch, py::handle action,
            py::handle embed, py::handle vector, py::handle state_noise, py::handle action_noise,
            py::tuple outputs, int threads) {
  if (threads < 1) fail("decide: threads must be at least 1");
  const Decider& d = packed.decider();
  const Index A = d.rssm.A, D = d.rssm.D, S = d.rssm.S;
  const Array shape(kOp, "state_noise", state_noise);
  if (shape.ndim() != 2 || shape.size(0) < 1)
    fail("decide: state_noise must have 2 dimensions, none of them 0");
  DecideArgs x{};
  x.kernels = &kernels(packed.precision());
  x.decider = &d;
  const Index B = x.B = shape.size(0);
  Arrays arrays(kOp);
  x.deter = arrays.in("state.deter", deter, {B, D});
  x.stoch = arrays.in("state.stoch", stoch, {B, S});
  x.action = arrays.in("action", action, {B, A});
  if (d.embed() > 0) x.embed = arrays.in("embed", embed, {B, d.embed()});
  if (d.sees) x.vector = arrays.in("vector", vector, {B, d.vector()});
  x.state_noise = arrays.in("state_noise", state_noise, {B, d.rssm.noise()});
  const Index drawn = d.acts ? d.actor.noise(A) : A;
  x.action_noise = arrays.maybe_in("action_noise", action_noise, {B, drawn});
  x.next_deter = arrays.out("deter", outputs[0], {B, D});
  x.next_stoch = arrays.out("stoch", outputs[1], {B, S});
  if (d.acts) x.next_action = arrays.out("action", outputs[2], {B, A});
  arrays.check_overlap();
  Arena scratch;
  const Decide pass(x, scratch, threads);
  const WithoutGil released;
  pass.run();
}

}  // namespace

void bind_decide(py::module_& m) {
  py::class_<PackedDecider>(m, "PackedDecider", "Packed weights of a decision.")
      .def(py::init<py::object, py::object, py::object, py::tuple, py::object, py::object>(),
           py::arg("inp"), py::arg("gru"), py::arg("post"), py::arg("latent"), py::arg("encoder"),
           py::arg("actor"))
      .def_property_readonly_static("gradients", [](py::object) { return false; });
  m.def("decide", &decide, py::arg("decider"), py::arg("deter"), py::arg("stoch"),
        py::arg("action"), py::arg("embed"), py::arg("vector"), py::arg("state_noise"),
        py::arg("action_noise"), py::arg("outputs"), py::arg("threads"),
        "One decision; see csrc/bindings/decide.cpp.");
}

}  // namespace fastdreamer
