"""Adapters of known peers: torchrl's and sheeprl's own classes, and likenesses of the others."""

import copy
import io
import math
from functools import partial, reduce

import peers
import pytest
import torch
import torch.nn.functional as F
from peers import A, D, E, H, S, stack
from torch import nn

from fastdreamer.ops.backend import last_backend
from fastdreamer.rollout import MisfitError, StdTransform, adapt
from fastdreamer.rollout.draws import with_noise

T, B = 6, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tensors(result):
    """All floating tensors that a loop returns, distributions by mean and std."""
    if isinstance(result, torch.Tensor):
        return [result] if result.requires_grad else []
    if isinstance(result, torch.distributions.Distribution):
        return [result.mean, result.stddev]
    parts = result.values() if isinstance(result, dict) else result
    return [x for part in parts for x in tensors(part)]


def same(got, want, model):
    """Values, and the gradients of the model's parameters for the same weighting."""
    got, want, grads = tensors(got), tensors(want), []
    for outputs in (got, want):
        model.zero_grad()
        torch.manual_seed(3)
        sum((torch.randn(x.shape) * x).sum() for x in outputs).backward()
        grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    assert len(got) == len(want) > 1
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert any(g is not None and g.abs().sum() > 0 for g in grads[0])


def nonterminals():
    goes_on = torch.ones(T, B, 1)
    goes_on[0, 0] = goes_on[2, 1] = goes_on[4, 1] = 0
    return goes_on


# ---------------------------------------------------------------- time-major, lists of beliefs


@pytest.mark.parametrize(
    "make",
    [
        lambda: peers.TransitionModel(),
        lambda: peers.TransitionModel(F.elu),
        lambda: peers.TransitionModel(lag=True),
        lambda: peers.ScriptedTransition(),
        lambda: torch.compile(peers.TransitionModel(), backend="eager"),
    ],
    ids=["relu", "elu", "lag", "scripted", "compiled"],
)
def test_transition_model(make):
    model, noise = make(), torch.randn(T, B, S)
    loop, action, embed = adapt(model), torch.randn(T, B, A).tanh(), torch.randn(T, B, E)
    model = getattr(model, "_orig_mod", model)
    belief, state = torch.randn(B, D).tanh(), torch.randn(B, S)
    for ends in (None, nonterminals()):
        given = (state, action, belief, embed, ends)
        results = (with_noise(partial(run, *given), noise) for run in (loop, model))
        same(*results, model)
    want = with_noise(lambda: model(state, action, belief), noise)
    same(loop(state, action, belief, noise=noise), want, model)
    assert last_backend("observe") == last_backend("open_loop") == "native"
    with pytest.raises(MisfitError, match="nonterminals without observations"):
        loop(state, action, belief, None, nonterminals())


def test_a_scripted_model_trains():
    """The optimiser holds the script's parameters; the loop sees its steps."""
    model = peers.ScriptedTransition()
    loop, optimizer = adapt(model), torch.optim.Adam(model.parameters(), 0.01)
    given = torch.randn(B, S), torch.randn(T, B, A), torch.randn(B, D).tanh(), torch.randn(T, B, E)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = sum(x.square().mean() for x in loop(*given, noise=torch.zeros(T, B, S))[2:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


class UnlikeTransition(peers.TransitionModel):
    def forward(self, prev_state, actions, prev_belief, observations=None, nonterminals=None):
        if nonterminals is not None:
            prev_belief = prev_belief * nonterminals[0]
        given = (prev_state, actions, prev_belief, observations, nonterminals)
        return super().forward(*given)


def test_what_computes_something_else_is_refused():
    """Whatever differs, a mask, a constant or a signature, shows in what the peer itself gives."""
    with pytest.raises(MisfitError, match="UnlikeTransition computes something else.*off by"):
        adapt(UnlikeTransition())
    with pytest.raises(MisfitError, match="GrusaRSSM computes something else"):
        adapt(peers.GrusaRSSM())  # its least std is 0.3
    with pytest.raises(MisfitError, match="SheepRSSM computes something else"):
        adapt(peers.SheepRSSM(), std=StdTransform(min=0.1))
    model = peers.TransitionModel()
    model.forward = lambda state, actions: None
    with pytest.raises(MisfitError, match="not called as the one known here: TypeError"):
        adapt(model)
    model.forward = lambda *given: [torch.zeros(1)]
    with pytest.raises(MisfitError, match="returns something else than the one known here"):
        adapt(model)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (peers.TransitionModel, "min_std_dev"), (peers.SheepRSSM, "min_std"),
        (peers.SimpleRSSM, "transition_model.config"), (peers.NontermsRSSM, "fc_embed_prior"),
        (peers.SheepActor, "init_std"), (peers.SimpleActor, "network"),
    ],
)  # fmt: skip
def test_what_lacks_a_part_is_refused(part, name):
    made, *path = part(), *name.split(".")
    owner = reduce(getattr, path[:-1], made)
    delattr(owner, path[-1])
    asked = {"model": made}
    if part in (peers.SheepActor, peers.SimpleActor):
        asked = {"model": peers.SheepRSSM(), "actor": made}
    with pytest.raises(MisfitError):
        adapt(**asked)


