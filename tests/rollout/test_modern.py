"""Adapters of today's Dreamers: V2- and V3-style models, their policies and heads.

Every loop against the model's own with the same noise, values and gradients, in float64; sheeprl's
and torchrl's own classes where they are installed.
"""

import copy

import modern
import pytest
import torch
from modern import SMALL
from torch import nn

from fastdreamer.ops.backend import BackendError, last_backend
from fastdreamer.ops.cells import BlockGRUParams, LateGRUParams
from fastdreamer.ops.params import Categorical, State
from fastdreamer.rollout import Joined, MisfitError, Readout, Rollout, adapt, two_hot

A, D, C, K, E, H, _ = SMALL
Z, T, B = SMALL.stoch, 6, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def spread(model):
    """The same model in float64, its norms no identities, its starts no zeros, logits far apart."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or name == "W":
                p.add_(0.3 * torch.randn_like(p))
            elif p.ndim == 2:
                p.mul_(2)
    return model.double()


def uniform(*shape):
    return torch.rand(*shape, dtype=torch.float64)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def onehot(*lead):
    index = torch.randint(K, (*lead, C))
    return nn.functional.one_hot(index, K).double()


def resets(*shape, at=0.25):
    first = (torch.rand(*shape) < at).double()
    first.view(-1)[0] = 1
    return first


def leaves(result):
    if isinstance(result, torch.Tensor):
        return [result]
    parts = result.values() if isinstance(result, dict) else result
    return [x for part in parts for x in leaves(part)]


def same(got, want, model):
    """Values, and the gradients of all parameters for one weighting of what has any."""
    got, want, grads = leaves(got), leaves(want), []
    assert len(got) == len(want) > 1
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    for outputs in (got, want):
        model.zero_grad()
        torch.manual_seed(3)
        sum((normal(*x.shape) * x).sum() for x in outputs if x.requires_grad).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 4
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-8, atol=1e-10, msg=name)


def stats_batch(model, discrete=True):
    state = {"deter": normal(B, D).tanh()}
    if discrete:
        state |= {"logit": normal(B, C, K), "stoch": onehot(B)}
    else:
        state |= {"mean": normal(B, C), "std": uniform(B, C), "stoch": normal(B, C)}
    return normal(B, T, E), normal(B, T, A).tanh(), resets(B, T), state


STATS = {
    "dreamerv3-torch": {},
    "zeros": {"initial": "zeros"},
    "no norm, no unimix": {"norm": False, "unimix": 0.0},
    "Gaussian": {"discrete": False},
}


@pytest.mark.parametrize("given_state", [True, False])
@pytest.mark.parametrize("name", STATS)
def test_dreamerv3_torch(name, given_state):
    model = spread(modern.StatsRSSM(**STATS[name]))
    discrete = STATS[name].get("discrete", True)
    loop = adapt(model)
    assert isinstance(loop.rollout.rssm.gru, LateGRUParams)
    assert loop.rollout.rssm.gru.gates == "rcu" and not loop.rollout.rssm.gru.deter_first
    embed, action, first, state = stats_batch(model, discrete)
    state = state if given_state else None
    noise = uniform(T, B, C) if discrete else normal(T, B, C)
    got = loop.rollout.serve(lambda: loop.observe(embed, action, first, state), noise)
    assert last_backend("observe") == "eager"
    own = lambda: model.observe(embed, action.clone(), first, state and dict(state))  # noqa: E731
    same(got, loop.rollout.serve(own, noise), model)


def test_more_actions_than_state():
    """Where the model says how many, nothing is ambiguous; where none does, the caller is asked."""
    sizes = SMALL._replace(action=SMALL.latents + 2)
    assert adapt(modern.StatsRSSM(sizes, discrete=False)).rollout.dims["A"] == sizes.action
    model = modern.OldStatsRSSM(sizes, discrete=False)
    with pytest.raises(MisfitError, match="say action_dim="):
        adapt(model)
    assert adapt(model, action_dim=sizes.action).rollout.dims["S"] == sizes.latents


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("discrete", [True, False])
def test_dreamer_torch(discrete, norm):
    """Bias and ELU, two input layers, nothing reset."""
    model = spread(modern.OldStatsRSSM(discrete=discrete, norm=norm))
    loop = adapt(model)
    embed, action, _, state = stats_batch(model, discrete)
    noise = uniform(T, B, C) if discrete else normal(T, B, C)
    got, want = (
        loop.rollout.serve(lambda run=run: run.observe(embed, action, state), noise)
        for run in (loop, model)
    )
    same(got, want, model)


@pytest.mark.parametrize("options", [{}, {"learn_initial": False}, {"action_clip": 0.0}])
@pytest.mark.parametrize("given_state", [True, False])
def test_mlps(options, given_state):
    model = spread(modern.MlpsRSSM(**options))
    loop = adapt(model)
    embed, action, first = normal(B, T, E), 2 * normal(B, T, A), resets(B, T)
    state = {"deter": normal(B, D).tanh(), "logits": normal(B, C, K), "stoch": onehot(B)}
    state, noise, before = state if given_state else None, uniform(T, B, C), action.clone()
    got = loop.rollout.serve(lambda: loop.observe(embed, action, first, state), noise)
    assert torch.equal(action, before)
    own = lambda: model.observe(embed, action.clone(), first, state and dict(state))  # noqa: E731
    same(got, loop.rollout.serve(own, noise), model)


@pytest.mark.parametrize("unimix", [0.0, 0.01])
@pytest.mark.parametrize("layers", [1, 2])
def test_r2dreamer(unimix, layers):
    model = spread(modern.BlocksRSSM(unimix=unimix, dyn_layers=layers))
    loop = adapt(model)
    assert isinstance(loop.rollout.rssm.gru, BlockGRUParams)
    given = normal(B, T, E), 2 * normal(B, T, A), (onehot(B), normal(B, D).tanh()), resets(B, T) > 0
    noise = -(-uniform(T, B, Z).log()).log()
    got, want = (loop.rollout.serve(lambda run=run: run.observe(*given), noise)
                 for run in (loop, model))  # fmt: skip
    same(got, want, model)
    torch.testing.assert_close(
        loop.rollout.prior(got[1]).logits, model._img_net(got[1]), rtol=1e-10, atol=1e-11
    )


def test_natural_dreamer():
    agent = modern.Natural()
    for net in (agent.recurrentModel, agent.priorNet, agent.posteriorNet):
        spread(net)
    loop = adapt(agent)
    assert {n.split(".")[0] for n in loop.state_dict()} == set(vars(agent))
    embed, action, noise = normal(B, T, E), normal(B, T, A).tanh(), uniform(T - 1, B, C)
    got = loop.rollout.serve(lambda: loop(embed, action), noise)
    same(got, loop.rollout.serve(lambda: loop.own(embed, action), noise), loop)
    agent.posteriorNet.config.uniformMix = 0.2
    with pytest.raises(MisfitError, match="uniformMix is 0.2, the prior's is 0.01"):
        adapt(agent)


def same_as_dynamic(model, h_rows=None):
    loop = adapt(model)
    given = (onehot(1, B), normal(1, B, D).tanh(), normal(T, B, A).tanh(), normal(T, B, E),
             resets(T, B, 1))  # fmt: skip
    noise = uniform(T, B, C)
    got, want = (loop.rollout.serve(lambda run=run: run(*given), noise) for run in (loop, loop.own))
    same(got, want, model)
    return loop


@pytest.mark.parametrize("kind", [modern.SheepV2, modern.SheepV3])
def test_sheeprl_s_later_dreamers(kind):
    loop = same_as_dynamic(spread(kind()))
    assert loop.rollout.rssm.gru.deter_first
    if kind is modern.SheepV3:
        model = spread(modern.SheepV3(unimix=0.0))
        assert not same_as_dynamic(model).rollout.options.begin_through


def test_sheeprl_itself():
    models = pytest.importorskip("sheeprl.models.models", reason="sheeprl is not installed")
    from sheeprl.algos.dreamer_v2 import agent as v2
    from sheeprl.algos.dreamer_v3 import agent as v3

    norm = {"layer_norm_cls": models.LayerNorm, "layer_norm_kw": {"eps": 1e-3}}
    recurrent = v2.RecurrentModel(Z + A, D, H)
    mlps = (models.MLP(n, Z, [H], activation=nn.ELU) for n in (D + E, D))
    model = v2.RSSM(recurrent, *mlps, {"validate_args": False}, discrete=K)
    same_as_dynamic(spread(model))
    recurrent = v3.RecurrentModel(Z + A, D, H, **norm)
    kind = {"activation": nn.SiLU, "layer_args": {"bias": False}, "norm_layer": [models.LayerNorm],
            "norm_args": [{"normalized_shape": H, "eps": 1e-3}]}  # fmt: skip
    mlps = (models.MLP(n, Z, [H], **kind) for n in (D + E, D))
    for unimix in (0.01, 0.0):
        model = v3.RSSM(recurrent, *mlps, {}, discrete=K, unimix=unimix) if unimix else model
        model.unimix = unimix
        spread(model)
        loop = same_as_dynamic(model)
        assert "initial_recurrent_state" in dict(loop.named_parameters())
    parts = model.recurrent_model, model.representation_model, model.transition_model
    fixed = v3.RSSM(*parts, {}, discrete=K, learnable_initial_recurrent_state=False).double()
    fixed.initial_recurrent_state.normal_()
    loop = same_as_dynamic(fixed)
    assert list(loop.state_dict()) == list(fixed.state_dict())
    assert "initial_recurrent_state" in dict(loop.named_buffers())
    actor = v3.Actor(Z + D, [A], True, {"type": "auto"}, 2.0, 0.1, dense_units=H, mlp_layers=2)
    loop = adapt(model.float(), actor=actor)
    assert loop.rollout.options.squash == "bound" and loop.rollout.options.mean_scale == 1
    discrete = v3.Actor(Z + D, [A], False, {"type": "auto"}, dense_units=H, mlp_layers=2)
    assert adapt(model, actor=discrete).rollout.options.action_std == Categorical(A, 0.01)
    trunc = v2.Actor(Z + D, [A], True, {"type": "auto"}, dense_units=H, mlp_layers=2)
    with pytest.raises(MisfitError, match="trunc_normal' is drawn by its inverse CDF"):
        adapt(model, actor=trunc)


# ---------------------------------------------------------------- policies and heads


def dream_of(step, act):
    """A peer's imagination: what its policy does in a state, and what comes of it."""

    def run(start, horizon):
        state, out = start, []
        for _ in range(horizon):
            action = act(*state)
            state = step(*state, action)
            out.append((*state, action))
        names = ("deter", "stoch", "action")
        return dict(zip(names, map(torch.stack, zip(*out, strict=True)), strict=True))

    return run


