"""Categorical latents in every recurrent op, eager: sampler, gradient, and what refuses them."""

import itertools

import pytest
import torch
from torch import nn

from fastdreamer import testing
from fastdreamer.ops.backend import BackendError, last_backend
from fastdreamer.ops.cem import cem
from fastdreamer.ops.decide import decide
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.layers import mlp
from fastdreamer.ops.observe import observe
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.params import Categorical, OneHot, State, latent_dist
from fastdreamer.ops.rssm_step import rssm_step
from fastdreamer.ops.vocabulary import lacking

C, K = 3, 4
SIZES = testing.Sizes(2, 5, C * K, 4, 6, 6, 1, 1, 1, "silu")
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def model(unimix=0.01, dtype=torch.float64):
    """Parameters whose prior and posterior give logits, spread wide enough to matter."""
    params, actor, returns = testing.make_params(SIZES, dtype=dtype)

    def logits(net, factor=8.0):
        weight, bias = net.weights[-1][: C * K], net.biases[-1][: C * K]
        return net._replace(weights=(*net.weights[:-1], factor * weight),
                            biases=(*net.biases[:-1], factor * bias))  # fmt: skip

    params = params._replace(prior=logits(params.prior), post=logits(params.post),
                             latent=Categorical(K, unimix))  # fmt: skip
    return params, actor, returns