def test_asking_draws_no_numbers_of_the_caller_s():
    torch.manual_seed(5)
    adapt(peers.TransitionModel())
    drawn = torch.rand(1)
    torch.manual_seed(5)
    peers.TransitionModel()
    assert torch.equal(drawn, torch.rand(1))


# ---------------------------------------------------------------- actors and heads


def dream(model, actor, start, two=True):
    """The imagination of a TransitionModel's repository."""
    (belief, state), out = start, []
    for _ in range(T):
        feat = belief.detach(), state.detach()
        found = actor(*feat)
        action = found[0]
        if found[1] is not None:
            action = torch.tanh(torch.distributions.Normal(*found).rsample())
        step = model(state, action[None], belief)
        belief, state = step[0][0], step[1][0]
        out.append((belief, state, action))
    return [torch.stack(x) for x in zip(*out, strict=True)]


@pytest.mark.parametrize(
    "make",
    [
        peers.ActorModel,
        partial(peers.ActorModel, samples=True, underscore=""),
        partial(peers.ActorModel, mean_scale=1.0),
        peers.ScriptedActor,
        lambda: torch.compile(peers.ActorModel(), backend="eager"),
    ],
    ids=["mean and std", "actions", "another scale", "scripted", "compiled"],
)
def test_imagination_with_a_peer_s_actor_and_heads(make):
    model, actor = peers.TransitionModel(F.elu), make()
    heads = {"reward": peers.ScalarModel(), "critic": peers.ScalarModel()}
    rollout = adapt(model, actor=actor, **heads).rollout
    noises = torch.randn(T, B, A), torch.randn(T, B, S)
    start = torch.randn(B, D).tanh(), torch.randn(B, S)
    got = rollout.imagine(start, action_noise=noises[0], state_noise=noises[1])
    want = with_noise(lambda: dream(model, actor, start), *noises)
    same(got[:3], want, nn.ModuleList([model, actor]))
    reward = heads["reward"](want[0].flatten(0, 1), want[1].flatten(0, 1)).view(T, B)
    torch.testing.assert_close(got.reward, reward)
    assert rollout.verify(repeats=1).ok


