"""Golden values: every loss, and one whole update, recomputed in numpy float64.

The second half of this file is an implementation of its own: it shares no code with the package
but the initial weights and the order in which an update draws its noise. Gradients are checked by
central differences of the numpy losses along the gradient that the update reports.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from fastdreamer.config import BehaviorConfig, LossConfig, preset
from fastdreamer.learning import losses
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.ops.lambda_return import lambda_return
from fastdreamer.ops.params import Normal, OneHot, Readout, two_hot

rng = np.random.default_rng


def tensor(x, grad=False):
    return torch.tensor(x, dtype=torch.float64, requires_grad=grad)


def kl_numpy(p, q):
    """KL between diagonal Normals (mean, std), summed over the last axis."""
    (m, s), (n, t) = p, q
    return (np.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5).sum(-1)


# ---------------------------------------------------------------- one loss at a time


def test_reward_loss():
    plain = Readout()
    outputs, target = tensor([[[1.0], [2.0]]]), tensor([[0.0, 5.0]])
    assert losses.reward_loss(outputs, plain, target).item() == 5.0
    x, y = rng(0).normal(size=(2, 4, 3))
    assert losses.reward_loss(tensor(x[..., None]), plain, tensor(y)).item() == pytest.approx(
        ((x - y) ** 2).sum() / 12, rel=1e-13
    )


def distributions(seed=0, spread=1.0):
    r = rng(seed)
    post = (spread * r.normal(size=(3, 2, 4)), r.uniform(0.2, 2, size=(3, 2, 4)))
    prior = (spread * r.normal(size=(3, 2, 4)), r.uniform(0.2, 2, size=(3, 2, 4)))
    return post, prior


def kl_and_gradients(free_nats, balance, spread=1.0, each=False):
    """Loss, nats and the gradients of the four parameters, from torch."""
    post, prior = distributions(spread=spread)
    p, q = (Normal(tensor(m, True), tensor(s, True)) for m, s in (post, prior))
    loss, nats = losses.kl_loss(p, q, free_nats=free_nats, balance=balance, each=each)
    assert not nats.requires_grad
    grads = torch.autograd.grad(loss, [*p, *q], allow_unused=True)
    return loss.item(), nats.item(), [0.0 if g is None else g.numpy() for g in grads]


def kl_gradients_numpy():
    """d mean KL(post ‖ prior) by post mean, post std, prior mean, prior std."""
    (m, s), (n, t) = distributions()
    d = m - n
    return [x / 6 for x in (d / t**2, s / t**2 - 1 / s, -d / t**2, 1 / t - (s**2 + d**2) / t**3)]


def test_kl_by_hand():
    """One number: KL(N(1, 0.5) ‖ N(0, 2)) = ln 4 + (0.25 + 1) / 8 − ½."""
    p, q = (Normal(tensor([[[m]]]), tensor([[[s]]])) for m, s in ((1.0, 0.5), (0.0, 2.0)))
    want = math.log(4) + 1.25 / 8 - 0.5
    for balance in (None, 0.8):
        loss, nats = losses.kl_loss(p, q, free_nats=0.0, balance=balance)
        assert loss.item() == nats.item() == pytest.approx(want, rel=1e-14)


def test_kl_above_the_free_nats_is_the_mean_kl():
    want = kl_numpy(*distributions()).mean()
    assert want > 3  # the report's free nats
    loss, nats, grads = kl_and_gradients(3.0, None)
    assert loss == nats == pytest.approx(want, rel=1e-13)
    for got, exact in zip(grads, kl_gradients_numpy(), strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-11, atol=1e-13)


def test_kl_below_the_free_nats_is_their_number_and_pushes_nothing():
    want = kl_numpy(*distributions()).mean()
    for balance in (None, 0.8):
        loss, nats, grads = kl_and_gradients(want + 0.01, balance)
        assert loss == pytest.approx(want + 0.01, rel=1e-14)
        assert nats == pytest.approx(want, rel=1e-13)  # reported as it is
        assert all(np.abs(g).max() == 0 for g in grads)


def test_free_nats_apply_to_the_mean_and_not_to_each_step():
    """Half of the steps below the threshold, the mean above it: all of them are pushed."""
    steps = kl_numpy(*distributions())
    free = (steps.min() + steps.mean()) / 2
    assert (steps < free).any() and steps.mean() > free
    loss, _, grads = kl_and_gradients(free, None)
    assert loss == pytest.approx(steps.mean(), rel=1e-13)
    assert all((np.abs(g) > 0).all() for g in grads)


def test_free_nats_of_each_step():
    """The steps below the threshold count as much as it and push nothing, the others as ever."""
    steps = kl_numpy(*distributions())
    free = (steps.min() + steps.mean()) / 2
    pushed = (steps > free)[..., None]
    assert pushed.any() and not pushed.all()
    want = np.maximum(steps, free).mean()
    for balance in (None, 0.8):
        loss, nats, grads = kl_and_gradients(free, balance, each=True)
        assert loss == pytest.approx(want, rel=1e-13) and loss > steps.mean()
        assert nats == pytest.approx(steps.mean(), rel=1e-13)
        shares = (1, 1, 1, 1) if balance is None else (0.2, 0.2, 0.8, 0.8)
        for got, exact, share in zip(grads, kl_gradients_numpy(), shares, strict=True):
            np.testing.assert_allclose(got, share * pushed * exact, rtol=1e-11, atol=1e-13)


def mixed(logits, unimix):
    """Probabilities of logits [..., K] with a part of the uniform distribution, in numpy."""
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return (1 - unimix) * raised / raised.sum(-1, keepdims=True) + unimix / logits.shape[-1]


@pytest.mark.parametrize("unimix", [0.0, 0.01])
@pytest.mark.parametrize("balance", [None, 0.8])
def test_kl_of_categoricals(unimix, balance):
    """Summed over categoricals, unimix on both sides; its gradient by central differences."""
    post, prior = (2 * rng(seed).normal(size=(3, 2, 4, 5)) for seed in (0, 1))

    def numpy_kl(post, prior):
        p, q = (mixed(x, unimix) for x in (post, prior))
        return (p * np.log(p / q)).sum((-2, -1)).mean()

    given = [tensor(x, True) for x in (post, prior)]
    loss, nats = losses.kl_loss(*(OneHot(x, unimix) for x in given), free_nats=0.0, balance=balance)
    assert loss.item() == pytest.approx(numpy_kl(post, prior), rel=1e-12) and loss == nats
    shares = (1, 1) if balance is None else (1 - balance, balance)
    gradients = torch.autograd.grad(loss, given)
    for at, (got, share) in enumerate(zip(gradients, shares, strict=True)):
        way = rng(7).normal(size=post.shape)
        ends = [[post, prior] for _ in (0, 1)]
        for sign, end in zip((1, -1), ends, strict=True):
            end[at] = end[at] + sign * 1e-5 * way
        slope = (numpy_kl(*ends[0]) - numpy_kl(*ends[1])) / 2e-5
        assert (got.numpy() * way).sum() == pytest.approx(share * slope, rel=1e-7)


BINS = np.array([-9.0, -2.0, 0.0, 2.0, 9.0])


@pytest.mark.parametrize(
    ("target", "weights"),
    [
        (0.0, [0, 0, 1, 0, 0]),
        (-2.0, [0, 1, 0, 0, 0]),
        (0.5, [0, 0, 0.75, 0.25, 0]),
        (-5.5, [0.5, 0.5, 0, 0, 0]),
        (9.0, [0, 0, 0, 0, 1]),
        (50.0, [0, 0, 0, 0, 1]),  # beyond the bins: the last one
        (-50.0, [1, 0, 0, 0, 0]),
    ],
)
def test_two_hot_cross_entropy(target, weights):
    """−Σ w·log softmax, and its gradient softmax − w."""
    logits = rng(0).normal(size=5)
    outputs = tensor(logits, True)
    loss = losses.head_error(outputs, Readout(tensor(BINS)), tensor(target))
    p = mixed(logits, 0.0)
    assert loss.item() == pytest.approx(-(weights * np.log(p)).sum(), rel=1e-13)
    loss.backward()
    np.testing.assert_allclose(outputs.grad.numpy(), p - weights, rtol=1e-12, atol=1e-14)


def test_two_hot_weights_have_the_target_as_their_mean():
    """What the gradient pulls towards, softmax − gradient, for the bins of a head."""
    bins = two_hot(255, torch.empty((), dtype=torch.float64)).bins
    targets = tensor([[-3.7, 0.0, 1e-3], [0.9, 150.0, -4e4]])
    outputs = torch.randn(2, 3, 255, generator=torch.Generator().manual_seed(0)).double()
    loss = losses.head_error(outputs.requires_grad_(), Readout(bins), targets)
    assert loss.shape == targets.shape
    (gradient,) = torch.autograd.grad(loss.sum(), outputs)
    weights = (outputs.softmax(-1) - gradient).detach()
    assert ((weights > 1e-12).sum(-1) <= 2).all() and (weights > -1e-12).all()
    near = weights.masked_fill(weights < 1e-12, 0) * bins
    np.testing.assert_allclose(near.sum(-1).numpy(), targets.numpy(), rtol=1e-9, atol=1e-12)
    nothing = torch.full_like(targets, torch.nan)
    assert losses.head_error(outputs, Readout(bins), nothing).isnan().all()


@pytest.mark.parametrize("target", [0.0, 3.0, -0.2])
def test_symlog_heads(target):
    """The squared distance of the output to sign(x)·log(1 + |x|)."""
    outputs = tensor([0.7], True)
    loss = losses.head_error(outputs, Readout(squashed=True), tensor(target))
    apart = 0.7 - math.copysign(math.log1p(abs(target)), target)
    assert loss.item() == pytest.approx(apart**2, rel=1e-13)
    loss.backward()
    assert outputs.grad.item() == pytest.approx(2 * apart, rel=1e-13)


@pytest.mark.parametrize("balance", [0.0, 0.5, 0.8, 1.0])
def test_balancing_shares_out_the_gradient_and_keeps_the_value(balance):
    """The prior gets α of its gradient, the posterior 1 − α of its own (DreamerV2, alg. 2)."""
    want = kl_numpy(*distributions()).mean()
    loss, nats, grads = kl_and_gradients(1.0, balance)
    assert loss == pytest.approx(want, rel=1e-13) and nats == pytest.approx(want, rel=1e-13)
    shares = (1 - balance, 1 - balance, balance, balance)
    for got, exact, share in zip(grads, kl_gradients_numpy(), shares, strict=True):
        np.testing.assert_allclose(got, share * exact, rtol=1e-11, atol=1e-13)


def test_model_loss_weighs_the_parts_that_are_there():
    config = LossConfig(image_scale=0.5, state_scale=3.0, reward_scale=7.0, kl_scale=0.25)
    parts = {"image": tensor(2.0), "state": tensor(5.0), "reward": tensor(11.0), "kl": tensor(4.0)}
    assert losses.model_loss(config, parts).item() == 0.5 * 2 + 3 * 5 + 7 * 11 + 0.25 * 4
    del parts["state"]
    assert losses.model_loss(config, parts).item() == 0.5 * 2 + 7 * 11 + 0.25 * 4


def test_actor_loss():
    returns = tensor([[1.0, 3.0], [5.0, 7.0]], grad=True)
    ones = torch.ones(2, 1, dtype=torch.float64)
    assert losses.actor_loss(returns, ones).item() == -4.0
    weights = tensor([[1.0], [0.5]])
    loss = losses.actor_loss(returns, weights, scale=4.0)
    assert loss.item() == -(1 + 3 + 2.5 + 3.5) / 4 / 4
    loss.backward()  # upwards: −weight / (scale · count)
    assert returns.grad.tolist() == [[-1 / 16, -1 / 16], [-1 / 32, -1 / 32]]
    bonus = tensor([[0.5, 1.0], [-1.0, 3.0]], grad=True)  # not divided by the scale
    more = losses.actor_loss(returns, weights, 4.0, bonus)
    assert (more - loss).item() == -(0.5 + 1 - 0.5 + 1.5) / 4
    more.backward()
    assert bonus.grad.tolist() == [[-1 / 4, -1 / 4], [-1 / 8, -1 / 8]]


def test_critic_loss():
    value, returns = tensor([[1.0, 2.0], [3.0, 4.0]], True), tensor([[0.0, 4.0], [3.0, 5.0]], True)
    weights = tensor([[1.0], [0.5]])
    loss = losses.critic_loss(value.unsqueeze(-1), Readout(), returns, weights)
    assert loss.item() == (1 + 4 + 0.5 * 0 + 0.5 * 1) / 4
    loss.backward()
    assert value.grad.tolist() == [[0.5, -1.0], [0.0, -0.25]]
    assert returns.grad is None  # the targets are constants


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("horizon", [1, 2, 6])
def test_the_lambda_return_is_the_mixture_of_n_step_returns(horizon, lam):
    """Sutton and Barto, equation 12.3, from the definition; trap 5 would shift the bootstrap."""
    r = rng(horizon)
    reward, value = r.normal(size=(2, horizon, 3))
    discount = r.uniform(0.5, 1, size=(horizon, 3))

    def n_step(t, n):
        total, factor = np.zeros(3), np.ones(3)
        for k in range(t, t + n):
            total += factor * reward[k]
            factor = factor * discount[k]
        return total + factor * value[t + n - 1]  # value[k] is that of state k + 1

    want = np.zeros((horizon, 3))
    for t in range(horizon):
        longest = horizon - t
        for n in range(1, longest):
            want[t] += (1 - lam) * lam ** (n - 1) * n_step(t, n)
        want[t] += lam ** (longest - 1) * n_step(t, longest)
    got = lambda_return(tensor(reward), tensor(value), tensor(discount), lam)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------- a whole update, in numpy


def elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def softplus(x):
    return np.logaddexp(0, x)


def dense(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def mlp(w, name, x):
    for i in itertools.count():
        x = dense(w, f"{name}.layers.{i}", x)
        if f"{name}.layers.{i + 1}.weight" not in w:
            return x
        x = elu(x)


def conv(w, name, x):
    weight = w[f"{name}.weight"]  # [out, in, k, k]
    k = weight.shape[-1]
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (1, 2))[:, ::2, ::2]
    return np.tensordot(windows, weight, ((3, 4, 5), (1, 2, 3))) + w[f"{name}.bias"]


def deconv(w, name, x):
    weight = w[f"{name}.weight"]  # [in, out, k, k]
    k, (n, h, wide, _) = weight.shape[-1], x.shape
    paint = np.tensordot(x, weight, (3, 0))  # [n, h, wide, out, k, k]
    out = np.zeros((n, 2 * h - 2 + k, 2 * wide - 2 + k, weight.shape[1]))
    for i, j in np.ndindex(k, k):
        out[:, i : i + 2 * h - 1 : 2, j : j + 2 * wide - 1 : 2] += paint[..., i, j]
    return out + w[f"{name}.bias"]


def dynamics(w, deter, stoch, action):
    """The next deterministic state; the gates stand in the order reset, update, new."""
    x = elu(dense(w, "model.rssm.inp.layers.0", np.concatenate([stoch, action], -1)))
    i = x @ w["model.rssm.gru.weight_ih"].T + w["model.rssm.gru.bias_ih"]
    h = deter @ w["model.rssm.gru.weight_hh"].T + w["model.rssm.gru.bias_hh"]
    (ir, iz, ic), (hr, hz, hc) = np.split(i, 3, -1), np.split(h, 3, -1)
    reset, update = sigmoid(ir + hr), sigmoid(iz + hz)
    return (1 - update) * np.tanh(ic + reset * hc) + update * deter


def latent(w, name, x):
    mean, std = np.split(mlp(w, f"model.rssm.{name}", x), 2, -1)
    return mean, softplus(std) + 0.1


def symlog(x):
    return np.sign(x) * np.log1p(np.abs(x))


def model_losses(w, config, batch, noise, frozen=None):
    """The parts of the world model's loss, the sum, and (deter, stoch, post, prior) [T, B, ...].

    ``frozen``: (post, prior) that take no part in a derivative, for a balanced KL.
    """
    T, B = batch["reward"].shape
    x = batch["pixels"].reshape(T * B, 64, 64, 3) / 255.0 - 0.5
    for i in range(4):
        x = np.maximum(conv(w, f"model.encoder.convs.{i}", x), 0)
    x = dense(w, "model.encoder.linear", x.transpose(0, 3, 1, 2).reshape(T * B, -1))
    embed = np.concatenate(
        [x.reshape(T, B, -1), elu(mlp(w, "model.encoder.state", symlog(batch["state"])))], -1
    )
    deter, stoch, steps = np.zeros((B, 16)), np.zeros((B, 4)), []
    for t in range(T):
        keep = ~batch["is_first"][t][:, None]
        deter = dynamics(w, deter * keep, stoch * keep, batch["action"][t] * keep)
        post = latent(w, "post", np.concatenate([deter, embed[t]], -1))
        stoch = post[0] + post[1] * noise[t]
        steps.append((deter, stoch, *post, *latent(w, "prior", deter)))
    deter, stoch, *both = (np.stack(parts) for parts in zip(*steps, strict=True))
    post, prior = both[:2], both[2:]
    feat = np.concatenate([deter, stoch], -1)

    x = dense(w, "model.decoder.linear", feat.reshape(T * B, -1))
    x = (np.maximum(x, 0) if config.model.decoder_linear_relu else x)[:, None, None]
    for i in range(4):
        x = deconv(w, f"model.decoder.convs.{i}", x)
        x = np.maximum(x, 0) if i < 3 else x
    image = (x.reshape(T, B, 64, 64, 3) - (batch["pixels"] / 255.0 - 0.5)) ** 2
    state = (mlp(w, "model.decoder.state", feat) - symlog(batch["state"])) ** 2
    reward = (mlp(w, "model.reward", feat)[..., 0] - batch["reward"]) ** 2
    nats = kl_numpy(post, prior).mean()
    free, balance = config.loss.free_nats, config.loss.kl_balance
    if balance is None:
        kl = max(nats, free)
    else:
        old_post, old_prior = frozen or (post, prior)
        kl = balance * max(kl_numpy(old_post, prior).mean(), free)
        kl += (1 - balance) * max(kl_numpy(post, old_prior).mean(), free)
    parts = {
        "image_loss": image.sum((2, 3, 4)).mean(),
        "state_loss": state.sum(-1).mean(),
        "reward_loss": reward.mean(),
        "kl_loss": kl,
    }
    scales = (config.loss.image_scale, config.loss.state_scale, config.loss.reward_scale)
    total = sum(s * x for s, x in zip((*scales, config.loss.kl_scale), parts.values(), strict=True))
    return parts | {"kl": nats, "model_loss": total}, (deter, stoch, post, prior)


def behaviour_losses(w, config, start, state_noise, action_noise, return_range, frozen=None):
    """The actor's and critic's losses and diagnostics, and what they hold constant.

    ``frozen``: (features that the actor saw, scale, targets), which take no part in a derivative.
    """
    b, (deter, stoch) = config.behavior, start
    feats, seen, entropy = [np.concatenate(start, -1)], [], []
    for t in range(b.imag_horizon):
        seen.append(feats[-1] if frozen is None else frozen[0][t])
        x, y = np.split(mlp(w, "actor.mlp", seen[-1]), 2, -1)
        std = softplus(y + b.std_offset) + b.min_std
        raw = b.mean_scale * np.tanh(x / b.mean_scale) + std * action_noise[t]
        action = np.tanh(raw)
        # of the Normal, and the mean log-determinant of its tanh
        log_slope = 2 * (math.log(2) - raw - softplus(-2 * raw))
        entropy.append((np.log(std * math.sqrt(2 * math.pi * math.e)) + log_slope).sum(-1))
        deter = dynamics(w, deter, stoch, action)
        mean, std = latent(w, "prior", deter)
        stoch = mean + std * state_noise[t]
        feats.append(np.concatenate([deter, stoch], -1))
    feat = np.stack(feats)  # states 0 .. H
    reward = mlp(w, "model.reward", feat[1:])[..., 0]
    critic = "target_critic" if b.target_every else "critic"
    next_value = mlp(w, critic, feat[1:])[..., 0]
    following, returns = next_value[-1], []
    for t in reversed(range(b.imag_horizon)):
        following = reward[t] + b.gamma * ((1 - b.lam) * next_value[t] + b.lam * following)
        returns.insert(0, following)
    returns = np.stack(returns)
    weights = b.gamma ** np.arange(b.imag_horizon)[:, None] if b.discount_weights else 1.0
    scale, targets = 1.0, returns
    if b.return_norm:
        low, high = np.quantile(returns, [0.05, 0.95])
        return_range = 0.99 * return_range + 0.01 * (high - low)
        scale = max(1.0, return_range)
    if frozen is not None:
        _, scale, targets = frozen
    value = mlp(w, "critic", feat[:-1])[..., 0]
    got = {
        "actor_loss": -(weights * (returns / scale + b.entropy * np.stack(entropy))).mean(),
        "critic_loss": b.value_scale * (weights * (value - targets) ** 2).mean(),
        "imagined_reward": reward.mean(),
        "imagined_value": value.mean(),
    }
    return got, (seen, scale, targets), return_range


def styles():
    """The report's losses and the original's, each once with a policy too broad to steer (the
    tanh saturates) and once with a narrow one, and with the KL on both sides of the free nats."""
    tiny = preset("tiny")
    report = dataclasses.replace(tiny, loss=LossConfig(free_nats=3.0))
    walker = dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, decoder_linear_relu=False),
        loss=LossConfig(0.5, 0.5, 0.5, free_nats=0.05, kl_balance=0.8),
        behavior=BehaviorConfig(
            imag_horizon=5, actor_layers=2, critic_layers=2, mean_scale=5.0, value_scale=0.5,
            std_offset=math.log(math.expm1(5.0)), min_std=1e-4, discount_weights=True,
            target_every=100, return_norm=True,
        ),
    )  # fmt: skip
    return {
        "report": report,
        "report, narrow, kl above": dataclasses.replace(
            report,
            loss=LossConfig(free_nats=0.05, kl_scale=2.0),
            behavior=dataclasses.replace(report.behavior, std_offset=0.0),
        ),
        "walker, kl above": walker,
        "walker, narrow": dataclasses.replace(
            walker,
            loss=dataclasses.replace(walker.loss, free_nats=3.0),
            behavior=dataclasses.replace(walker.behavior, std_offset=0.0, return_norm=False),
        ),
        "walker, an uncertain actor": dataclasses.replace(
            walker,
            loss=dataclasses.replace(walker.loss, free_nats=3.0),
            behavior=dataclasses.replace(walker.behavior, std_offset=0.0, entropy=0.3),
        ),
    }


T, B, A, STATE = 6, 2, 2, 5


def make_batch():
    r = rng(0)
    batch = {
        "pixels": r.integers(0, 256, (T, B, 64, 64, 3), dtype=np.uint8),
        "state": 3 * r.normal(size=(T, B, STATE)).astype(np.float32),
        "action": r.uniform(-1, 1, (T, B, A)).astype(np.float32),
        "reward": r.uniform(0, 2, (T, B)).astype(np.float32),
        "is_first": np.zeros((T, B), bool),
    }
    batch["is_first"][0, 0] = batch["is_first"][3, 1] = batch["is_first"][T - 1, 0] = True
    return batch


def weights_of(agent):
    return {name: x.detach().double().numpy().copy() for name, x in agent.state_dict().items()}


def slope(loss, weights, gradient, eps=1e-5):
    """Central difference of a loss along the unit vector of a gradient (a dict of arrays)."""
    norm = norm_of(gradient.values())
    moved = [
        loss(weights | {name: weights[name] + s * eps * g / norm for name, g in gradient.items()})
        for s in (1, -1)
    ]
    return (moved[0] - moved[1]) / (2 * eps)


def norm_of(arrays):
    return math.sqrt(sum((x**2).sum() for x in arrays))


# Parts of the networks whose gradients are checked one by one.
PARTS = {
    "model": ["encoder.convs", "encoder.linear", "encoder.state", "rssm.inp", "rssm.gru",
              "rssm.prior", "rssm.post", "decoder.linear", "decoder.convs", "decoder.state",
              "reward"],
    "actor": ["mlp.layers.0", "mlp.layers.1", "mlp.layers.2"],
    "critic": ["layers.0", "layers.1", "layers.2"],
}  # fmt: skip


@pytest.mark.parametrize("style", styles())
def test_one_update_is_what_numpy_says(style):
    config = styles()[style]
    agent = Dreamer(config, {"pixels": (64, 64, 3), "state": (STATE,)}, A)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # other than at the start of training: no two networks are alike
        for name, x in agent.named_parameters():
            x.add_(0.1 * torch.randn(x.shape, generator=generator))
            if name.startswith(("critic.layers.2", "model.reward.layers.2")):
                x.mul_(5)
        agent.return_range.fill_(3.0)
    lr = {"model": 2**-12, "actor": 2**-2, "critic": 2**-12}
    optimizers = {n: torch.optim.SGD(getattr(agent, n).parameters(), lr=lr[n]) for n in lr}
    gradients = {}
    for name, x in agent.named_parameters():
        if x.requires_grad:
            x.register_post_accumulate_grad_hook(
                lambda x, name=name: gradients.update({name: x.grad.double().numpy()})
            )
    batch, before = make_batch(), weights_of(agent)
    got = agent.update(
        {name: torch.from_numpy(x) for name, x in batch.items()},
        optimizers,
        torch.Generator().manual_seed(2),
    )
    after = weights_of(agent)

    H = config.behavior.imag_horizon
    draw = torch.Generator().manual_seed(2)
    shapes = ((T, B, 4), (H, T * B, 4), (H, T * B, A))
    noises = [torch.randn(*shape, generator=draw).double().numpy() for shape in shapes]
    batch["state"] = batch["state"].astype(np.float64)
    want, (deter, stoch, *constant) = model_losses(before, config, batch, noises[0])
    # the behaviour is learned with the model as it stands after its step, from the states before
    stepped = before | {name: x for name, x in after.items() if name.startswith("model.")}
    start = [x.reshape(T * B, -1) for x in (deter, stoch)]
    behaviour = (config, start, *noises[1:], before["return_range"])
    imagined, held, return_range = behaviour_losses(stepped, *behaviour)
    want |= imagined
    norms = {f"{name}_grad_norm" for name in lr}
    assert got.keys() == want.keys() | norms
    for name, x in want.items():
        assert got[name] == pytest.approx(x, rel=2e-5, abs=2e-6), name
    assert agent.return_range.item() == pytest.approx(float(return_range), rel=1e-5)

    above = "above" in style
    assert (want["kl"] > config.loss.free_nats) == above

    numpy_losses = {
        "model": lambda w: model_losses(w, config, batch, noises[0], constant)[0]["model_loss"],
        "actor": lambda w: behaviour_losses(w, *behaviour, held)[0]["actor_loss"],
        "critic": lambda w: behaviour_losses(w, *behaviour, held)[0]["critic_loss"],
    }
    for name, loss in numpy_losses.items():
        own = {key: g for key, g in gradients.items() if key.startswith(f"{name}.")}
        norm = norm_of(own.values())
        assert got[f"{name}_grad_norm"] == pytest.approx(norm, rel=1e-5)
        # SGD moved every weight by −lr · clip · g
        clip = min(1.0, config.optim.clip / norm)
        moved = norm_of(before[key] - after[key] for key in own)
        assert moved == pytest.approx(lr[name] * clip * norm, rel=5e-3)
        # The slope of the numpy loss along a part of g is its norm only if all of it is right.
        base, checked = before if name == "model" else stepped, set()
        for part in PARTS[name]:
            some = {k: g for k, g in own.items() if k.startswith(f"{name}.{part}.")}
            checked |= some.keys()
            size = norm_of(some.values())
            if part == "rssm.prior" and not above:  # the KL alone pushes the prior
                assert size == 0
            else:
                assert slope(loss, base, some) == pytest.approx(size, rel=2e-4), part
        assert checked == own.keys()
    untouched = [k for k in before if k.startswith("target_critic.")]
    assert bool(untouched) == bool(config.behavior.target_every)
    assert all((before[k] == after[k]).all() for k in untouched)
