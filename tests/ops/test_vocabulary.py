"""Layers, recurrences, latents, starts, policies and heads of today's Dreamers, in every op.

Against ``torch.nn`` and loops written out here, in float64; by gradcheck; what refuses them.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdreamer.ops.backend import BackendError, last_backend
from fastdreamer.ops.cells import (
    BlockGRUParams,
    GRUParams,
    LateGRUParams,
    block_gru_cell,
    late_gru_cell,
)
from fastdreamer.ops.cem import cem
from fastdreamer.ops.decide import decide
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.layers import ACTIVATIONS, MLPParams, Norm, mlp, mlp_act, normalise
from fastdreamer.ops.observe import observe
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.params import (
    ActorParams,
    Begin,
    Branches,
    Categorical,
    OneHot,
    Readout,
    ReturnParams,
    RSSMParams,
    State,
    StdTransform,
    act,
    actor_dist,
    read_out,
    scalar,
    two_hot,
)
from fastdreamer.ops.rssm_step import rssm_step
from fastdreamer.ops.vocabulary import BODIES, lacking

A, D, C, K, E, H, G = 2, 6, 3, 4, 5, 7, 3
Z = C * K
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


class Draw:
    """Random tensors, one after another."""

    def __init__(self, seed=0, dtype=torch.float64):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def uniform(self, *shape):
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)


def norm_of(draw, kind, n):
    """A norm whose scale and shift are no ones and zeros."""
    if kind is None:
        return None
    return Norm(kind, 1 + 0.3 * draw(n), 0.3 * draw(n) if kind == "layer" else None, 1e-3)


def layers(draw, *widths, kind="layer", act="silu", bias=False, act_last=False, gain=1.0):
    """Layers without bias but the last, each with a norm of its own behind it."""
    pairs = list(itertools.pairwise(widths))
    count = len(pairs) - (not act_last)
    weights = [draw(b, a) / math.sqrt(a) for a, b in pairs]
    weights[-1] = gain * weights[-1]
    biases = [0.3 * draw(b) if bias or i == count else None for i, (_, b) in enumerate(pairs)]
    norms = tuple(norm_of(draw, kind, b) for _, b in pairs[:count])
    return MLPParams(tuple(weights), tuple(biases), act, norms if kind else ())


def late_gru(draw, **options):
    weight = draw(3 * D, D + H) / 2
    return LateGRUParams(weight, options.pop("bias", None), norm_of(draw, "layer", 3 * D),
                         **options)  # fmt: skip


def block_gru(draw, features, depth=2):
    hidden = layers(draw, D, H, kind="rms", bias=True, act_last=True)
    widths = [
        (D // G + features + H, D // G),
        *[(D // G, D // G)] * (depth - 1),
        (D // G, 3 * D // G),
    ]
    weights = tuple(draw(G, a, b) / math.sqrt(a) for a, b in widths)
    biases = tuple(0.3 * draw(G * b) for _, b in widths)
    norms = tuple(norm_of(draw, "rms", D) for _ in range(depth))
    return BlockGRUParams(hidden, MLPParams(weights, biases, "silu", norms))


def model(kind="late", seed=0, dtype=torch.float64, **options):
    """The world model of dreamerv3-torch (late) or r2dreamer (block), in small."""
    draw = Draw(seed, dtype)
    given = {"latent": Categorical(K, 0.01)} | options
    if kind == "late":
        inp, gru = layers(draw, Z + A, H, act_last=True), late_gru(draw)
    else:
        rms = {"kind": "rms", "bias": True, "act_last": True}
        inp = Branches(layers(draw, Z, H, **rms), layers(draw, A, H, **rms))
        gru = block_gru(draw, 2 * H)
        given = {"bound_action": True} | given
    prior = layers(draw, D, H, H, Z, gain=8)
    return RSSMParams(inp, gru, prior, layers(draw, D + E, H, Z, gain=8), **given)


def policy(draw, outputs=2 * A, **options):
    given = {"mean_scale": 1.0, "std": StdTransform("sigmoid", scale=0.9, offset=2, min=0.1)}
    return ActorParams(layers(draw, D + Z, H, H, outputs), **given | options)


def heads(draw, bins=9):
    two_hot = layers(draw, D + Z, H, bins, gain=3)
    support = torch.linspace(-3, 3, bins, dtype=draw.dtype)
    read = Readout(support, True), Readout(torch.sinh(support))
    return ReturnParams(two_hot, layers(draw, D + Z, H, bins, gain=3), None, 0.99, 0.95,
                        layers(draw, D + Z, H, 1), False, False, *read)  # fmt: skip


class Inputs:
    def __init__(self, params, seed=0, dtype=torch.float64, T=4, B=3):
        draw = Draw(seed + 100, dtype)
        hot = F.one_hot((draw.uniform(B, C) * K).long(), K).flatten(-2).to(dtype)
        self.start = State(draw(B, D).tanh(), hot)
        self.embed, self.action = draw(T, B, E), 1.5 * draw(T, B, A)
        self.first = draw.uniform(T, B) < 0.2
        self.first[T // 2, 0] = True
        self.noise = draw.uniform(T, B, C)
        if params.noise == "S":
            self.noise = -(-draw.uniform(T, B, Z).log()).log()
        self.action_noise = draw(T, B, A)


def tensors_of(part):
    """Every tensor in a description."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, tuple):
        for inner in part:
            yield from tensors_of(inner)