def test_constants_of_an_actor_are_read_or_demanded():
    model, layers = peers.TransitionModel(), stack(D + S, H, 2 * A)
    with pytest.raises(MisfitError, match="actor: its layers do not say mean_scale and action_std"):
        adapt(model, actor=layers)
    constants = {
        "mean_scale": 2.0,
        "action_std": StdTransform(offset=math.log(math.expm1(3.0)), min=0.01),
    }
    assert adapt(model, actor=layers, **constants).rollout.options.mean_scale == 2.0
    nonterms, said = peers.NontermsRSSM(), {"_mean_scale": 2, "_init_std": 3.0, "_min_std": 0.01}
    read = adapt(nonterms, actor=peers.ActionDecoder(**said)).rollout.options
    assert read.mean_scale == 2 and read.action_std == constants["action_std"]
    with pytest.raises(MisfitError, match="do not say action_std"):
        adapt(nonterms, actor=peers.ActionDecoder(mean_scale=2))
    assert adapt(nonterms, actor=peers.ActionDecoder(), **constants).rollout.policy.stoch_first
    wrong = "actor: ActionDecoder gives something else than its layers"
    for name in said:
        with pytest.raises(MisfitError, match=wrong):
            adapt(nonterms, actor=peers.ActionDecoder(**said | {name: said[name] * 1.1}))
    with pytest.raises(MisfitError, match=wrong):
        adapt(nonterms, actor=peers.ActionDecoder(), **constants | {"mean_scale": 5.0})
    with pytest.raises(MisfitError, match=wrong):
        adapt(nonterms, actor=peers.ActionDecoder(**said | {"_init_std": 0.0}))
    simple = adapt(peers.SimpleRSSM(), actor=peers.SimpleActor()).rollout.options
    assert simple.action_std == StdTransform(offset=3.0, min=0.01) and simple.mean_scale == 4
    one_hot = peers.SimpleActor()
    one_hot.discrete_action_bool = True
    with pytest.raises(MisfitError, match="actor: a tanh-Normal policy fits, not one-hot"):
        adapt(peers.SimpleRSSM(), actor=one_hot)


def test_heads_that_do_more_than_their_layers_are_refused():
    model = peers.TransitionModel()
    with pytest.raises(MisfitError, match="reward: ScalarModel gives something else"):
        adapt(model, reward=peers.ScalarModel(factor=2.0))

    class OfPixels(peers.ScalarModel):
        def forward(self, image):
            raise ValueError("no image")

    with pytest.raises(MisfitError, match="critic: OfPixels.* takes neither deter and stoch"):
        adapt(model, critic=OfPixels())


# ---------------------------------------------------------------- nonterms, states, batch-first


def test_nonterms():
    model, noise = peers.NontermsRSSM(), torch.randn(T, B, S)
    loop = adapt(model)
    start = {"stoch": torch.randn(B, S), "deter": torch.randn(B, D).tanh()}
    given = torch.randn(T, B, E), torch.randn(T, B, A).tanh(), nonterminals(), start, T - 1
    want = with_noise(lambda: model.observe_rollout(*given), noise[:-1])
    got = with_noise(lambda: loop.observe_rollout(*given), noise[:-1])
    assert list(got[1]) == list(want[1])[:2] + ["deter", "stoch"]
    same([{k: x[k] for k in want[0]} for x in got], want, model)


def test_representation_and_transition():
    model, noise = peers.RSSMRollout(), torch.randn(T, B, S)
    loop = adapt(model)
    start = peers.RSSMState(*torch.randn(3, B, S), torch.randn(B, D).tanh())
    embed, action = torch.randn(T, B, E), torch.randn(T, B, A).tanh()
    want = with_noise(lambda: model(T, embed, action, start), noise)
    got = with_noise(lambda: loop.rollout_representation(T, embed, action, start), noise)
    assert isinstance(got[0], peers.RSSMState)
    same(got, want, model)
    want = with_noise(lambda: model.rollout_transition(T, action, start), noise)
    same(loop.rollout_transition(T, action, start, noise=noise), want, model)


def test_a_loop_stands_in_the_place_of_its_model():
    """Assigned where the model was: the same parameters by the same names, saved and copied."""
    agent = nn.Module()
    agent.rollout = peers.RSSMRollout()
    agent.rollout.note = "kept"
    agent.rollout.again = agent.rollout.transition_model  # by two names
    before = {name: id(p) for name, p in agent.named_parameters()}
    names = list(agent.state_dict())
    agent.rollout = adapt(agent.rollout)
    assert {name: id(p) for name, p in agent.named_parameters()} == before
    assert list(agent.state_dict()) == names and agent.rollout.note == "kept"
    torch.save(agent.state_dict(), io.BytesIO())
    twin = copy.deepcopy(agent)
    assert twin.rollout.rollout.nets["gru"].module is twin.rollout.transition_model._cell
    with pytest.raises(AttributeError, match="nothing"):
        agent.rollout.nothing  # noqa: B018
    listed = peers.TransitionModel()
    assert adapt(listed).modules is listed.modules


