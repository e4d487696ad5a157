#include "bindings/cem.h"

#include "bindings/gil.h"
#include "bindings/weights.h"
#include "cpu/cem.h"

namespace fastdreamer {
namespace {

// rssm: (inp, gru, prior, latent), inp as PackedInp takes it. heads: (reward, bootstrap or None,
// discount or None, gamma, lam, departure, reward_as, value_as, hard_discount), of which
// make_readout takes reward_as and value_as; without a bootstrap the score is the sum of the
// rewards. proposals: an array or None. Arrays as in cpu/cem.h; mean and std are changed.
void cem(py::tuple rssm, py::tuple heads, py::handle start_deter, py::handle start_stoch,
         py::handle mean, py::handle std, py::handle action_noise, py::handle state_noise,
         py::handle scores, py::handle proposals, Index num_elites, double min_std, bool sample_std,
         double clip, bool bound_action, int threads) {
  const char* op = "cem";
  if (rssm.size() != 4 || heads.size() != 9) {
    fail(
        "cem: rssm must be (inp, gru, prior, latent), heads (reward, bootstrap, discount, gamma, "
        "lam, departure, reward_as, value_as, hard_discount)");
  }
  const PackedGru& gru = rssm[1].cast<const PackedGru&>();
  const Precision precision = gru.precision();
  const Rssm model = make_rssm(op, PackedInp(rssm[0]), gru, rssm[2].cast<const PackedMlp&>(),
                               rssm[3].cast<py::tuple>());
  const Index A = model.A, D = model.D, S = model.S;

  CemArgs x{};
  x.kernels = &kernels(precision);
  x.rssm = &model;
  const auto head = [&](const char* name, const py::object& object) {
    const PackedMlp& packed = object.cast<const PackedMlp&>();
    check_mlp(op, name, packed, precision, D + S, packed.mlp().out(), false);
    return &packed.mlp();
  };
  x.reward = head("reward", heads[0]);
  if (!heads[1].is_none()) x.bootstrap = head("bootstrap", heads[1]);
  if (!heads[2].is_none()) x.discount = head("discount", heads[2]);
  set_returns(op, heads[3], heads[4], x);
  x.departure = heads[5].cast<bool>();
  Arrays arrays(op);
  x.reward_as = make_readout("reward_as.bins", arrays, heads[6], x.reward->out());
  if (x.bootstrap != nullptr) {
    x.value_as = make_readout("value_as.bins", arrays, heads[7], x.bootstrap->out());
  }
  x.hard_discount = heads[8].cast<bool>();
  x.bound_action = bound_action;

  const Array shape(op, "action_noise", action_noise);
  if (shape.ndim() != 5 || shape.size(1) < 1 || shape.size(2) < 1 || shape.size(3) < 1) {
    fail("cem: action_noise must be [I, H, B, N, A], none of H, B and N 0");
  }
  const Index I = x.I = shape.size(0), H = x.H = shape.size(1), B = x.B = shape.size(2),
              N = x.N = shape.size(3);
  if (num_elites < 1 || num_elites > N) {
    fail("cem: num_elites must be in 1.." + std::to_string(N) + ", got " +
         std::to_string(num_elites));
  }
  if (!(min_std >= 0)) fail("cem: min_std must be at least 0, got " + std::to_string(min_std));
  if (!(clip > 0)) fail("cem: clip must be positive, got " + std::to_string(clip));
  if (threads < 1) fail("cem: threads must be at least 1");
  x.K = num_elites;
  x.min_std = static_cast<float>(min_std);
  x.sample_std = sample_std;
  x.clip = static_cast<float>(clip);
  x.start_deter = arrays.in("start.deter", start_deter, {B, D});
  x.start_stoch = arrays.in("start.stoch", start_stoch, {B, S});
  x.action_noise = arrays.in("action_noise", action_noise, {I, H, B, N, A});
  x.state_noise = arrays.in("state_noise", state_noise, {I, H, B, N, model.noise()});
  if (!proposals.is_none()) {
    const Array given(op, "proposals", proposals);
    if (given.ndim() != 4 || given.size(2) > N) fail("cem: proposals must be [H, B, P <= N, A]");
    x.P = given.size(2);
    x.proposals = arrays.in("proposals", proposals, {H, B, x.P, A});
  }
  x.mean = arrays.out("mean", mean, {H, B, A});
  x.std = arrays.out("std", std, {H, B, A});
  x.scores = arrays.out("scores", scores, {I, B, N});
  arrays.check_overlap();
  Arena scratch;
  const Cem pass(x, scratch, threads);
  const WithoutGil released;
  pass.run();
}

}  // namespace

void bind_cem(py::module_& m) {
  m.def("cem", &cem, py::arg("rssm"), py::arg("heads"), py::arg("start_deter"),
        py::arg("start_stoch"), py::arg("mean"), py::arg("std"), py::arg("action_noise"),
        py::arg("state_noise"), py::arg("scores"), py::arg("proposals"), py::arg("num_elites"),
        py::arg("min_std"), py::arg("sample_std"), py::arg("clip"), py::arg("bound_action"),
        py::arg("threads"),
        "All iterations of the cross-entropy method; see csrc/bindings/cem.cpp.");
}

}  // namespace fastdreamer
