#include "bindings/imagine.h"

#include <memory>
#include <string>

#include "bindings/gil.h"
#include "bindings/weights.h"
#include "cpu/imagine.h"

namespace fastdreamer {
namespace {

// What Python holds between forward and backward: the tape, and all that it points into.
struct ImagineRun {
  explicit ImagineRun(const char* op) : op(op), arrays(this->op.c_str()) {}

  std::string op;  // a copy: the caller's does not outlive the forward call
  Rssm rssm;
  Actor actor;
  Mlp reward, critic, target, discount;
  // the packed weights, kept
  py::object inp, gru, prior, actor_pack, reward_pack, critic_pack, target_pack, discount_pack;
  Arrays arrays;
  ImagineTape tape;
};

const PackedMlp& mlp_of(const py::object& pack) { return pack.cast<const PackedMlp&>(); }

// rssm: (inp, gru, prior, latent), inp as PackedInp takes it. actor: what make_actor takes, and
// through_feat and bound; or None. heads: (reward, critic or None, target or None, discount or
// None, gamma, lam, departure, reward_as, value_as, hard_discount), or None; what make_readout
// takes is reward_as and value_as. wants: None, or (through, actor, rssm, reward, critic,
// discount). Arrays as in cpu/imagine.h; `outputs` are deter, stoch, prior_mean, prior_std, reward,
// next_value, returns, value, discount, each an array or None.
std::unique_ptr<ImagineRun> imagine_forward(const char* op, py::tuple rssm, py::object actor,
                                            py::object heads, py::handle start_deter,
                                            py::handle start_stoch, py::handle state_noise,
                                            py::handle action_noise, py::handle action,
                                            py::tuple outputs, py::object wants, int threads) {
  auto run = std::make_unique<ImagineRun>(op);
  ImagineRun& t = *run;
  ImagineWants w;
  if (!wants.is_none()) {
    const py::tuple six = wants;
    w = {six[0].cast<bool>(), six[1].cast<bool>(), six[2].cast<bool>(),
         six[3].cast<bool>(), six[4].cast<bool>(), six[5].cast<bool>()};
  }
  if (threads < 1) fail(std::string(op) + ": threads must be at least 1");
  if (w.actor && actor.is_none()) fail(std::string(op) + ": gradients of no actor");
  t.inp = rssm[0], t.gru = rssm[1], t.prior = rssm[2];
  const PackedInp inp(t.inp);
  const PackedMlp& prior = mlp_of(t.prior);
  const PackedGru& gru = t.gru.cast<const PackedGru&>();
  t.rssm = make_rssm(op, inp, gru, prior, rssm[3].cast<py::tuple>());
  if (w.through && !(inp.gradients() && gru.gradients() && prior.gradients())) {
    fail(std::string(op) + ": the model was not packed for gradients");
  }
  const Precision precision = gru.precision();
  const Index A = t.rssm.A, D = t.rssm.D, S = t.rssm.S;

  ImagineArgs x{};
  x.kernels = &kernels(precision);
  x.rssm = &t.rssm;
  const Array shape(op, "state_noise", state_noise);
  if (shape.ndim() != 3 || shape.size(0) < 1 || shape.size(1) < 1) {
    fail(std::string(op) + ": state_noise must have 3 dimensions, none of them 0");
  }
  const Index H = x.H = shape.size(0), B = x.B = shape.size(1);
  x.state_noise = t.arrays.in("state_noise", state_noise, {H, B, t.rssm.noise()});
  x.start_deter = t.arrays.in("start.deter", start_deter, {B, D});
  x.start_stoch = t.arrays.in("start.stoch", start_stoch, {B, S});
  if (actor.is_none()) {
    x.action = const_cast<float*>(t.arrays.in("action", action, {H, B, A}));
  } else {
    const py::tuple six = actor;
    t.actor_pack = six[0];
    const bool through_feat = six[4].cast<bool>();
    t.actor = make_actor(op, six, precision, D + S, A, w.actor || (w.through && through_feat));
    t.actor.through_feat = through_feat;
    t.actor.bound = six[5].cast<bool>();
    x.actor = &t.actor;
    x.action_noise = t.arrays.in("action_noise", action_noise, {H, B, t.actor.noise(A)});
    x.action = t.arrays.out("action", action, {H, B, A});
  }
  x.deter = t.arrays.maybe_out("deter", outputs[0], {H, B, D});
  x.stoch = t.arrays.maybe_out("stoch", outputs[1], {H, B, S});
  x.prior_mean = t.arrays.maybe_out("prior_mean", outputs[2], {H, B, S});
  x.prior_std = t.arrays.maybe_out("prior_std", outputs[3], {H, B, S});
  if (!heads.is_none()) {
    const py::tuple ten = heads;
    t.reward_pack = ten[0], t.critic_pack = ten[1], t.target_pack = ten[2];
    t.discount_pack = ten[3];
    x.departure = ten[6].cast<bool>();
    x.hard_discount = ten[9].cast<bool>();
    const auto head = [&](const char* name, const py::object& pack, Mlp& to, bool gradients) {
      if (pack.is_none()) return static_cast<const Mlp*>(nullptr);
      const PackedMlp& mlp = mlp_of(pack);
      check_mlp(op, name, mlp, precision, D + S, mlp.mlp().out(), gradients);
      to = mlp.mlp();
      return static_cast<const Mlp*>(&to);
    };
    x.reward = head("reward", t.reward_pack, t.reward, w.through);
    x.critic = head("critic", t.critic_pack, t.critic, w.through || w.critic);
    x.target = head("target", t.target_pack, t.target, w.through);
    x.discount = head("discount", t.discount_pack, t.discount, w.through && !x.hard_discount);
    set_returns(op, ten[4], ten[5], x);
    if (x.reward != nullptr) {
      x.reward_as = make_readout("reward_as.bins", t.arrays, ten[7], t.reward.out());
    }
    for (const Mlp* mlp : {x.critic, x.target}) {
      if (mlp == nullptr) continue;
      x.value_as = make_readout("value_as.bins", t.arrays, ten[8], mlp->out());
    }
    x.reward_out = t.arrays.maybe_out("reward", outputs[4], {H, B});
    x.next_value = t.arrays.maybe_out("next_value", outputs[5], {H, B});
    x.returns = t.arrays.maybe_out("returns", outputs[6], {H, B});
    x.value = t.arrays.maybe_out("value", outputs[7], {H, B});
    x.discount_out = t.arrays.maybe_out("discount", outputs[8], {H, B});
    const bool bootstraps = x.critic != nullptr || x.target != nullptr;
    if (x.reward == nullptr || x.reward_out == nullptr || (x.next_value && !bootstraps) ||
        (x.returns && !x.next_value) || (x.value && (!x.critic || !x.next_value)) ||
        (w.critic && !x.value) || (w.through && !x.next_value) ||
        (x.discount != nullptr) != (x.discount_out != nullptr) ||
        (w.discount && (!x.discount || x.hard_discount))) {
      fail(std::string(op) + ": a head or its output is missing");
    }
  } else if (w.reward || w.critic || w.discount) {
    fail(std::string(op) + ": gradients of heads that are not there");
  }
  t.arrays.check_overlap();
  Arena scratch;
  const bool taped = w.through || w.critic;
  const Imagine pass(x, w, taped ? &t.tape : nullptr, scratch, threads);
  {
    const WithoutGil released;
    pass.run();
  }
  if (!taped) return nullptr;
  return run;
}

// One step without gradients, of rows [B, ...]: what a call for a single row does besides computing
// takes as long as computing it, so this is the shortest way. `outputs`: deter, stoch, prior_mean,
// prior_std.
void rssm_step_forward(py::tuple rssm, py::handle deter, py::handle stoch, py::handle action,
                       py::handle noise, py::tuple outputs, int threads) {
  const char* op = "rssm_step";
  if (threads < 1) fail("rssm_step: threads must be at least 1");
  const PackedInp inp(rssm[0]);
  const PackedGru& gru = rssm[1].cast<const PackedGru&>();
  const Rssm model = make_rssm(op, inp, gru, mlp_of(rssm[2]), rssm[3].cast<py::tuple>());
  const Index A = model.A, D = model.D, S = model.S;
  Arrays arrays(op);
  const Array shape(op, "noise", noise);
  if (shape.ndim() != 2 || shape.size(0) < 1)
    fail("rssm_step: noise must have 2 dimensions, none of them 0");
  ImagineArgs x{};
  x.kernels = &kernels(gru.precision());
  x.rssm = &model;
  x.H = 1;
  const Index B = x.B = shape.size(0);
  x.start_deter = arrays.in("state.deter", deter, {B, D});
  x.start_stoch = arrays.in("state.stoch", stoch, {B, S});
  x.action = const_cast<float*>(arrays.in("action", action, {B, A}));
  x.state_noise = arrays.in("noise", noise, {B, model.noise()});
  x.deter = arrays.out("deter", outputs[0], {B, D});
  x.stoch = arrays.out("stoch", outputs[1], {B, S});
  x.prior_mean = arrays.out("prior_mean", outputs[2], {B, S});
  if (model.latent.classes == 0) x.prior_std = arrays.out("prior_std", outputs[3], {B, S});
  arrays.check_overlap();
  Arena scratch;
  const Imagine pass(x, {}, nullptr, scratch, threads);
  const WithoutGil released;
  pass.run();
}

// `grads`: those that reach deter, stoch, action, prior_mean, prior_std, reward, returns, discount.
// `inputs`: where those of start.deter, start.stoch and the given action go. Parameters: None, or
// as PackedMlp, PackedInp and PackedGru take them.
void imagine_backward(ImagineRun& t, py::tuple grads, py::tuple inputs, py::object actor,
                      py::object inp, py::object gru, py::object prior, py::object reward,
                      py::object discount, int threads) {
  const char* op = t.arrays.op();
  const ImagineArgs& x = t.tape.args;
  const ImagineWants& w = t.tape.wants;
  const Index A = t.rssm.A, D = t.rssm.D, S = t.rssm.S, H = x.H, B = x.B;
  if (!w.through) fail(std::string(op) + ": this tape has no backward sweep");
  if (w.actor != !actor.is_none() || w.rssm != !inp.is_none() || w.rssm != !gru.is_none() ||
      w.rssm != !prior.is_none() || w.reward != !reward.is_none() ||
      w.discount != !discount.is_none()) {
    fail(std::string(op) + ": gradients that were not announced");
  }
  if (threads < 1) fail(std::string(op) + ": threads must be at least 1");
  Arrays arrays(op);
  ImagineGrads g{};
  g.deter = arrays.maybe_in("grad of deter", grads[0], {H, B, D});
  g.stoch = arrays.maybe_in("grad of stoch", grads[1], {H, B, S});
  g.action = arrays.maybe_in("grad of action", grads[2], {H, B, A});
  g.prior_mean = arrays.maybe_in("grad of prior mean", grads[3], {H, B, S});
  g.prior_std = arrays.maybe_in("grad of prior std", grads[4], {H, B, S});
  g.reward = arrays.maybe_in("grad of reward", grads[5], {H, B});
  g.returns = arrays.maybe_in("grad of returns", grads[6], {H, B});
  g.discount = arrays.maybe_in("grad of discount", grads[7], {H, B});
  if ((g.reward != nullptr && x.reward == nullptr) ||
      (g.returns != nullptr && x.returns == nullptr) ||
      (g.discount != nullptr && x.discount == nullptr)) {
    fail(std::string(op) + ": gradients of heads that are not there");
  }
  g.start_deter = arrays.maybe_out("grad of start.deter", inputs[0], {B, D});
  g.start_stoch = arrays.maybe_out("grad of start.stoch", inputs[1], {B, S});
  g.given_action = arrays.maybe_out("grad of action", inputs[2], {H, B, A});
  if (w.rssm) {
    PackedInp(t.inp).grads(arrays, inp, g.dynamics);
    t.gru.cast<const PackedGru&>().grads(arrays, gru, g.dynamics);
    g.prior = mlp_of(t.prior).grads(arrays, prior);
  }
  if (w.actor) {
    g.actor = mlp_of(t.actor_pack).grads(arrays, actor);
    g.actor_rotate = mlp_of(t.actor_pack).rotate();
  }
  if (w.reward) {
    g.reward_head = mlp_of(t.reward_pack).grads(arrays, reward);
    g.reward_rotate = mlp_of(t.reward_pack).rotate();
  }
  if (w.discount) {
    g.discount_head = mlp_of(t.discount_pack).grads(arrays, discount);
    g.discount_rotate = mlp_of(t.discount_pack).rotate();
  }
  arrays.check_overlap();
  Arena scratch;
  const ImagineBackward pass(t.tape, g, scratch, threads);
  const WithoutGil released;
  pass.run();
}

void critic_backward(ImagineRun& t, py::handle value_grad, py::list critic, int threads) {
  const char* op = t.arrays.op();
  if (!t.tape.wants.critic) fail(std::string(op) + ": this tape has no critic");
  if (threads < 1) fail(std::string(op) + ": threads must be at least 1");
  Arrays arrays(op);
  const float* grad = arrays.in("grad of value", value_grad, {t.tape.args.H, t.tape.args.B});
  const PackedMlp& packed = mlp_of(t.critic_pack);
  const std::vector<LayerGrad> grads = packed.grads(arrays, critic);
  arrays.check_overlap();
  Arena scratch;
  const CriticBackward pass(t.tape, grad, grads, packed.rotate(), scratch, threads);
  const WithoutGil released;
  pass.run();
}

}  // namespace

void bind_imagine(py::module_& m) {
  py::class_<ImagineRun>(m, "ImagineTape", "What a rollout leaves for its backward passes.");
  m.def("imagine_forward", &imagine_forward, py::arg("op"), py::arg("rssm"), py::arg("actor"),
        py::arg("heads"), py::arg("start_deter"), py::arg("start_stoch"), py::arg("state_noise"),
        py::arg("action_noise"), py::arg("action"), py::arg("outputs"), py::arg("wants"),
        py::arg("threads"), "A rollout; see csrc/bindings/imagine.cpp.");
  m.def("rssm_step", &rssm_step_forward, py::arg("rssm"), py::arg("deter"), py::arg("stoch"),
        py::arg("action"), py::arg("noise"), py::arg("outputs"), py::arg("threads"),
        "One step without gradients; see csrc/bindings/imagine.cpp.");
  m.def("imagine_backward", &imagine_backward, py::arg("tape"), py::arg("grads"), py::arg("inputs"),
        py::arg("actor"), py::arg("inp"), py::arg("gru"), py::arg("prior"), py::arg("reward"),
        py::arg("discount"), py::arg("threads"), "Its gradients.");
  m.def("critic_backward", &critic_backward, py::arg("tape"), py::arg("value_grad"),
        py::arg("critic"), py::arg("threads"), "The gradients of the critic's weights.");
}

}  // namespace fastdreamer