def test_grusa():
    model, noise = peers.GrusaRSSM(), torch.randn(T + 1, B, S)
    loop = adapt(model, std=StdTransform(min=0.3))
    given = torch.randn(B, T + 1, E), torch.randn(B, T, A).tanh()
    want = with_noise(lambda: model.rollout_obs(*given), noise)
    same(loop.rollout_obs(*given, noise=noise.transpose(0, 1)), want, model)
    assert "reward" in loop.rollout.nets


def test_simple_dreamer():
    model, noise = peers.SimpleRSSM(), torch.randn(T - 1, B, S)
    loop = adapt(model)
    given = torch.randn(B, T, E), torch.randn(B, T, A).tanh()
    want = with_noise(lambda: loop.own(*given), noise)
    same(with_noise(lambda: loop(*given), noise), want, model)
    assert loop.rollout.options.through_feat and loop.rollout.options.embed_first


# ---------------------------------------------------------------- sheeprl


def sheep_batch(resets):
    first = torch.zeros(T, B, 1)
    first[2, 1] = first[0, 0] = 1
    sequences = torch.randn(T, B, A).tanh(), torch.randn(T, B, E), *([first] if resets else [])
    return torch.randn(1, B, S), torch.randn(1, B, D).tanh(), *sequences


def same_as_dynamic(model, loop, given):
    noise, steps = torch.randn(T, B, S), []

    def own():
        steps.clear()
        state = given[:2]
        for t in range(T):
            steps.append(model.dynamic(*state, *(x[t : t + 1] for x in given[2:])))
            state = steps[-1][1], steps[-1][0]
        h, z, prior, *dists = zip(*steps, strict=True)
        pairs = (zip(*dist, strict=True) for dist in dists)
        return *map(torch.cat, (h, z, prior)), *(tuple(map(torch.cat, pair)) for pair in pairs)

    same(with_noise(lambda: loop(*given), noise), with_noise(own, noise), model)


@pytest.mark.parametrize("kind", [peers.SheepRSSM, peers.SheepRSSMOfToday])
def test_sheeprl_s_first_dreamer(kind):
    model, today = kind(), kind is peers.SheepRSSMOfToday
    loop, given = adapt(model), sheep_batch(today)
    same_as_dynamic(model, loop, given)
    with pytest.raises(TypeError, match="takes is_first" if today else "takes no is_first"):
        loop(*(given[:4] if today else (*given, torch.zeros(T, B, 1))))
    rollout = adapt(model, actor=peers.SheepActor(), critic=peers.SheepMLP(S + D, H, 1)).rollout
    assert rollout.options.action_std == StdTransform(offset=5.0, min=1e-4)
    assert rollout.policy.stoch_first and rollout.verify(repeats=1).ok
    discrete = peers.SheepActor()
    discrete.distribution = "discrete"
    with pytest.raises(MisfitError, match="2 actions make no one-hot actions of 4"):
        adapt(model, actor=discrete)


def sheeprl():
    return pytest.importorskip("sheeprl.models.models", reason="sheeprl is not installed")


def test_sheeprl_itself():
    models = sheeprl()
    from sheeprl.algos.dreamer_v1 import agent

    linears = lambda widths, n: models.MLP(n, 2 * S, [widths], activation=nn.ELU)  # noqa: E731
    recurrent = agent.RecurrentModel(S + A, D)
    model = agent.RSSM(recurrent, linears(H, D + E), linears(H, D), {"validate_args": False})
    actor = agent.Actor(S + D, [A], True, {"type": "auto"}, dense_units=H, mlp_layers=2)
    loop = adapt(model, actor=actor)
    same_as_dynamic(model, loop, sheep_batch(True))
    assert loop.rollout.options.action_std.offset == pytest.approx(math.log(math.expm1(5)))


# ---------------------------------------------------------------- torchrl itself


