"""An agent of DreamerV3's parts: categorical latents, normed layers and cell, two-hot heads."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from fastdreamer.acting.shield import filter_actions
from fastdreamer.config import (
    ConfigError,
    ExploreConfig,
    SafetyConfig,
    architecture,
    differences,
    from_dict,
    preset,
    to_dict,
)
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.ops.backend import last_backend, use_backend
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.params import State

T, B, A, STATE, C, K = 6, 3, 2, 24, 3, 4
TINY = preset("tiny")
V3 = preset("walker-v3")
MODEL = {
    name: getattr(V3.model, name)
    for name in ("unimix", "cell", "activation", "norm", "readout", "bins")
}


def configure(model=(), behavior=(), **changes):
    return dataclasses.replace(
        TINY,
        model=dataclasses.replace(TINY.model, stoch=C, classes=K, **MODEL | dict(model)),
        loss=V3.loss,
        behavior=dataclasses.replace(
            TINY.behavior, target_every=2, return_norm=True, entropy=0.1, **dict(behavior)
        ),
        **changes,
    )


def make_agent(kinds=("state",), **changes):
    shapes = {"pixels": (64, 64, 3), "state": (STATE,)}
    return Dreamer(configure(**changes), {kind: shapes[kind] for kind in kinds}, A)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_batch(pixels=False):
    g = seeded()
    batch = {
        "state": torch.randn(T, B, STATE, generator=g),
        "action": torch.rand(T, B, A, generator=g) * 2 - 1,
        "reward": torch.rand(T, B, generator=g),
        "is_first": torch.zeros(T, B, dtype=torch.bool),
    }
    batch["is_first"][0, 0] = batch["is_first"][3, 1] = True
    if pixels:
        batch["pixels"] = torch.randint(0, 256, (T, B, 64, 64, 3), generator=g, dtype=torch.uint8)
    return batch


def is_one_hot(stoch):
    rows = stoch.unflatten(-1, (C, K))
    return ((rows - rows.round()).abs() < 1e-5).all() and (rows.sum(-1).round() == 1).all()


# ---------------------------------------------------------------- what there is


def test_every_hidden_layer_is_normed_and_has_no_bias():
    agent = make_agent(("pixels", "state"))
    rssm, model = agent.model.rssm, agent.model
    outer = {rssm.inp, model.encoder.state}  # an activation follows their last layer, too
    inner = {rssm.prior, rssm.post, model.decoder.state, model.reward, agent.critic}
    for mlp in outer | inner | {agent.actor.mlp}:
        hidden = len(mlp.layers) - (mlp not in outer)
        assert [layer.bias is None for layer in mlp.layers] == [i < hidden for i in
                                                                range(len(mlp.layers))]  # fmt: skip
        assert [norm.kind for norm in mlp.params().norms] == ["layer"] * hidden
    assert rssm.gru.linear.bias is None and rssm.gru.norm.normalized_shape == (3 * rssm.deter,)
    assert rssm.feat_size == rssm.deter + C * K
    assert rssm.params().dims() | {"C": C, "S": C * K, "A": A} == rssm.params().dims()
    assert all(isinstance(m, nn.LayerNorm) for m in agent.modules() if "Norm" in type(m).__name__)


def test_rms_norms_and_a_cell_without():
    agent = make_agent(model={"norm": "rms"})
    assert {norm.kind for norm in agent.critic.params().norms} == {"rms"}
    assert agent.model.rssm.params().gru.norm.bias is None
    agent = make_agent(model={"norm": "none"})
    gru = agent.model.rssm.params().gru
    assert gru.norm is None and gru.bias is not None and not agent.critic.params().norms
    agent.update(make_batch(), agent.make_optimizers(), seeded())


def test_two_hot_heads_begin_at_zero_and_bins_are_no_weights():
    agent = make_agent()
    feat = 10 * torch.randn(5, agent.model.rssm.feat_size, generator=seeded())
    for head in (agent.model.reward, agent.critic, agent.target_critic):
        assert torch.equal(head.number(feat), torch.zeros(5))
        assert len(head.bins) == 255
    assert not any("bins" in name for name in agent.state_dict())
    with torch.no_grad():
        agent.critic.layers[-1].bias[agent.critic.bins.argmin()] = 9.0
    assert (agent.critic.number(feat) < -1e6).all()


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("pixels", [False, True])
def test_backends_learn_alike(pixels):
    found = []
    kinds = ("pixels", "state") if pixels else ("state",)
    for backend in ("eager", "auto"):
        agent = make_agent(kinds, precision="fp32")
        optimizers, generator = agent.make_optimizers(), seeded(1)
        with use_backend(backend):
            found.append([agent.update(make_batch(pixels), optimizers, generator, health=True)
                          for _ in range(3)])  # fmt: skip
        assert last_backend("observe") == ("eager" if backend == "eager" else "native")
    eager, fast = found
    assert eager[0]["imagined_value"] == 0 and eager[0]["kl"] > 0
    for one, other in zip(eager, fast, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name


@pytest.mark.parametrize("readout", ["plain", "symlog", "two-hot"])
def test_rewards_and_values_are_learned(readout):
    """Of one batch, in a few hundred updates: both heads come to the targets they are shown."""
    agent = make_agent(model={"readout": readout}, precision="fp32")
    optimizers = agent.make_optimizers()
    for name in optimizers:
        for group in optimizers[name].param_groups:
            group["lr"] = 3e-3
    batch, generator = make_batch(), seeded()
    batch["reward"] = 3 * batch["state"][..., 0]
    told = [agent.update(batch, optimizers, generator) for _ in range(60)]
    assert told[-1]["reward_loss"] < 0.9 * told[0]["reward_loss"]
    assert told[-1]["state_loss"] < told[0]["state_loss"]
    assert all(np.isfinite(list(line.values())).all() for line in told)


def test_the_critic_is_held_to_the_returns_by_its_own_readout():
    """behaviour: outputs in states 0..H−1, whatever imagination made of them."""
    for readout in ("plain", "symlog", "two-hot"):
        agent = make_agent(model={"readout": readout}, precision="fp32", behavior={"gamma": 0.9})
        with torch.no_grad():
            for x in agent.critic.parameters():
                x.add_(0.1 * torch.randn(x.shape, generator=seeded()))
        batch = make_batch()
        seen = agent.world_model.watch(batch, torch.rand(T, B, C, generator=seeded()))
        rssm, H = agent.model.rssm.params(), agent.config.behavior.imag_horizon
        noise = torch.rand(H, T * B, C, generator=seeded(1)), torch.randn(H, T * B, A)
        assert rssm.noise == "C"
        dream = agent.behavior.imagine(seen.state, batch, noise)
        loss = agent.behavior.losses(dream).named["critic"]
        feat, returns = dream.feat[:-1].detach(), dream.ahead.returns.detach()
        value = agent.critic.number(feat)
        torch.testing.assert_close(value, dream.ahead.value, rtol=1e-4, atol=1e-5)
        if readout == "plain":
            want = (value - returns).square().mean()
        elif readout == "symlog":
            raw = agent.critic(feat)[..., 0]
            want = (raw - returns.sign() * returns.abs().log1p()).square().mean()
        else:
            nats = agent.critic(feat).double().log_softmax(-1)
            bins = agent.critic.bins.double()
            want = 0.0
            for log_p, target in zip(nats.flatten(0, 1), returns.double().flatten(), strict=True):
                weights = np.interp(target, bins, np.arange(255))
                at = int(weights)
                high = (target - bins[at]) / (bins[at + 1] - bins[at])
                want = want - (1 - high) * log_p[at] - high * log_p[at + 1]
            want = (want / returns.numel()).float()
        torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-6)
        gradient = torch.autograd.grad(loss, [*agent.critic.parameters()], retain_graph=True)
        wanted = torch.autograd.grad(want, [*agent.critic.parameters()])
        for got, exact in zip(gradient, wanted, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------- acting


@pytest.mark.parametrize("controller", ["actor", "mpc", "planet"])
def test_rows_act_as_each_would_alone(controller):
    agent = make_agent(precision="fp32")
    obs = {"state": make_batch()["state"][0].numpy()}
    together, state = agent.act(
        obs, controller=controller, generator=[seeded(i) for i in range(B)], sample=True
    )
    assert is_one_hot(state.stoch)
    for i in range(B):
        one = {"state": obs["state"][i : i + 1]}
        alone, own = agent.act(one, controller=controller, generator=[seeded(i)], sample=True)
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-5, atol=1e-6)
        assert torch.equal(own.stoch[0], state.stoch[i])


def test_dreams_are_of_one_hot_states_and_draw_as_their_generator_does():
    agent = make_agent(precision="fp32")
    _, state = agent.act(make_batch()["state"][0, 0].numpy())
    ahead = agent.foresee(state, seeded())
    assert is_one_hot(ahead.stoch)
    noise = torch.rand(1, 1, C, generator=seeded())
    now = State(state.deter, state.stoch)
    want = open_loop(agent.model.rssm.params(), now, state.action[None], noise)
    assert torch.equal(ahead.stoch, want.stoch[0])
    runs = [agent.dream(state, 5, seeded(seed)) for seed in (1, 1, 2)]
    assert all(action.shape == (5, A) for action, _ in runs)
    assert np.array_equal(runs[0][1]["state"], runs[1][1]["state"])
    assert not np.array_equal(runs[0][1]["state"], runs[2][1]["state"])
    batch = make_batch()
    batch["is_first"][3, 1] = False
    assert agent.predict(batch, 2, seeded())["state"].shape == (T, B, STATE)


@pytest.mark.parametrize("at", ["actor", "plan"])
@pytest.mark.parametrize("critics", [False, True])
def test_an_explorer_beside_it(at, critics):
    collect = dataclasses.replace(TINY.collect, controller="mpc")
    explore = ExploreConfig("ucb", at=at, critics=critics)
    agent = make_agent(explore=explore, collect=collect, precision="fp32")
    batch, optimizers = make_batch(), agent.make_optimizers()
    told = [agent.update(batch, optimizers, seeded()) for _ in range(2)]
    assert all(np.isfinite(list(line.values())).all() for line in told)
    for controller in ("mpc", "planet"):
        action, _ = agent.act(
            {"state": batch["state"][0].numpy()}, controller=controller, explore=True
        )
        assert np.isfinite(action).all()


def test_the_shield_looks_at_the_likeliest_state():
    agent = make_agent(safety=SafetyConfig("walker", shield=True), precision="fp32")
    agent.update(make_batch(), agent.make_optimizers(), seeded())
    _, state = agent.act({"state": make_batch()["state"][0].numpy()}, shield=agent.make_shield())
    rssm, now = agent.model.rssm.params(), State(state.deter, state.stoch)
    with torch.no_grad():
        agent.guard.barrier.layers[-1].bias.fill_(5.0)  # every proposal keeps the condition
        barrier, noise = agent.guard.barrier.params(), torch.zeros(1, B, 4, A)
        found = filter_actions(
            rssm, barrier, now, state.action, noise, alpha=0.5, std=0.5, num_elites=2
        )
        after = open_loop(rssm, now, state.action[None], torch.zeros(1, B, C))
        logits = agent.model.rssm.prior(after.deter[0]).unflatten(-1, (C, K))
        likeliest = nn.functional.one_hot(logits.argmax(-1), K).flatten(-2).float()
        value = agent.guard.barrier(torch.cat([after.deter[0], likeliest], -1))[:, 0]
        margin = value - 0.5 * agent.guard.barrier(now.feat)[:, 0]
    assert not found.changed.any() and (margin > 0).all()
    torch.testing.assert_close(found.margin, margin, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"classes": 1}, "model.classes must be none or >= 2, got 1"),
        ({"unimix": 1.0}, "model.unimix must be >= 0 and < 1, got 1.0"),
        ({"classes": None}, "model.unimix must be 0 without model.classes, got 0.01"),
        ({"bins": 254}, "model.bins must be an odd number >= 3, got 254"),
        ({"bins": 1}, "model.bins must be an odd number >= 3, got 1"),
        ({"norm": "batch"}, "model.norm must be 'none' | 'layer' | 'rms', got 'batch'"),
        ({"readout": "one-hot"}, "model.readout must be 'plain' | 'symlog' | 'two-hot'"),
        ({"cell": "lstm"}, "model.cell must be 'gru' | 'late-reset', got 'lstm'"),
    ],
)
def test_bad_settings_are_named(model, says):
    config = configure()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    with pytest.raises(ConfigError) as error:
        config.validate()
    assert says in str(error.value)


def test_older_runs_have_none_of_it_and_are_no_others():
    """Settings and architecture as they were written before there was a choice."""
    told = to_dict(preset("walker"))
    new = ("classes", "unimix", "cell", "norm", "readout", "bins")
    for name in new:
        del told["model"][name]
    del told["behavior"]["entropy"], told["loss"]["free_nats_each"]
    assert from_dict(told) == preset("walker")
    before = architecture(preset("walker"))
    for name in new:
        del before[f"model.{name}"]
    assert not differences(before, architecture(preset("walker")))
    wrong = differences(before, architecture(V3))
    assert {text.split(",")[0] for text in wrong} == {
        *("model.stoch", "model.activation"), *(f"model.{name}" for name in new if name != "bins")
    }  # fmt: skip