def verified(loop, dream):
    """Against the peer's own imagination, in float32 as it is used."""
    loop.rollout.batch_first = False
    found = loop.rollout.verify(own_dream=dream, repeats=1)
    assert found.ok, str(found)
    assert any("your imagine: gradient of actor" in line.name for line in found.lines)


@pytest.mark.parametrize("kind", ["normal", "onehot"])
def test_dreams_of_dreamerv3_torch(kind):
    model = modern.StatsRSSM()
    actor = modern.StatsMLP(outputs=A, dist=kind)
    heads = {name: modern.StatsMLP(outputs=31) for name in ("reward", "critic")}
    heads["discount"] = modern.StatsMLP(outputs=1, dist="binary")
    loop = adapt(model, actor=actor, **heads)
    options = loop.rollout.options
    assert options.value_as.squashed and len(options.reward_as.bins) == 31
    assert options.squash == "bound" or kind == "onehot"

    def step(deter, stoch, action):
        new = model.img_step({"deter": deter, "stoch": stoch.unflatten(-1, (C, K))}, action)
        return new["deter"], new["stoch"].flatten(-2)

    verified(loop, dream_of(step, lambda h, z: actor(torch.cat([z, h], -1).detach()).sample()))
    dream = loop.rollout.imagine(loop.rollout.initial(B), 4)
    feat = torch.cat([dream.stoch, dream.deter], -1)
    torch.testing.assert_close(dream.reward, heads["reward"](feat).mode()[..., 0], rtol=1e-4,
                               atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("kind", ["trunc_normal", "onehot"])
def test_dreams_of_dreamer_torch(kind):
    model, actor = modern.OldStatsRSSM(), modern.ActionHead(dist=kind)
    heads = {name: modern.DenseHead() for name in ("reward", "critic")}
    loop = adapt(model, actor=actor, discount=modern.DenseHead(dist="binary"), **heads)
    assert loop.rollout.options.squash == ("none" if kind == "trunc_normal" else "tanh")

    def step(deter, stoch, action):
        new = model.img_step({"deter": deter, "stoch": stoch.unflatten(-1, (C, K))}, action)
        return new["deter"], new["stoch"].flatten(-2)

    def act(deter, stoch):
        dist = actor(torch.cat([stoch, deter], -1).detach())
        return dist.sample() if kind == "onehot" else dist.rsample()

    verified(loop, dream_of(step, act))
    with pytest.raises(MisfitError, match="a policy 'normal_1' has no fast loop; trunc_normal"):
        adapt(model, actor=modern.ActionHead(dist="normal_1"))


@pytest.mark.parametrize("kind", ["bounded_normal", "onehot"])
def test_dreams_of_r2dreamer(kind):
    model = modern.BlocksRSSM()
    said = {"min_std": 0.1, "max_std": 1.0} if kind == "bounded_normal" else {"unimix_ratio": 0.01}
    actor = modern.MLPHead(name=kind, outputs=2 * A if kind == "bounded_normal" else A, **said)
    two_hots = {n: modern.MLPHead(name="symexp_twohot", outputs=31, bin_num=31)
                for n in ("reward", "critic")}  # fmt: skip
    discount = modern.MLPHead(name="binary", outputs=1)
    loop = adapt(model, actor=actor, discount=discount, **two_hots, through_feat=True)
    assert not loop.rollout.options.value_as.squashed

    def step(deter, stoch, action):
        stoch, deter = model.img_step(stoch.unflatten(-1, (C, K)), deter, action)
        return deter, stoch.flatten(-2)

    verified(loop, dream_of(step, lambda h, z: actor(torch.cat([z, h], -1)).rsample()))


def test_dreams_of_mlps():
    model, actor = modern.MlpsRSSM(), modern.PolicyNetwork()
    value = modern.PolicyNetwork(bins=31)
    loop = adapt(model, actor=actor, critic=value)

    def step(deter, stoch, action):
        state = {"deter": deter, "stoch": stoch.unflatten(-1, (C, K))}
        new = model.forward_img(state, action.clone())
        return new["deter"], new["stoch"].flatten(-2)

    verified(loop, dream_of(step, lambda h, z: actor(torch.cat([z, h], -1).detach()).rsample()))
    assert adapt(model, actor=modern.PolicyNetwork(discrete=True)).rollout.policy.noise(A) == 1


@pytest.mark.parametrize("kind", ["scaled_normal", "discrete"])
def test_dreams_of_sheeprl(kind):
    model, actor = modern.SheepV3(), modern.SheepActor(distribution=kind)
    loop = adapt(model, actor=actor)

    def step(deter, stoch, action):
        deter = model.recurrent_model(torch.cat((stoch, action), -1), deter)
        return deter, model.drawn(model.prior_logits(deter)).flatten(-2)

    verified(loop, dream_of(step, lambda h, z: actor(torch.cat([z, h], -1).detach())[0][0]))


def test_policies_that_do_not_fit():
    model = modern.StatsRSSM()
    for changes, message in [
        ({"_dist": "trunc_normal"}, "a policy 'trunc_normal' has no fast loop; normal"),
        ({"_absmax": 2.0}, "absmax = 2.0; 1.0, or None"),
        ({"_symlog_inputs": True}, "takes the symlog of its inputs"),
    ]:
        actor = modern.StatsMLP(outputs=A, dist="normal")
        for name, value in changes.items():
            setattr(actor, name, value)
        with pytest.raises(MisfitError, match=message):
            adapt(model, actor=actor)
    liar = modern.StatsMLP(outputs=A, dist="normal")
    liar._min_std = 0.5  # its forward() has 0.1
    with pytest.raises(MisfitError, match="actor: StatsMLP gives something else than its layers"):
        adapt(model, actor=liar)
    wrong = modern.StatsMLP(outputs=31)
    with pytest.raises(MisfitError, match="critic: StatsMLP gives something else"):
        adapt(model, critic=wrong, value_as=two_hot(31))


# ---------------------------------------------------------------- cells and layers by themselves


def parts(**changes):
    """What from_modules takes of a V3-style model of one's own."""
    given = {
        "inp": nn.Sequential(*modern.normed(Z + A, H)),
        "gru": modern.LateCell(H, D),
        "prior": nn.Sequential(*modern.normed(D, H), nn.Linear(H, Z)),
        "post": nn.Sequential(*modern.normed(D + E, H), nn.Linear(H, Z)),
        "latent": Categorical(K, 0.01),
    }
    return given | changes


class Cell(nn.Module):
    """A late-reset cell whose rows and columns stand as asked."""

    def __init__(self, gates="rcu", deter_first=False, update=-1.0, norm=nn.LayerNorm, lie=1.0):
        super().__init__()
        self.gates, self.deter_first, self.lie, self.update_bias = gates, deter_first, lie, update
        self.joint = nn.Linear(H + D, 3 * D)
        self.norm = norm(3 * D, eps=1e-4)

    def forward(self, x, h):
        rows = self.norm(self.joint(torch.cat((h, x) if self.deter_first else (x, h), -1)))
        part = dict(zip(self.gates, rows.chunk(3, -1), strict=True))
        u = torch.sigmoid(part["u"] + self.update_bias)
        return u * torch.tanh(torch.sigmoid(part["r"]) * part["c"]) + (1 - u) * h * self.lie


@pytest.mark.parametrize("gates", ["rcu", "ruc", "ucr"])
@pytest.mark.parametrize("deter_first", [False, True])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_the_order_is_read_off_the_cell(gates, deter_first, norm):
    cell = Cell(gates, deter_first, 0.25, norm)
    rollout = Rollout.from_modules(**parts(gru=cell))
    gru = rollout.rssm.gru
    assert (gru.gates, gru.deter_first, gru.update_bias) == (gates, deter_first, 0.25)
    found = rollout.verify(repeats=1)
    assert found.ok, str(found)


def test_every_kind_of_layer_is_verified():
    """Norms with and without parameters, several layers, two side by side, a learned start."""
    start = nn.Parameter(torch.randn(D))
    given = parts(
        prior=[nn.Linear(D, H, bias=False), nn.LayerNorm(H, elementwise_affine=False), nn.Mish(),
               nn.Linear(H, H), nn.Mish(), Joined(nn.Linear(H, C), nn.Linear(H, C))],
        post=[nn.Linear(D + E, H), nn.RMSNorm(H), nn.GELU(approximate="tanh"),
              nn.Linear(H, 2 * C)],
        inp=[nn.Linear(C + A, H, bias=False), nn.RMSNorm(H, eps=1e-4), nn.Linear(H, H),
             nn.LayerNorm(H, eps=1e-3)],
        activation="gelu", latent=None, begin=start,
        actor=[nn.Linear(D + C, H), nn.RMSNorm(H), nn.ReLU(), nn.Linear(H, 2 * A)],
        reward=[nn.Linear(D + C, H), nn.SiLU(), nn.Linear(H, 2)],
        critic=[nn.Linear(D + C, H), nn.SiLU(), nn.Linear(H, 9)], value_as=two_hot(9),
        discount=[nn.Linear(D + C, H), nn.SiLU(), nn.Linear(H, 1)], hard_discount=True,
    )  # fmt: skip
    rollout = Rollout.from_modules(**given)
    found = rollout.verify(repeats=1)
    names = [line.name for line in found.lines]
    assert found.ok, str(found)
    for name in ("gradient of begin.0.value", "gradient of prior.3.weight", "gradient of post.1"):
        assert any(name in line for line in names), name
    seen = rollout.observe(torch.randn(T, B, E), torch.randn(T, B, A), torch.ones(T, B) > 0)
    sum(x.sum() for x in seen.state).backward()
    assert start.grad.abs().sum() > 0 and given["prior"][0].weight.grad.abs().sum() > 0
    torch.testing.assert_close(rollout.initial(2).deter, torch.tanh(start).repeat(2, 1))


def test_all_the_misfits_of_a_model_at_once():
    """As what they are, with what would fit."""
    with pytest.raises(MisfitError) as raised:
        Rollout.from_modules(**parts(
            gru=Cell(lie=1.1),
            inp=nn.Sequential(nn.Linear(Z + A, H), nn.BatchNorm1d(H), nn.SiLU()),
            prior=nn.Sequential(nn.Linear(D, H), nn.LayerNorm(H + 1), nn.SiLU(), nn.Linear(H, Z)),
            post=nn.Sequential(nn.Linear(D + E, H), nn.Softsign(), nn.Linear(H, Z)),
            squash="sin", begin=None,
        ))  # fmt: skip
    lines = str(raised.value).split("\n")
    for line, start in zip(lines, [
        "gru: Cell of Linear(in_features=22, out_features=36, bias=True), LayerNorm",
        "inp[1]: BatchNorm1d", "prior[1]: normalises 11 numbers, the layer before has 10",
        "post[1]: Softsign", "squash must be one of tanh, none, bound, clip",
    ], strict=True):  # fmt: skip
        assert line.startswith(start), line
    assert "computes something else" in lines[0] and "block-diagonal GRU fit" in lines[0]
    assert "LayerNorm or RMSNorm behind them" in lines[1]


@pytest.mark.parametrize("inp", [{}, {"inp": nn.Sequential(nn.Linear(Z + A, H), nn.Softsign())}])
def test_latents_and_actors_are_named_beside_a_cell(inp):
    """The prior says what the state is where the cell cannot be read."""
    head = nn.Linear(D + Z, 1)
    with pytest.raises(MisfitError) as raised:
        Rollout.from_modules(**parts(gru=Cell(lie=1.1), latent=None, critic=head, **inp))
    lines = str(raised.value).split("\n")
    assert lines[0].startswith("gru: Cell") and len(lines) == 2 + len(inp)
    assert lines[-1].startswith("prior: its 12 outputs are the logits of categorical latents")
    with pytest.raises(MisfitError) as raised:
        Rollout.from_modules(**parts(gru=Cell(lie=1.1), actor=head, critic=nn.Linear(D, 1), **inp))
    lines = str(raised.value).split("\n")
    assert lines[0].startswith("gru: Cell")
    assert lines[-1].startswith("critic: must map 24 to 1")
    assert inp or lines[1].startswith("actor: must map 24 to 4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inp": None}, "inp: must be given"),
        ({"begin": torch.zeros(D + 1)}, r"begin: must have D=12 numbers, got 13"),
        ({"reward": nn.Linear(D + Z, 31)}, "reward: must map 24 to 1 .*got 24 to 31"),
        ({"critic": nn.Linear(D + Z, 30), "value_as": two_hot(31)}, "must map 24 to 31 .*got 24"),
        ({"actor": nn.Linear(D + Z, A), "action_std": Categorical(3)},
         "2 actions make no one-hot actions of 3"),
        ({"prior": nn.Sequential(nn.LayerNorm(D), nn.Linear(D, Z))}, "stand as 'nL'"),
        ({"prior": nn.Sequential(nn.Linear(D, Z), nn.LayerNorm(Z))}, "stand as 'Ln'"),
        ({"prior": [nn.Linear(D, H), nn.SiLU(), Joined(nn.Linear(H, Z), nn.ReLU())]},
         "only two Linear layers can be joined"),
        ({"prior": [nn.Linear(D, H), nn.SiLU(),
                    Joined(nn.Linear(H, Z), nn.Linear(H, Z, bias=False))]}, "one has a bias"),
        ({"gru": modern.Deter(SMALL)}, "inp: the cell has layers of stoch and action of its own"),
        ({"gru": modern.Deter(SMALL._replace(latents=2)), "inp": None},
         "prior: its 12 outputs are no state of 8"),
    ],
)  # fmt: skip
def test_refusals(changes, message):
    with pytest.raises(MisfitError, match=message):
        Rollout.from_modules(**parts(**changes))