def torchrl_model(noise=False, **posterior):
    pytest.importorskip("torchrl", reason="the extra torchrl is not installed")
    from tensordict.nn import TensorDictModule
    from torchrl.data import Bounded
    from torchrl.modules import RSSMPosterior, RSSMPrior
    from torchrl.modules import RSSMRollout as Original

    spec = Bounded(-1, 1, (A,))
    prior = RSSMPrior(spec, hidden_dim=D, rnn_hidden_dim=D, state_dim=S, action_dim=A)
    post = RSSMPosterior(hidden_dim=H, state_dim=S, rnn_hidden_dim=D, obs_embed_dim=E, **posterior)
    n = lambda *names: [("next", name) for name in names]  # noqa: E731
    return Original(
        TensorDictModule(
            prior,
            ["state", "belief", "action"],
            [*n("prior_mean", "prior_std"), "_", ("next", "belief")],
        ),
        TensorDictModule(
            post,
            n("belief", "encoded_latents") + (["post_noise"] if noise else []),
            n("posterior_mean", "posterior_std", "state"),
        ),
    )


def torchrl_batch(*batch):
    from tensordict import TensorDict

    return TensorDict(
        {
            "state": torch.randn(*batch, T, S),
            "belief": torch.randn(*batch, T, D).tanh(),
            "action": torch.randn(*batch, T, A).tanh(),
            ("next", "encoded_latents"): torch.randn(*batch, T, E),
            "post_noise": torch.randn(*batch, T, S),
            "reward": torch.randn(*batch, T, 1),
        },
        [*batch, T],
    )


def test_torchrl_rollout():
    model = torchrl_model(noise=True)
    fast, data = adapt(model), torchrl_batch(B)
    before = data.clone()
    want, got = model(data.clone()), fast(data)
    assert (data == before).all() and last_backend("observe") == "native"
    keys = lambda td: sorted(map(str, td.keys(True, True)))  # noqa: E731
    assert keys(got) == keys(want) and got.batch_size == want.batch_size
    names = [k for k in want.keys(True, True) if want[k].requires_grad]
    assert len(names) >= 6
    same([got[k] for k in names], [want[k] for k in names], model)
    for key in want.keys(True, True):
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5)
    assert {id(p) for p in fast.parameters()} == {id(p) for p in model.parameters()}
    assert fast.in_keys == model.in_keys and fast.out_keys == model.out_keys


def test_torchrl_trains_the_same():
    """Their world-model loss for three steps of Adam, once with each rollout."""
    curves = []
    for fast in (False, True):
        torch.manual_seed(0)
        model = torchrl_model(noise=True)
        rollout = adapt(model) if fast else model
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        data, losses = torchrl_batch(B), []
        for _ in range(3):
            out = rollout(data.clone())["next"]
            loss = (out["state"] - data["reward"]).square().mean() + out[
                "prior_mean"
            ].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4) and curves[0][2] < curves[0][0]


def test_torchrl_draws_its_noise_without_a_key():
    fast = adapt(torchrl_model())
    torch.manual_seed(1)
    one = fast(torchrl_batch(B))
    torch.manual_seed(1)
    data = torchrl_batch(B)
    assert torch.equal(fast(data)["next", "state"], one["next", "state"])
    assert not torch.equal(fast(data)["next", "state"], one["next", "state"])