class Inputs:
    def __init__(self, seed=0, dtype=torch.float64, T=4, B=3):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda f, *shape: f(shape, generator=generator).to(dtype)  # noqa: E731
        normal = lambda *shape: draw(torch.randn, *shape)  # noqa: E731
        uniform = lambda *shape: draw(torch.rand, *shape)  # noqa: E731
        self.start = State(normal(B, 5).tanh(), onehots(uniform(B, C)))
        self.embed, self.action = normal(T, B, 4), normal(T, B, 2).tanh()
        self.first = uniform(T, B) < 0.2
        self.first[T // 2, 0] = True
        self.noise, self.action_noise = uniform(T, B, C), normal(T, B, 2)


def onehots(uniform):
    """Any one-hot state."""
    return nn.functional.one_hot((uniform * K).long(), K).flatten(-2).to(uniform.dtype)


def by_hand(logits, noise, unimix):
    """The sample, class by class: the first whose cumulative sum exceeds the noise."""
    logits = logits.unflatten(-1, (C, K))
    probs = (1 - unimix) * logits.exp() / logits.exp().sum(-1, keepdim=True) + unimix / K
    out = torch.zeros_like(probs)
    for index in itertools.product(*map(range, noise.shape)):
        total = 0.0
        for k in range(K):
            total += float(probs[index][k])
            if float(noise[index]) < total or k == K - 1:
                out[index][k] = 1
                break
    return (out + probs - probs.detach()).flatten(-2)


@pytest.mark.parametrize("unimix", [0.0, 0.01, 0.5])
def test_observe_equals_its_steps(unimix):
    (params, _, _), x = model(unimix), Inputs()
    seen = observe(params, x.start, x.embed, x.action, x.first, x.noise)
    assert last_backend("observe") == "eager" and seen.post.unimix == unimix
    deter, stoch = x.start
    cell = nn.GRUCell(6, 5).double()
    for name, value in zip(
        ("weight_ih", "weight_hh", "bias_ih", "bias_hh"), params.gru, strict=True
    ):
        setattr(cell, name, nn.Parameter(value))
    for t in range(len(x.noise)):
        keep = (~x.first[t])[:, None].double()
        joined = torch.cat([stoch * keep, x.action[t] * keep], -1)
        deter = cell(nn.functional.silu(mlp(params.inp, joined)), deter * keep)
        post = mlp(params.post, torch.cat([deter, x.embed[t]], -1))
        stoch = by_hand(post, x.noise[t], unimix)
        torch.testing.assert_close(seen.state.deter[t], deter, **CLOSE)
        torch.testing.assert_close(seen.state.stoch[t], stoch, **CLOSE)
        torch.testing.assert_close(seen.post.logits[t].flatten(-2), post, **CLOSE)
        prior = mlp(params.prior, deter)
        torch.testing.assert_close(seen.prior.logits[t].flatten(-2), prior, **CLOSE)
    drawn = seen.state.stoch.detach().unflatten(-1, (C, K))
    assert torch.equal(drawn.sum(-1), torch.ones_like(x.noise)) and set(
        drawn.unique().tolist()
    ) == {0, 1}


def test_all_loops_take_the_same_step():
    """open_loop, imagine and cem's candidates are rssm_step again and again; decide is observe."""
    (params, actor, returns), x = model(), Inputs()
    state, deters, stochs = x.start, [], []
    for t in range(len(x.noise)):
        state, prior = rssm_step(params, state, x.action[t], x.noise[t])
        assert prior.logits.shape == (3, C, K)
        deters.append(state.deter)
        stochs.append(state.stoch)
    rolled = open_loop(params, x.start, x.action, x.noise)
    torch.testing.assert_close(tuple(rolled), (torch.stack(deters), torch.stack(stochs)), **CLOSE)
    dream = imagine(params, actor, x.start, x.noise, x.action_noise, returns=returns)
    again = open_loop(params, x.start, dream.action, x.noise)
    torch.testing.assert_close(dream[:2], tuple(again), **CLOSE)
    assert dream.returns.shape == (4, 3)
    seen = observe(params, x.start, x.embed[:1], x.action[:1], x.first[:1] & False, x.noise[:1])
    chosen = decide(params, actor, x.start, x.action[0], x.embed[0], x.noise[0])
    torch.testing.assert_close(chosen.state.stoch, seen.state.stoch[0].detach(), **CLOSE)
    noises = torch.zeros(1, 4, 3, 7, 2).double(), torch.rand(1, 4, 3, 7, C).double()
    mean = torch.zeros(4, 3, 2).double()
    plan = cem(params, returns, x.start, mean, mean, *noises, num_elites=2)
    rows = State(*(part.repeat_interleave(7, 0) for part in x.start))
    end = open_loop(params, rows, mean.repeat_interleave(7, 1), noises[1][0].flatten(1, 2))
    reward = mlp(returns.reward, end.feat).sum(0).view(3, 7)
    by_reward = cem(params, returns, x.start, mean, mean, *noises, num_elites=2, score="reward")
    torch.testing.assert_close(by_reward.scores[0], reward, **CLOSE)
    assert plan.scores.isfinite().all()


def test_the_gradient_is_that_of_the_probabilities():
    """Straight-through: of one-hot vectors that do not move, as if they were p."""
    logits = torch.randn(5, C, K, dtype=torch.float64, requires_grad=True)
    weight, noise = torch.randn(5, C * K).double(), torch.rand(5, C).double()
    for unimix in (0.0, 0.01):
        dist = OneHot(logits, unimix)
        got = torch.autograd.grad((weight * dist.sample(noise)).sum(), logits)[0]
        want = torch.autograd.grad((weight * dist.probs.flatten(-2)).sum(), logits)[0]
        torch.testing.assert_close(got, want, **CLOSE)
        assert torch.autograd.gradcheck(lambda x, u=unimix: OneHot(x, u).probs, logits)


def test_gradients_of_a_filter_by_finite_differences():
    """Through what the sample does not decide: with a class drawn far from its borders.

    The loss as a function of one weight, of the surrogate hard + p(w) − p(w₀).
    """
    (params, _, _), x = model(), Inputs(T=2, B=2)
    weight = params.post.weights[-1].clone().requires_grad_()
    params = params._replace(post=params.post._replace(weights=(*params.post.weights[:-1], weight)))
    run = lambda: observe(params, x.start, x.embed, x.action, x.first, x.noise)  # noqa: E731
    loss = (torch.arange(C * K) * run().state.stoch[0]).sum()
    got = torch.autograd.grad(loss, weight)[0]
    probs = lambda: (torch.arange(C * K) * run().post.probs[0].flatten(-2)).sum()  # noqa: E731
    step, want = 1e-6, torch.zeros_like(weight)
    with torch.no_grad():
        for i, j in itertools.product(*map(range, weight.shape)):
            for sign in (1, -1):
                weight[i, j] += sign * step
                want[i, j] += sign * probs() / (2 * step)
                weight[i, j] -= sign * step
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_borders_of_classes():
    """Class k owns [Σ_{j<k} p, Σ_{j≤k} p): of equal probabilities, of none, and at the end."""
    equal = OneHot(torch.zeros(5, 1, K))
    noise = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.9999999]).view(5, 1)
    assert equal.sample(noise).argmax(-1).tolist() == [0, 1, 2, 3, 3]
    none = OneHot(torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0]).expand(3, 1, K))
    assert none.sample(torch.tensor([[0.0], [0.5], [0.9999]])).argmax(-1).tolist() == [1, 3, 3]
    one = OneHot(torch.tensor([[[0.0, -200.0, -200.0, -200.0]]]), unimix=0.4)
    torch.testing.assert_close(one.probs, torch.tensor([[[0.7, 0.1, 0.1, 0.1]]]))
    assert one.sample(torch.tensor([[0.85]])).argmax() == 2
    assert OneHot(torch.zeros(1, 1, 1)).sample(torch.tensor([[0.7]])).tolist() == [[1.0]]