def test_compiled_backends_say_what_they_lack():
    given = State(torch.zeros(1, D), torch.zeros(1, Z)), 2
    heads = {"actor": nn.Linear(D + Z, 2 * A), "reward": nn.Linear(D + Z, 9)}
    heads |= {"critic": nn.Linear(D + Z, 1), "reward_as": two_hot(9)}
    Rollout.from_modules(**parts(**heads), backend="native").imagine(*given)
    heads["reward_as"] = Readout(nn.Parameter(two_hot(9).bins))
    rollout = Rollout.from_modules(**parts(**heads), backend="native")
    with pytest.raises(BackendError, match="native.*it has no learned bins"):
        rollout.imagine(*given)
    rollout.backend = None
    rollout.imagine(*given)
    assert last_backend("imagine") == "eager"


def test_bins_follow_their_heads_once():
    """A copy in every call would wait for a GPU, and none may be made while one is captured."""
    heads = {"actor": nn.Linear(D + Z, 2 * A), "reward": nn.Linear(D + Z, 9)}
    heads |= {"critic": nn.Linear(D + Z, 31), "reward_as": two_hot(9), "value_as": two_hot(31)}
    given = parts(**heads)
    rollout = Rollout.from_modules(**given)
    assert rollout.heads.value_as.bins is given["value_as"].bins
    for part in given.values():
        if isinstance(part, nn.Module):
            part.to("meta")
    with torch.inference_mode():
        before = rollout.heads
    for name in ("reward_as", "value_as"):
        bins = getattr(rollout.heads, name).bins
        assert bins.is_meta and bins is getattr(before, name).bins and not bins.is_inference()
    state = State(torch.zeros(1, D, device="meta"), torch.zeros(1, Z, device="meta"))
    assert rollout.imagine(state, 2).returns.device.type == "meta"
    assert rollout.plan(state, 2, num_samples=3, num_elites=2, iterations=1).mean.is_meta