@pytest.mark.parametrize("bounded", [True, False])
def test_torchrl_actor(bounded):
    """DreamerActor under TanhNormal: the same actions, and gradients through what it sees."""
    model = torchrl_model()
    from tensordict.nn import TensorDictModule
    from torchrl.modules import DreamerActor, ProbabilisticActor
    from torchrl.modules.distributions import TanhNormal

    actor = DreamerActor(out_features=A, depth=2, num_cells=H)
    actor(torch.zeros(1, S), torch.zeros(1, D))  # its layers are lazy
    with torch.no_grad():
        actor.backbone[-2].weight.mul_(20)  # means that the bound reaches
    policy = ProbabilisticActor(
        TensorDictModule(actor, ["state", "belief"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"tanh_loc": bounded},
    )
    rollout = adapt(model, actor=policy).rollout
    both, noise = nn.ModuleList([model, actor]), torch.randn(T, B, S)
    action_noise = torch.randn(T, B, A)
    belief, state = start = torch.randn(B, D).tanh(), torch.randn(B, S)
    dream = rollout.imagine(start, state_noise=noise, action_noise=action_noise)
    actions, beliefs = [], []
    for t in range(T):
        dist = TanhNormal(*actor(state, belief), tanh_loc=bounded)
        action = torch.tanh(dist.loc + dist.scale * action_noise[t])
        _, _, state, belief = model.rssm_prior.module(state, belief, action, noise[t])
        actions.append(action)
        beliefs.append(belief)
    same([dream.action, dream.deter], [torch.stack(actions), torch.stack(beliefs)], both)
    with pytest.raises(MisfitError, match="do not say mean_scale"):
        adapt(model, actor=actor)
    assert adapt(model, actor=actor, mean_scale=5.0).rollout.options.mean_scale == 5.0
    policy[-1].distribution_kwargs = {"low": -2.0}
    with pytest.raises(MisfitError, match=r"TanhNormal in \[-1, 1\] fits"):
        adapt(model, actor=policy)


def test_torchrl_s_face_of_a_module():
    """Selecting keys, naming inputs and outputs, and standing in a sequence are the original's."""
    from tensordict.nn import TensorDictSequential

    model, data = torchrl_model(noise=True), torchrl_batch(B)
    fast = adapt(copy.deepcopy(model))
    chosen = ("next", "belief"), ("next", "posterior_mean")
    results = [m.select_out_keys(*chosen)(data.clone()) for m in (fast, model)]
    assert fast.out_keys == model.out_keys == list(chosen)
    assert set(results[0].keys(True, True)) == set(results[1].keys(True, True))
    for key in chosen:
        torch.testing.assert_close(results[0][key], results[1][key], rtol=1e-4, atol=1e-5)
    fast.reset_out_keys()
    assert ("next", "state") in TensorDictSequential(fast)(data.clone()).keys(True, True)
    with pytest.raises(MisfitError, match="RSSMRollout.*has forward hooks"):
        adapt(model)  # whose selection is a hook that would be lost


def test_torchrl_refusals():
    with pytest.raises(MisfitError, match="rssm_posterior: its std is .*floor=0.5.*the prior's"):
        adapt(torchrl_model(scale_lb=0.5))
    from tensordict.nn import NormalParamExtractor

    model = torchrl_model()
    model.rssm_prior.module.rnn_to_prior_projector[-1] = NormalParamExtractor("relu")
    with pytest.raises(MisfitError, match="rnn_to_prior_projector: scale mapping"):
        adapt(model)


# ---------------------------------------------------------------- torchrl's DreamerV3

C, K = 3, 4


def torchrl_v3(unimix=0.01, standard=True, **options):
    pytest.importorskip("torchrl", reason="the extra torchrl is not installed")
    from tensordict.nn import TensorDictModule
    from torchrl.modules.models.model_based import RSSMPosteriorV3, RSSMPriorV3, RSSMRolloutV3

    sizes = {"rnn_hidden_dim": D, "num_categoricals": C, "num_classes": K, "unimix": unimix}
    prior = RSSMPriorV3(action_shape=(A,), hidden_dim=H, action_dim=A, **sizes, **options)
    rms = options.get("recurrent_model") == "block_gru"
    post = RSSMPosteriorV3(hidden_dim=H, obs_embed_dim=E, use_rms_norm=rms, **sizes)
    n = lambda *names: [("next", name) for name in names]  # noqa: E731
    logits = "posterior_logits" if standard else "logits"  # another name: TensorDicts step by step
    return RSSMRolloutV3(
        TensorDictModule(
            prior, ["state", "belief", "action"], n("prior_logits", "state", "belief")
        ),
        TensorDictModule(post, n("belief", "encoded_latents"), n(logits, "state")),
    )


def v3_batch(*batch, resets=True):
    from tensordict import TensorDict

    start = nn.functional.one_hot(torch.randint(K, (*batch, T, C)), K).flatten(-2).float()
    first = torch.rand(*batch, T, 1) < 0.3
    data = {
        "state": start,
        "belief": torch.randn(*batch, T, D).tanh(),
        "action": torch.randn(*batch, T, A).tanh(),
        ("next", "encoded_latents"): torch.randn(*batch, T, E),
        "reward": torch.randn(*batch, T, 1),
    }
    return TensorDict(data | ({"is_init": first} if resets else {}), [*batch, T])


@pytest.mark.parametrize("standard", [True, False])
@pytest.mark.parametrize("resets", [True, False])
@pytest.mark.parametrize("unimix", [0.0, 0.01])
@pytest.mark.parametrize("recurrent", ["gru", "block_gru"])
def test_torchrl_v3_rollout(standard, resets, unimix, recurrent, monkeypatch):
    """Its tensor path and its TensorDict path, which draw the same numbers in another order."""
    model = torchrl_v3(unimix, standard, recurrent_model=recurrent, num_blocks=2)
    data = v3_batch(B, resets=resets)
    data["action"] *= 2  # the block-diagonal GRU bounds it
    for p in (model.rssm_prior.module, model.rssm_posterior.module):
        torch.nn.init.normal_(p.parameters().__next__())
    fast, uniform = adapt(model), torch.rand(T, B, C)
    before = data.clone()
    got = with_noise(lambda: fast(data), uniform=(uniform,))
    assert (data == before).all()
    assert last_backend("observe") == "native"
    if standard:  # all numbers of prior and posterior at once
        both = torch.stack([torch.rand(T, B, C), uniform], 1)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_, **__: both)
            want = model(data.clone())
    else:
        want = with_noise(lambda: model(data.clone()), uniform=(uniform,))
    keys = lambda td: sorted(map(str, td.keys(True, True)))  # noqa: E731
    assert keys(got) == keys(want) and got.batch_size == want.batch_size
    for key in want.keys(True, True):
        assert got[key].shape == want[key].shape
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5)
    names = [k for k in want.keys(True, True) if want[k].requires_grad]
    assert len(names) >= 6
    same([got[k] for k in names], [want[k] for k in names], model)
    chosen = ("next", "belief"), ("next", "state")
    assert set(fast.select_out_keys(*chosen)(data).keys(True, True)) >= set(chosen)