def with_tensors(part, new):
    """The same description of other tensors, taken from an iterator."""
    if isinstance(part, torch.Tensor):
        return next(new)
    if isinstance(part, tuple):
        parts = [with_tensors(inner, new) for inner in part]
        return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)
    return part


# ---------------------------------------------------------------- layers and cells


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [None, nn.LayerNorm, nn.RMSNorm])
def test_layers_are_torch_s(kind, bias, affine, activation):
    function = {"elu": nn.ELU(), "relu": nn.ReLU(), "silu": nn.SiLU(), "tanh": nn.Tanh(),
                "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "mish": nn.Mish()}  # fmt: skip
    torch.manual_seed(0)
    linears = [
        nn.Linear(4, 5, bias).double(),
        nn.Linear(5, 5, bias).double(),
        nn.Linear(5, 3).double(),
    ]
    modules, norms = [], []
    for linear in linears[:-1]:
        modules.append(linear)
        if kind is not None:
            norm = kind(5, eps=0.02, elementwise_affine=affine).double()
            for p in norm.parameters():
                nn.init.normal_(p)
            modules.append(norm)
            name = "rms" if kind is nn.RMSNorm else "layer"
            norms.append(Norm(name, norm.weight, getattr(norm, "bias", None), 0.02))
        modules.append(function[activation])
    weights, biases = zip(*((linear.weight, linear.bias) for linear in linears), strict=True)
    params = MLPParams(weights, biases, activation, tuple(norms))
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    torch.testing.assert_close(mlp(params, x), nn.Sequential(*modules, linears[-1])(x), **CLOSE)
    hidden = params._replace(weights=weights[:-1], biases=biases[:-1])
    torch.testing.assert_close(mlp_act(hidden, x), nn.Sequential(*modules)(x), **CLOSE)
    detached = list(tensors_of(params.detach()))
    assert detached and not any(p.requires_grad for p in detached)


@pytest.mark.parametrize("deter_first", [False, True])
@pytest.mark.parametrize("gates", ["rcu", "ruc"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("update_bias", [-1.0, 0.5])
def test_late_gru_by_its_equation(deter_first, gates, bias, update_bias):
    draw = Draw()
    params = late_gru(draw, bias=draw(3 * D) if bias else None, gates=gates,
                      deter_first=deter_first, update_bias=update_bias)  # fmt: skip
    x, h = draw(4, H), draw(4, D).tanh()
    of_x, of_h = params.weight[:, :H], params.weight[:, H:]
    if deter_first:
        of_h, of_x = params.weight[:, :D], params.weight[:, D:]
    rows = x @ of_x.T + h @ of_h.T + (params.bias if bias else 0)
    centred = rows - rows.mean(-1, keepdim=True)
    rows = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    rows = rows * params.norm.weight + params.norm.bias
    part = {letter: rows[:, i * D : (i + 1) * D] for i, letter in enumerate(gates)}
    u = 1 / (1 + torch.exp(-part["u"] - update_bias))
    want = u * torch.tanh(part["c"] / (1 + torch.exp(-part["r"]))) + (1 - u) * h
    torch.testing.assert_close(late_gru_cell(params, x, h), want, **CLOSE)


@pytest.mark.parametrize("deter_first", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_block_gru_by_its_equation(depth, deter_first):
    draw = Draw()
    params = block_gru(draw, 2 * H, depth)._replace(deter_first=deter_first)
    x, h = draw(4, 2 * H), draw(4, D).tanh()

    def rms(x, norm):
        return F.silu(x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight)

    def blocks(parts, i):
        weight, bias = params.blocks.weights[i], params.blocks.biases[i].view(G, -1)
        return [parts[g] @ weight[g] + bias[g] for g in range(G)]

    f = rms(h @ params.hidden.weights[0].T + params.hidden.biases[0], params.hidden.norms[0])
    features, size = [f, x] if deter_first else [x, f], D // G
    parts = [torch.cat([h[:, g * size : (g + 1) * size], *features], -1) for g in range(G)]
    for i in range(depth):
        joined = rms(torch.cat(blocks(parts, i), -1), params.blocks.norms[i])
        parts = [joined[:, g * size : (g + 1) * size] for g in range(G)]
    gates = blocks(parts, depth)
    r, c, u = (
        torch.cat([gate[:, i * size : (i + 1) * size] for gate in gates], -1) for i in range(3)
    )
    u = torch.sigmoid(u - 1)
    want = u * torch.tanh(torch.sigmoid(r) * c) + (1 - u) * h
    torch.testing.assert_close(block_gru_cell(params, x, h), want, **CLOSE)


# ---------------------------------------------------------------- the loops


def by_hand(params, x, reset=(True, True, True)):
    """observe, step by step: how each of the peers filters."""
    (deter, stoch), states, posts = x.start, [], []
    begin = State(torch.zeros(1, D).double(), torch.zeros(1, Z).double())
    if params.begin is not None:
        h = torch.tanh(params.begin.weight)[None]
        logits = mlp(params.prior, h).view(1, C, K)
        p = 0.99 * logits.softmax(-1) + 0.01 / K
        hot = F.one_hot(logits.argmax(-1), K)
        begin = State(h, (hot + p.log() - p.log().detach()).flatten(-2))
    for t in range(len(x.noise)):
        first = x.first[t][:, None].double()
        if reset[0]:
            deter = (1 - first) * deter + first * begin.deter
        if reset[1]:
            stoch = (1 - first) * stoch + first * begin.stoch
        action = x.action[t] * (1 - first) if reset[2] else x.action[t]
        if params.bound_action:
            action = action / action.abs().clamp(min=1).detach()
        if isinstance(params.inp, Branches):
            hidden = torch.cat(
                [mlp_act(params.inp.stoch, stoch), mlp_act(params.inp.action, action)], -1
            )
            deter = block_gru_cell(params.gru, hidden, deter)
        else:
            hidden = mlp_act(params.inp, torch.cat([stoch, action], -1))
            deter = late_gru_cell(params.gru, hidden, deter)
        logits = mlp(params.post, torch.cat([deter, x.embed[t]], -1)).view(-1, C, K)
        p = (1 - params.latent.unimix) * logits.softmax(-1) + params.latent.unimix / K
        if params.latent.gumbel:
            soft = (p.log() + x.noise[t].view(-1, C, K)).softmax(-1)
            hot = F.one_hot(soft.argmax(-1), K)
        else:
            soft, hot = p, F.one_hot((x.noise[t][..., None] > p.cumsum(-1)).sum(-1), K)
        stoch = (hot + soft - soft.detach()).flatten(-2)
        states.append(State(deter, stoch))
        posts.append(logits)
    return State(*map(torch.stack, zip(*states, strict=True))), torch.stack(posts)


def grad_of(outputs, params):
    draw = Draw(7)
    loss = sum((draw(*out.shape) * out).sum() for out in outputs)
    leaves = [p for p in tensors_of(params) if p.requires_grad]
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def trainable(params):
    leaves = (p.clone().requires_grad_() for p in tensors_of(params))
    return with_tensors(params, leaves)


MODELS = {
    "late": {},
    "late, no unimix": {"latent": Categorical(K)},
    "late, learned start": {"begin": Begin(Draw(5)(D))},
    "block": {"kind": "block"},
    "block, Gumbel": {"kind": "block", "latent": Categorical(K, 0.01, True)},
    "block, Gumbel, no unimix": {"kind": "block", "latent": Categorical(K, 0.0, True)},
}


@pytest.mark.parametrize("name", MODELS)
def test_observe_equals_its_steps(name):
    params = trainable(model(**MODELS[name]))
    x = Inputs(params)
    seen = observe(params, x.start, x.embed, x.action, x.first, x.noise)
    want = by_hand(params, x)
    assert last_backend("observe") == "eager"
    torch.testing.assert_close(seen.state, want[0], **CLOSE)
    torch.testing.assert_close(seen.post.logits, want[1], **CLOSE)
    prior = mlp(params.prior, want[0].deter).unflatten(-1, (C, K))
    torch.testing.assert_close(seen.prior.logits, prior, **CLOSE)
    got, wanted = ([*s, post] for s, post in ((seen.state, seen.post.logits), want))
    for g, w in zip(grad_of(got, params), grad_of(wanted, params), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reset", ["all", "state", "stoch", "deter"])
def test_a_learned_start_by_parts(reset):
    params = trainable(model(begin=Begin(Draw(5)(D))))
    x = Inputs(params)
    parts = {"all": (1, 1, 1), "state": (1, 1, 0), "stoch": (0, 1, 0), "deter": (1, 0, 0)}[reset]
    seen = observe(params, x.start, x.embed, x.action, x.first, x.noise, reset=reset)
    torch.testing.assert_close(seen.state, by_hand(params, x, parts)[0], **CLOSE)


def test_a_learned_start_learns_or_not():
    """w by h always; the prior by the mode only where that has a gradient."""
    for through in (True, False):
        params = trainable(model(begin=Begin(Draw(5)(D), through)))
        x = Inputs(params)
        x.first[:] = True
        seen = observe(params, x.start, x.embed, x.action, x.first, x.noise)
        loss = (Draw(3)(*seen.state.deter.shape) * seen.state.deter).sum()
        of_w, of_prior = torch.autograd.grad(
            loss, [params.begin.weight, params.prior.weights[-1]], allow_unused=True
        )
        assert of_w.abs().sum() > 0
        assert (of_prior is not None and of_prior.abs().sum() > 0) == through
        frozen = params.detach()
        assert not any(p.requires_grad for p in tensors_of(frozen))


@pytest.mark.parametrize("kind", ["late", "block"])
def test_all_loops_take_the_same_step(kind):
    params, draw = model(kind), Draw(9)
    x = Inputs(params)
    states = open_loop(params, x.start, x.action, x.noise)
    state = x.start
    for t in range(len(x.noise)):
        state, prior = rssm_step(params, state, x.action[t], x.noise[t])
        torch.testing.assert_close(State(states.deter[t], states.stoch[t]), state, **CLOSE)
        assert isinstance(prior, OneHot) and prior.logits.shape == (3, C, K)
    actor, returns = policy(draw, squash="bound"), heads(draw)
    dream = imagine(params, actor, x.start, x.noise, x.action_noise, returns=returns)
    states = open_loop(params, x.start, dream.action, x.noise)
    torch.testing.assert_close((dream.deter, dream.stoch), tuple(states), **CLOSE)
    assert (dream.action.abs() <= 1 + 1e-12).all()
    first = act(actor, x.start.feat, x.action_noise[0])
    torch.testing.assert_close(dream.action[0], first, **CLOSE)
    torch.testing.assert_close(
        dream.reward, scalar(returns.reward, returns.reward_as, states.feat), **CLOSE
    )
    # one candidate, drawn at the plan's own mean, scores what imagining its actions is worth
    noise = torch.zeros(1, 4, 3, 1, A).double(), x.noise[None, :, :, None]
    plan = cem(params, returns, x.start, dream.action, 0 * dream.action, *noise, num_elites=1,
               clip=2.0)  # fmt: skip
    torch.testing.assert_close(plan.scores[0, :, 0], dream.returns[0], rtol=1e-9, atol=1e-11)
    chosen = decide(params, actor, x.start, x.action[0], x.embed[0], x.noise[0], x.action_noise[0])
    seen = observe(params, x.start, x.embed[:1], x.action[:1], x.first[:1] & False, x.noise[:1])
    torch.testing.assert_close(chosen.state.stoch, seen.state.stoch[0], **CLOSE)
    torch.testing.assert_close(
        chosen.action, act(actor, chosen.state.feat, x.action_noise[0]), **CLOSE
    )


@pytest.mark.parametrize("kind", ["late", "block"])
def test_gradients(kind, check_gradients):
    """Of Gaussian latents, whose samples are differentiable; gradcheck in float64."""
    params = model(kind, latent=StdTransform(min=0.1), begin=Begin(Draw(5)(D)))
    half = Z // 2
    inp = params.inp
    if kind == "late":
        inp = inp._replace(weights=(inp.weights[0][:, : half + A],))
    else:
        weights = (inp.stoch.weights[0][:, :half],)
        inp = inp._replace(stoch=inp.stoch._replace(weights=weights))
    params = params._replace(inp=inp)
    draw = Draw(11)
    x = Inputs(params, T=2, B=2)
    start, noise = State(x.start.deter, draw(2, half)), draw(2, 2, half)
    first = torch.tensor([[True, False], [False, True]])
    leaves = [p.clone().requires_grad_() for p in tensors_of(params)]

    def run(*tensors):
        seen = observe(with_tensors(params, iter(tensors)), start, x.embed, x.action, first, noise)
        return *seen.state, *seen.prior

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_the_gradient_of_a_sample_is_that_of_its_probabilities():
    """Straight-through: of the loss Σ c·s the derivative of Σ c·p; Gumbel's, of the soft sample."""
    draw = Draw()
    logits, weight = draw(5, C, K).requires_grad_(), draw(5, Z)
    for unimix in (0.0, 0.01):
        dist = OneHot(logits, unimix)
        got = torch.autograd.grad((weight * dist.sample(draw.uniform(5, C))).sum(), logits)[0]
        want = torch.autograd.grad((weight * dist.probs.flatten(-2)).sum(), logits)[0]
        torch.testing.assert_close(got, want, **CLOSE)
        noise, dist = draw(5, Z), OneHot(logits, unimix, True)
        got = torch.autograd.grad((weight * dist.sample(noise)).sum(), logits)[0]
        soft = (dist.probs.log() + noise.view(5, C, K)).softmax(-1)
        want = torch.autograd.grad((weight * soft.flatten(-2)).sum(), logits)[0]
        torch.testing.assert_close(got, want, **CLOSE)


def test_gumbel_draws_and_ties():
    """Argmax of log p + g, the first of equals; by frequency the classes have probability p."""
    tied = OneHot(torch.zeros(1, 1, K), 0.0, True)
    assert tied.sample(torch.zeros(1, K)).tolist() == [[1, 0, 0, 0]]
    assert tied.sample(torch.tensor([[0.0, 1, 1, 0]])).tolist() == [[0, 1, 0, 0]]
    assert tied.mode().tolist() == [[1, 0, 0, 0]]
    gone = OneHot(torch.tensor([[[-torch.inf, 0.0, -torch.inf, 0.0]]]), 0.0, True)
    assert gone.sample(torch.tensor([[50.0, 0.0, 50.0, 1.0]])).argmax() == 3
    draw = Draw(2)
    logits = draw(C, K)
    dist = OneHot(logits.expand(40000, C, K), 0.1, True)
    seen = dist.sample(-(-draw.uniform(40000, Z).log()).log()).mean(0).view(C, K)
    torch.testing.assert_close(seen, OneHot(logits, 0.1).probs, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", ["late", "block, Gumbel"])
def test_a_nan_stays_in_its_row(name):
    params = model(**MODELS[name], begin=Begin(Draw(5)(D)))
    x = Inputs(params)
    x.first[:] = False
    x.first[3, 2] = True
    x.embed[1, 2] = torch.nan
    seen = observe(params, x.start, x.embed, x.action, x.first, x.noise)
    assert seen.state.stoch[1:3, 2].isnan().all()
    assert not seen.state.stoch[:, :2].isnan().any()
    assert not seen.state.deter[3, 2].isnan().any()  # an episode begins


@pytest.mark.parametrize("kind", ["late", "block"])
def test_norms_are_float32_under_autocast(kind):
    """bfloat16 products and float32 means: no worse than the modules' own autocast."""
    params = model(kind, dtype=torch.float32)
    x = Inputs(params, dtype=torch.float32, T=8, B=8)
    exact = observe(
        with_tensors(params, (p.double() for p in tensors_of(params))),
        State(*(part.double() for part in x.start)), x.embed.double(), x.action.double(),
        x.first, x.noise.double(),
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        seen = observe(params, x.start, x.embed, x.action, x.first, x.noise)
    assert seen.post.logits.dtype == seen.state.deter.dtype == torch.float32
    first = (seen.state.deter[0] - exact.state.deter[0]).norm() / exact.state.deter[0].norm()
    assert first < 0.02
    layer = nn.Sequential(nn.Linear(D, H, bias=False), nn.LayerNorm(H, eps=1e-3), nn.SiLU())
    norm = Norm("layer", layer[1].weight, layer[1].bias, 1e-3)
    ours = MLPParams((layer[0].weight,), (None,), "silu", (norm,))
    feat = torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    want = layer.double()(feat.double())
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        errors = [(f(feat).double() - want).norm() for f in (lambda f: mlp_act(ours, f), layer)]
    assert errors[0] <= 1.2 * errors[1]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_norms_of_a_model_in_bfloat16_give_bfloat16(kind, affine):
    """Computed in float32, so no worse than the module itself."""
    torch.manual_seed(0)
    module = kind(H, eps=1e-3, elementwise_affine=affine)
    for p in module.parameters():
        nn.init.normal_(p)
    module.bfloat16()
    x = (3 * torch.randn(64, H) + 1).bfloat16()
    name = "rms" if kind is nn.RMSNorm else "layer"
    norm = Norm(name, module.weight, getattr(module, "bias", None), 1e-3)
    found = normalise(norm, x), module(x)
    assert found[0].dtype == torch.bfloat16
    want = module.double()(x.double())
    errors = [(y.double() - want).norm() / want.norm() for y in found]
    assert errors[0] <= 1.1 * errors[1] and errors[0] < 0.01


# ---------------------------------------------------------------- policies and heads


def test_bounded_and_clipped_policies():
    draw = Draw()
    feat, noise = draw(5, D + Z), 3 * draw(5, A)
    actor = policy(draw, squash="bound")
    mean, y = mlp(actor.mlp, feat).chunk(2, -1)
    sample = torch.tanh(mean) + (0.9 * torch.sigmoid(y + 2) + 0.1) * noise
    assert (sample.abs() > 1).any() and (sample.abs() < 1).any()
    want = sample / sample.abs().clamp(min=1).detach()
    torch.testing.assert_close(act(actor, feat, noise), want, **CLOSE)
    torch.testing.assert_close(act(actor, feat, None), torch.tanh(mean), **CLOSE)
    torch.testing.assert_close(act(actor._replace(squash="none"), feat, noise), sample, **CLOSE)
    leaf = feat.clone().requires_grad_()
    mean, y = mlp(actor.mlp, leaf).chunk(2, -1)
    sample = torch.tanh(mean) + (0.9 * torch.sigmoid(y + 2) + 0.1) * noise
    for squash, factor in [("bound", 1 / sample.abs().clamp(min=1)), ("clip", 1 + 0 * sample)]:
        got = torch.autograd.grad(act(actor._replace(squash=squash), leaf, noise).sum(), leaf)[0]
        wanted = torch.autograd.grad((factor.detach() * sample).sum(), leaf, retain_graph=True)[0]
        torch.testing.assert_close(got, wanted, **CLOSE)
    clipped = act(actor._replace(squash="clip"), feat, noise)
    torch.testing.assert_close(clipped, sample.detach().clamp(-1 + 1e-6, 1 - 1e-6), **CLOSE)


@pytest.mark.parametrize("actions", [1, 2])
def test_one_hot_policies(actions):
    """Straight-through with the gradient of p, one or several a decision; their mode without."""
    params, draw = model(), Draw(4)
    classes = A // actions
    actor = policy(draw, A, std=Categorical(classes, 0.01))
    x = Inputs(params)
    noise = draw.uniform(4, 3, actions)
    dream = imagine(params, actor, x.start, x.noise, noise)
    assert dream.action.unflatten(-1, (actions, classes)).sum(-1).allclose(torch.ones(()).double())
    logits = mlp(actor.mlp, x.start.feat).unflatten(-1, (actions, classes))
    p = 0.99 * logits.softmax(-1) + 0.01 / classes
    want = OneHot(logits, 0.01).sample(noise[0])
    torch.testing.assert_close(dream.action[0], want, **CLOSE)
    torch.testing.assert_close(actor_dist(actor, x.start.feat).probs, p, **CLOSE)
    chosen = decide(params, actor, x.start, x.action[0], x.embed[0], x.noise[0], None)
    assert (chosen.action.unflatten(-1, (actions, classes)).max(-1).values == 1).all()
    if actions == 1:
        with pytest.raises(ValueError, match=r"action_noise must be \[H=4, B=3, 1\]"):
            imagine(params, actor, x.start, x.noise, x.action_noise)


def test_gumbel_softmax_policies():
    """Of as many numbers as there are actions."""
    params, draw = model(), Draw(4)
    actor = policy(draw, A, std=Categorical(A // 2, 0.01, gumbel=True))
    x, noise = Inputs(params), -(-draw.uniform(4, 3, A).log()).log()
    dream = imagine(params, actor, x.start, x.noise, noise)
    logits = mlp(actor.mlp, x.start.feat).unflatten(-1, (2, A // 2))
    want = OneHot(logits, 0.01, True).sample(noise[0])
    torch.testing.assert_close(dream.action[0], want, **CLOSE)
    with pytest.raises(ValueError, match=rf"action_noise must be \[H=4, B=3, A={A}\]"):
        imagine(params, actor, x.start, x.noise, noise[..., :1])


def test_readouts():
    draw = Draw()
    feat = draw(4, 5)
    for n in (8, 9):
        head, bins = layers(draw, 5, H, n, gain=4), torch.linspace(-4, 4, n, dtype=torch.float64)
        p = mlp(head, feat).softmax(-1)
        inner = (p * bins).sum(-1)
        want = inner.sign() * inner.abs().expm1()
        torch.testing.assert_close(scalar(head, Readout(bins, True), feat), want, **CLOSE)
        outer = bins.sign() * bins.abs().expm1()
        torch.testing.assert_close(scalar(head, Readout(outer), feat), (p * outer).sum(-1), **CLOSE)
    for n in (254, 255):  # equal probabilities of bins up to e^20: exactly 0, whatever the sum
        assert (read_out(two_hot(n), torch.zeros(4, n)) == 0).all()
    pair = layers(draw, 5, H, 2)
    torch.testing.assert_close(scalar(pair, Readout(), feat), mlp(pair, feat)[..., 0], **CLOSE)
    y = mlp(pair, feat)[..., 0]
    squashed = y.sign() * y.abs().expm1()
    torch.testing.assert_close(scalar(pair, Readout(None, True), feat), squashed, **CLOSE)


def test_two_hot_as_torchrl_reads_it():
    torchrl = pytest.importorskip("torchrl.modules", reason="the extra torchrl is not installed")
    theirs, draw = torchrl.SymExpTwoHot(255), Draw(dtype=torch.float32)
    head = layers(draw, 5, H, 255, gain=3)
    feat = draw(16, 5)
    want = theirs.decode(mlp(head, feat).double())
    got = scalar(head, Readout(theirs.bins), feat).double()
    single = theirs.decode(mlp(head, feat)).double()
    assert (got - want).norm() <= 2 * (single - want).norm() + 1e-6 * want.norm()


def test_continuation_by_its_mode():
    params, draw = model(), Draw(6)
    x, returns = Inputs(params), heads(draw)
    dream = imagine(params, policy(draw), x.start, x.noise, x.action_noise, returns=returns)
    hard = imagine(params, policy(draw), x.start, x.noise, x.action_noise,
                   returns=returns._replace(hard_discount=True))  # fmt: skip
    assert set(hard.discount.unique().tolist()) <= {0.0, 0.99}
    assert dream.discount.unique().numel() > 2


# ---------------------------------------------------------------- who refuses


def test_refusals_name_all_that_a_backend_lacks():
    params, draw = model("block", dtype=torch.float32), Draw(1, torch.float32)
    lacks = lacking(params, policy(draw, squash="bound"), heads(draw))
    assert lacks == {}
    params = model(dtype=torch.float32, begin=Begin(torch.zeros(D)),
                   latent=Categorical(K, 0.0, True))  # fmt: skip
    actor = policy(draw, A, std=Categorical(A, gumbel=True))._replace(
        mlp=layers(draw, D + Z, H, A, act="mish", kind=None)
    )
    bins = torch.linspace(-1, 1, 9).requires_grad_()
    returns = heads(draw)._replace(hard_discount=True, reward_as=Readout(None, True),
                                   value_as=Readout(bins))  # fmt: skip
    told = lacking(params, actor, returns)
    assert told == dict.fromkeys(("native", "triton"), "it has no learned bins")


def test_every_op_asks(monkeypatch):
    less = BODIES["native"] - {"block-diagonal GRU"}
    monkeypatch.setitem(BODIES, "native", less)
    draw = Draw(1, torch.float32)
    params, actor, returns = model("block", dtype=torch.float32), policy(draw), heads(draw)
    x = Inputs(params, dtype=torch.float32)
    mean, noises = torch.zeros(4, 3, A), (torch.zeros(1, 4, 3, 7, A), torch.rand(1, 4, 3, 7, C))
    calls = {
        "observe": lambda b: observe(
            params, x.start, x.embed, x.action, x.first, x.noise, backend=b
        ),
        "rssm_step": lambda b: rssm_step(params, x.start, x.action[0], x.noise[0], backend=b),
        "open_loop": lambda b: open_loop(params, x.start, x.action, x.noise, backend=b),
        "imagine": lambda b: imagine(
            params, actor, x.start, x.noise, x.action_noise, returns=returns, backend=b
        ),
        "decide": lambda b: decide(
            params, actor, x.start, x.action[0], x.embed[0], x.noise[0], backend=b
        ),
        "cem": lambda b: cem(
            params, returns, x.start, mean, mean, *noises, num_elites=2, backend=b
        ),
    }
    for name, call in calls.items():
        with pytest.raises(BackendError, match="native.*no block-diagonal GRU"):
            call("native")
        call("auto")
        assert last_backend(name) == "eager"


@pytest.mark.parametrize("name", ["reward_as", "value_as"])
def test_bins_are_where_their_heads_are(name):
    draw = Draw()
    params, actor, returns = model(), policy(draw), heads(draw)
    x, mean = Inputs(params), draw(4, 3, A)
    noises = draw(1, 4, 3, 7, A), draw.uniform(1, 4, 3, 7, C)
    for bins, got in (
        (torch.zeros(9, device="meta"), r"\[9\] float32 on cpu, got \[9\] float32 on meta"),
        (torch.zeros(8), r"\[9\] float32, got \[8\] float32"),
    ):
        wrong = returns._replace(**{name: Readout(bins)})
        with pytest.raises(ValueError, match=rf"imagine: returns.{name}.bins must be {got}"):
            imagine(params, actor, x.start, x.noise, x.action_noise, returns=wrong)
        with pytest.raises(ValueError, match=rf"cem: returns.{name}.bins must be {got}"):
            cem(params, wrong, x.start, mean, mean.abs(), *noises, num_elites=2)


def test_a_plain_model_lacks_nothing():
    """The fast path is as it was: these words alone are asked for."""
    draw = Draw()
    plain = {"kind": None, "bias": True, "act": "elu"}
    gru = GRUParams(draw(3 * D, H), draw(3 * D, D), draw(3 * D), draw(3 * D))
    params = RSSMParams(
        layers(draw, 3 + A, H, act_last=True, **plain), gru, layers(draw, D, H, 6, **plain),
        layers(draw, D + E, H, 6, **plain), StdTransform(),
    )  # fmt: skip
    actor = ActorParams(layers(draw, D + 3, H, 2 * A, **plain), 5.0, StdTransform())
    head = layers(draw, D + 3, H, 1, **plain)
    assert lacking(params, actor, ReturnParams(head, head, None, 0.99, 0.95, head), head) == {}