def test_norms_and_layers_of_one_s_own_are_asked():
    """What gives the same is taken as it; what adds something is not."""
    noisy = modern.OwnMLP(D, H, Z, last=True)
    Rollout.from_modules(**parts(prior=noisy.layers))
    noisy.layers[0][0].vn_std = 0.1
    with pytest.raises(MisfitError, match=r"prior\[0\]\[0\]: OwnLinear.*forward\(\) of its own"):
        Rollout.from_modules(**parts(prior=noisy.layers))
    noisy.eval()
    Rollout.from_modules(**parts(prior=noisy.layers))

    class Scaled(nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(MisfitError, match=r"prior\[1\]: Scaled"):
        given = nn.Sequential(nn.Linear(D, H), Scaled(H), nn.SiLU(), nn.Linear(H, Z))
        Rollout.from_modules(**parts(prior=given))


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_a_norm_s_bias_that_was_zero_when_it_was_read_is_added_when_it_is_not(backend):
    class Shifted(nn.RMSNorm):
        def __init__(self, size):
            super().__init__(size, eps=1e-3)
            self.bias = nn.Parameter(torch.zeros(size))

        def forward(self, x):
            return super().forward(x) + self.bias

    prior = nn.Sequential(nn.Linear(D, H), Shifted(H), nn.SiLU(), nn.Linear(H, Z))
    rollout = Rollout.from_modules(**parts(prior=prior, backend=backend))
    nn.init.normal_(prior[1].bias)
    new, dist = rollout.step(rollout.initial(3), torch.randn(3, A))
    torch.testing.assert_close(dist.logits.flatten(1), prior(new.deter), rtol=1e-5, atol=1e-5)


def test_readouts_are_told():
    bins = two_hot(255).bins
    assert bins[127] == 0 and torch.equal(bins, -bins.flip(0))
    assert bins[-1] == pytest.approx(torch.expm1(torch.tensor(20.0)).item(), rel=1e-6)
    even = two_hot(10)
    assert torch.equal(even.bins, -even.bins.flip(0)) and even == Readout(even.bins)


# ---------------------------------------------------------------- torchrl's


def torchrl_models():
    return pytest.importorskip(
        "torchrl.modules.models.model_based", reason="the extra torchrl is not installed"
    )


def test_torchrl_s_block_gru_by_itself():
    models = torchrl_models()
    cell = models.DreamerV3BlockGRUCell(H, D, projection_size=H, num_blocks=3, num_layers=2)
    gru = models.DreamerV3BlockGRU(H, D, projection_size=H, num_blocks=3)
    for given in (cell, gru):
        for inp in (nn.Sequential(nn.Linear(Z + A, H), nn.RMSNorm(H), nn.SiLU()),):
            rollout = Rollout.from_modules(**parts(gru=given, inp=inp))
            found = rollout.verify(repeats=1)
            assert found.ok, str(found)
            assert not rollout.rssm.gru.deter_first and len(rollout.rssm.inp.weights) == 2
    direct = models.DreamerV3BlockGRU(Z + A, D, projection_size=H, num_blocks=3, update_bias=-0.5)
    rollout = Rollout.from_modules(**parts(gru=direct, inp=None))
    found = rollout.verify(repeats=1)
    assert found.ok, str(found)
    assert rollout.rssm.gru.update_bias == -0.5
    with pytest.raises(MisfitError, match="its activation is elu, that of the cell's own"):
        inp = nn.Sequential(nn.Linear(Z + A, H), nn.ELU())
        Rollout.from_modules(**parts(gru=cell, inp=inp))


@pytest.mark.parametrize("recurrent", ["gru", "block_gru"])
def test_torchrl_s_prior(recurrent):
    models = torchrl_models()
    prior = spread(models.RSSMPriorV3(
        action_shape=(A,), hidden_dim=H, rnn_hidden_dim=D, num_categoricals=C, num_classes=K,
        action_dim=A, recurrent_model=recurrent, num_blocks=3, unimix=0.01,
    )).float()  # fmt: skip
    step = adapt(prior)
    lead = (B,) if recurrent == "gru" else (5, B)  # torch's cell takes no more
    given = [onehot(*lead).flatten(-2), normal(*lead, D).tanh(), normal(*lead, A)]
    given = [x.float() for x in given]
    noise = torch.rand(*lead, C)
    got, want = (run(*given, _uniform=noise) for run in (step, prior))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    post = models.RSSMPosteriorV3(
        hidden_dim=H, num_categoricals=C, num_classes=K, rnn_hidden_dim=D, obs_embed_dim=E
    )
    with pytest.raises(MisfitError, match="RSSMPosteriorV3 alone is no loop"):
        adapt(post)
    both = adapt(prior, post=post.obs_rnn_to_post_projector).rollout
    seen = both.observe(torch.zeros(1, 1, E), torch.zeros(1, 1, A))
    assert seen.post.logits.shape == (1, 1, C, K)


def test_a_loop_stands_in_the_place_of_its_model():
    """Parameters by their names, attributes and methods of the model, copies of its own."""
    model = modern.StatsRSSM()
    loop = adapt(model)
    assert list(loop.state_dict()) == list(model.state_dict())
    assert {id(p) for p in loop.parameters()} == {id(p) for p in model.parameters()}
    assert loop._discrete == K and loop.img_step == model.img_step
    apart = adapt(copy.deepcopy(model))
    with torch.no_grad():
        apart.model.W.add_(1)
    assert not torch.equal(apart.rollout.initial(1).deter, loop.rollout.initial(1).deter)
    for attribute, value, message in [
        ("_rec_depth", 2, "_rec_depth = 2; 1 fits"),
        ("_mean_act", "tanh5", "_mean_act = 'tanh5'; 'none' fits"),
    ]:
        other = modern.StatsRSSM()
        setattr(other, attribute, value)
        with pytest.raises(MisfitError, match=message):
            adapt(other)
    with pytest.raises(MisfitError, match="action_clip = 0.5; 1.0"):
        adapt(modern.MlpsRSSM(action_clip=0.5))


def test_a_model_that_says_something_else_is_refused():
    """Asked itself: a cell replaced, a start that is not what its name says."""

    class Other(modern.StatsRSSM):
        def initial(self, rows):
            state = super().initial(rows)
            return state | {"deter": state["deter"] + 0.1}

    with pytest.raises(MisfitError, match="Other computes something else"):
        adapt(Other())
    model = modern.StatsRSSM()
    model._unimix_ratio = 0.0
    loop = adapt(model)
    assert loop.rollout.options.latent == Categorical(K, 0.0)