def test_frequencies_are_the_probabilities():
    dist = OneHot(torch.randn(C, K, generator=torch.Generator().manual_seed(1)), 0.1)
    noise = torch.rand(20000, C, generator=torch.Generator().manual_seed(2))
    seen = OneHot(dist.logits.expand(20000, C, K), 0.1).sample(noise).mean(0).view(C, K)
    torch.testing.assert_close(seen, dist.probs, rtol=0, atol=0.02)


def test_a_nan_stays_in_its_row():
    (params, _, _), x = model(), Inputs()
    clean = observe(params, x.start, x.embed, x.action, x.first, x.noise)
    x.embed[1, 2] = torch.nan
    seen = observe(params, x.start, x.embed, x.action, x.first & False, x.noise)
    assert seen.state.stoch[1:, 2].isnan().all() and not seen.state.stoch[:, :2].isnan().any()
    assert torch.equal(seen.state.stoch[0], clean.state.stoch[0]) or x.first[0].any()


def test_logits_are_float32_under_autocast():
    (params, _, _), x = model(dtype=torch.float32), Inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        seen = observe(params, x.start, x.embed, x.action, x.first, x.noise)
    assert seen.post.logits.dtype == seen.state.stoch.dtype == torch.float32
    assert latent_dist(
        torch.ones(2, C * K).bfloat16(), params.latent, torch.float32
    ).probs.dtype == (torch.float32)


def test_compiled_bodies_have_them():
    (params, actor, returns), x = model(dtype=torch.float32), Inputs(dtype=torch.float32)
    mean, noises = torch.zeros(4, 3, 2), (torch.zeros(1, 4, 3, 7, 2), torch.rand(1, 4, 3, 7, C))
    calls = [
        lambda b: observe(params, x.start, x.embed, x.action, x.first, x.noise, backend=b),
        lambda b: rssm_step(params, x.start, x.action[0], x.noise[0], backend=b),
        lambda b: open_loop(params, x.start, x.action, x.noise, backend=b),
        lambda b: imagine(params, actor, x.start, x.noise, x.action_noise, backend=b),
        lambda b: decide(params, actor, x.start, x.action[0], x.embed[0], x.noise[0], backend=b),
        lambda b: cem(params, returns, x.start, mean, mean, *noises, num_elites=2, backend=b),
        lambda b: cem(params, returns, x.start, mean, mean, *noises, num_elites=2, backend=b,
                      score=lambda feat: feat.sum((0, 2))),
    ]  # fmt: skip
    assert lacking(params) == {}
    gumbel = params._replace(latent=params.latent._replace(gumbel=True))
    assert lacking(gumbel) == {}
    for call in calls:
        with pytest.raises(BackendError, match="tensor is on cpu, triton needs a CUDA device"):
            call("triton")
        call("native")
        call("auto")


def test_bad_input():
    (params, _, _), x = model(), Inputs()
    given = (params, x.start, x.embed, x.action, x.first)
    with pytest.raises(
        ValueError, match=r"noise must be \[T=4, B=3, C=3\] float64, got \[4, 3, 12\]"
    ):
        observe(*given, torch.rand(4, 3, C * K).double())
    odd = params._replace(latent=Categorical(5))
    with pytest.raises(ValueError, match="12 logits make no categoricals of 5 classes"):
        observe(odd, *given[1:], x.noise)