def test_torchrl_v3_dreams_and_is_verified():
    model = torchrl_v3()
    actor = stack(C * K + D, H, 2 * A)
    policy = {"mean_scale": math.inf, "action_std": StdTransform("sigmoid", 0.9, 1, 2, 0.1)}
    rollout = adapt(model, actor=actor, **policy).rollout
    prior = model.rssm_prior.module

    def dream(start, horizon):
        (belief, state), out = start, []
        for _ in range(horizon):
            mean, y = actor(torch.cat([state, belief], -1)).chunk(2, -1)
            std = 0.9 * torch.sigmoid(y + 2) + 0.1
            action = torch.tanh(mean + std * torch.randn_like(std))
            _, state, belief = prior(state, belief, action)
            out.append((belief, state, action))
        values = map(torch.stack, zip(*out, strict=True))
        return dict(zip(("deter", "stoch", "action"), values, strict=True))

    found = rollout.verify(own_dream=dream, repeats=1)
    assert found.ok, str(found)
    assert "your imagine: gradient of actor.0.weight" in [line.name for line in found.lines]


def test_torchrl_v3_refusals():
    model = torchrl_v3()
    model.rssm_posterior.module.unimix = 0.1
    with pytest.raises(MisfitError, match="its unimix is 0.1, the prior's is 0.01"):
        adapt(model)
    with pytest.raises(MisfitError, match="RSSMRolloutV3 computes something else"):
        adapt(torchrl_v3(), embed_first=True, post=stack(D + E, H, C * K, act=nn.SiLU))


def test_unknown_models_are_refused():
    with pytest.raises(MisfitError, match="Linear is no peer known here.*from_modules"):
        adapt(nn.Linear(2, 2))
    with pytest.raises(MisfitError, match="act_fn: selu has no fast loop"):
        adapt(peers.TransitionModel(F.selu))
