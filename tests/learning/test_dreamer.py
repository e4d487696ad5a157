"""Dreamer: learning from pixels and state; acting is in test_policy.py."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from fastdreamer.config import ConfigError, preset
from fastdreamer.learning.dreamer import Dreamer, NonFiniteLoss
from fastdreamer.ops.backend import BackendError, last_backend, use_backend

SHAPES = {"pixels": (64, 64, 3), "state": (5,)}
KINDS = [("pixels",), ("state",), ("pixels", "state")]
A, T, B = 3, 6, 2


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def configure(*, behavior=(), **changes):
    config = preset("tiny")
    if behavior:
        changes["behavior"] = dataclasses.replace(config.behavior, **dict(behavior))
    return dataclasses.replace(config, **changes)


def make_agent(kinds=("state",), **changes):
    return Dreamer(configure(**changes), {kind: SHAPES[kind] for kind in kinds}, A)


def make_obs(kinds, *lead, seed=0):
    r = np.random.default_rng(seed)
    obs = {
        "pixels": r.integers(0, 256, (*lead, 64, 64, 3), dtype=np.uint8),
        "state": r.normal(size=(*lead, 5)).astype(np.float32),
    }
    return {kind: obs[kind] for kind in kinds}


def make_batch(kinds, seed=0):
    g = seeded(seed)
    batch = {kind: torch.from_numpy(x) for kind, x in make_obs(kinds, T, B, seed=seed).items()}
    batch["action"] = torch.rand(T, B, A, generator=g) * 2 - 1
    batch["reward"] = torch.rand(T, B, generator=g)
    batch["is_first"] = torch.zeros(T, B, dtype=torch.bool)
    batch["is_first"][0, 0] = batch["is_first"][3, 1] = True
    return batch


def snapshot(module):
    return {name: x.clone() for name, x in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- construction


def test_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(5)
    first = snapshot(make_agent(seed=1))
    torch.manual_seed(6)
    assert same(first, snapshot(make_agent(seed=1)))
    other = snapshot(make_agent(seed=2))
    assert not any(torch.equal(first[n], other[n]) for n in first if n.endswith("weight"))


@pytest.mark.parametrize("kinds", KINDS)
def test_torch_s_global_generator_is_left_alone(kinds):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    agent = make_agent(kinds)
    _, state = agent.act(make_obs(kinds), noise=0.3)
    agent.update(make_batch(kinds), agent.make_optimizers(), seeded())
    agent.dream(state, 3)
    assert torch.equal(before, torch.get_rng_state())


def test_a_configuration_that_cannot_run_is_refused():
    with pytest.raises(ConfigError, match="seed must be >= 0, got -1"):
        make_agent(seed=-1)


def test_optimizers_share_out_every_parameter():
    agent = make_agent(behavior={"target_every": 3})
    optimizers = agent.make_optimizers()
    optim = agent.config.optim
    rates = {"model": optim.model_lr, "actor": optim.actor_lr, "critic": optim.critic_lr}
    for name, optimizer in optimizers.items():
        (group,) = optimizer.param_groups
        assert (group["lr"], group["eps"]) == (rates[name], optim.eps)
        assert group["params"] == list(getattr(agent, name).parameters())
    ours = [p for o in optimizers.values() for group in o.param_groups for p in group["params"]]
    assert {id(p) for p in ours} == {id(p) for p in agent.parameters() if p.requires_grad}
    assert not any(p.requires_grad for p in agent.target_critic.parameters())


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("kinds", KINDS)
def test_update_follows_its_generator(kinds):
    runs = []
    for seed in (1, 1, 2):
        agent = make_agent(kinds, behavior={"return_norm": True, "target_every": 2})
        optimizers = agent.make_optimizers()
        generator = seeded(seed)
        batch = make_batch(kinds)
        kept = {name: x.clone() for name, x in batch.items()}
        metrics = [agent.update(batch, optimizers, generator) for _ in range(2)]
        assert same(batch, kept)
        runs.append((metrics, snapshot(agent)))
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0] and not same(runs[0][1], runs[2][1])
    metrics = runs[0][0][0]
    assert all(isinstance(x, float) for x in metrics.values())
    assert ("image_loss" in metrics) == ("pixels" in kinds)
    assert ("state_loss" in metrics) == ("state" in kinds)
    assert {"reward_loss", "kl_loss", "kl", "model_loss", "actor_loss", "critic_loss"} <= set(
        metrics
    )


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_the_pairing_is_a_setting_of_imagination_and_planning(backend):
    found = {}
    for pairing in ("arrival", "departure"):
        agent = make_agent(behavior={"pairing": pairing, "lam": 1.0}, precision="fp32")
        assert agent.return_params().departure == (pairing == "departure")
        with use_backend(backend):
            metrics = agent.update(make_batch(("state",)), agent.make_optimizers(), seeded())
            assert last_backend("imagine") == backend
        found[pairing] = metrics
    a, d = found["arrival"], found["departure"]
    assert a["model_loss"] == d["model_loss"] and a["imagined_value"] == d["imagined_value"]
    assert a["imagined_reward"] != d["imagined_reward"] and a["actor_loss"] != d["actor_loss"]
    obs = make_obs(("state",))
    with use_backend(backend):
        action, _ = agent.act(obs, controller="mpc", generator=seeded())
    assert np.isfinite(action).all() and last_backend("cem") == backend


HEALTH = ("prior_entropy", "post_entropy", "actor_entropy", "actor_std", "action_saturated")


@pytest.mark.parametrize("kind", ["dreamer", "planet"])
def test_health_is_measured_when_asked_for_and_changes_nothing(kind):
    found = []
    for health in (False, True):
        agent = make_agent(agent=kind)
        with torch.no_grad():
            agent.model.rssm.prior.layers[-1].bias[4:] += 1  # four latents' std
        metrics = agent.update(
            make_batch(("state",)), agent.make_optimizers(), seeded(), health=health
        )
        found.append((metrics, snapshot(agent)))
    (plain, weights), (healthy, same_weights) = found
    assert same(weights, same_weights)
    names = HEALTH if kind == "dreamer" else HEALTH[:2]
    assert set(healthy) - set(plain) == set(names)
    assert {name: healthy[name] for name in plain} == plain
    assert healthy["prior_entropy"] > healthy["post_entropy"] + 1  # of a wider distribution
    if kind == "dreamer":
        assert healthy["actor_std"] == pytest.approx(5.1, abs=0.2)  # as it starts
        assert 0.5 < healthy["action_saturated"] < 1  # P(|5 ε| > atanh 0.99) = 0.6
        assert healthy["actor_entropy"] < A * math.log(2)


def test_health_tells_a_dead_actor():
    agent = make_agent()
    layer = agent.actor.mlp.layers[-1]
    with torch.no_grad():  # at one rim, and sure of it
        layer.weight.zero_()
        layer.bias[:A], layer.bias[A:] = 50, -50
    agent.actor.mean_scale, agent.actor.min_std = math.inf, 0.01
    metrics = agent.update(make_batch(("state",)), agent.make_optimizers(), seeded(), health=True)
    assert metrics["action_saturated"] == 1 and metrics["actor_std"] == pytest.approx(0.01)
    assert metrics["actor_entropy"] < -100


def test_updates_learn():
    agent = make_agent(optim=dataclasses.replace(preset("tiny").optim, model_lr=3e-3))
    optimizers, generator, batch = agent.make_optimizers(), seeded(), make_batch(("state",))
    history = [agent.update(batch, optimizers, generator) for _ in range(60)]
    for name in ("state_loss", "reward_loss"):
        assert history[-1][name] < 0.5 * history[0][name], name


def test_one_loss_s_learning_rate_does_not_reach_the_others():
    def after(**rates):
        optim = dataclasses.replace(preset("tiny").optim, **rates)
        agent = make_agent(optim=optim, behavior={"target_every": 5})
        agent.update(make_batch(("state",)), agent.make_optimizers(), seeded())
        parts = ("model", "actor", "critic", "target_critic")
        return {name: snapshot(getattr(agent, name)) for name in parts}

    base = after()
    for rate, own in (("actor_lr", "actor"), ("critic_lr", "critic")):
        other = after(**{rate: 0.5})
        for name in base:
            assert same(base[name], other[name]) == (name != own), (rate, name)


def test_every_parameter_gets_one_loss_s_gradient():
    """The reward head and the critic judge the actor's dreams, and learn nothing from them."""
    agent = make_agent(("pixels", "state"), behavior={"target_every": 5})
    counts = {name: 0 for name, p in agent.named_parameters() if p.requires_grad}

    def count(name):
        counts[name] += 1

    for name, p in agent.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, name=name: count(name))
    agent.update(make_batch(("pixels", "state")), agent.make_optimizers(), seeded())
    assert set(counts.values()) == {1}, counts
    assert all(p.grad is None for p in agent.target_critic.parameters())


def test_the_target_critic_is_copied_when_asked():
    agent = make_agent(behavior={"target_every": 10})
    assert same(snapshot(agent.critic), snapshot(agent.target_critic))
    first = snapshot(agent.critic)
    agent.update(make_batch(("state",)), agent.make_optimizers(), seeded())
    assert same(first, snapshot(agent.target_critic))
    assert not same(first, snapshot(agent.critic))
    agent.update_target()
    assert same(snapshot(agent.critic), snapshot(agent.target_critic))
    assert all(
        a.data_ptr() != b.data_ptr()
        for a, b in zip(agent.critic.parameters(), agent.target_critic.parameters(), strict=True)
    )
    without = make_agent()
    assert without.target_critic is None
    without.update_target()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_that_is_no_number_names_its_loss(value):
    agent = make_agent()
    optimizers, batch, before = agent.make_optimizers(), make_batch(("state",)), snapshot(agent)
    batch["reward"][2, 1] = value
    with pytest.raises(NonFiniteLoss, match="^reward loss became (nan|inf)$") as caught:
        agent.update(batch, optimizers, seeded())
    assert caught.value.name == "reward loss" and not np.isfinite(caught.value.value)
    assert same(before, snapshot(agent))
    assert all(not optimizer.state for optimizer in optimizers.values())


@pytest.mark.parametrize(
    ("name", "first", "stepped"),
    [
        ("model", "reward.layers.0.weight", set()),
        ("actor", "mlp.layers.0.weight", {"model"}),
        ("critic", "layers.0.weight", {"model"}),
    ],
)
def test_a_gradient_that_is_no_number_stops_its_optimizer(name, first, stepped):
    agent = make_agent()
    optimizers, before = agent.make_optimizers(), snapshot(agent)
    parameter = getattr(agent, name).get_parameter(first)
    parameter.register_hook(lambda g: g * float("inf"))
    with pytest.raises(NonFiniteLoss, match=f"^gradient of the {name} loss became (nan|inf)$"):
        agent.update(make_batch(("state",)), optimizers, seeded())
    assert {name for name, optimizer in optimizers.items() if optimizer.state} == stepped
    after = snapshot(agent)
    assert {
        key.partition(".")[0] for key in before if not torch.equal(before[key], after[key])
    } == (stepped)


@pytest.mark.parametrize(
    ("parameter", "named"),
    [
        ("model.rssm.prior.layers.1.bias", "kl loss"),
        ("model.decoder.state.layers.2.bias", "state loss"),
        ("critic.layers.2.bias", "actor loss"),  # the actor climbs the critic
    ],
)
def test_the_first_loss_to_go_is_named(parameter, named):
    agent = make_agent()
    agent.get_parameter(parameter).data.fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match=f"^{named} became nan$"):
        agent.update(make_batch(("state",)), agent.make_optimizers(), seeded())


def test_a_phase_waits_for_the_device_once():
    """All that it checks is read in one transfer; behind the phases come the metrics."""

    class Reads(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func.__name__ in ("tolist", "item", "__bool__", "__float__", "__int__"):
                found.append(func.__name__)
            return func(*args, **kwargs or {})

    agent, found = make_agent(), []
    batch, optimizers = make_batch(("state",)), agent.make_optimizers()
    with Reads():
        agent.update(batch, optimizers, seeded())
    assert found == ["tolist"] * 3


def test_bfloat16_is_within_five_percent():
    """Autocast rounds activations to 8 bits; the losses of one update barely notice."""
    kinds = ("pixels", "state")
    metrics = {}
    for precision in ("fp32", "bf16"):
        agent = make_agent(kinds, precision=precision)
        optimizers = agent.make_optimizers()
        metrics[precision] = agent.update(make_batch(kinds), optimizers, seeded())
        assert all(x.dtype == torch.float32 for x in agent.state_dict().values())
    names = ("image_loss", "state_loss", "reward_loss", "kl", "model_loss", "critic_loss")
    for name in names:
        assert metrics["bf16"][name] == pytest.approx(metrics["fp32"][name], rel=0.05), name
    # near zero at the start: compared on the scale of a reward
    for name in ("actor_loss", "imagined_value", "imagined_reward"):
        assert metrics["bf16"][name] == pytest.approx(metrics["fp32"][name], rel=0.05, abs=5e-3)
    assert metrics["bf16"] != metrics["fp32"]


def test_backends_are_resolved_as_everywhere():
    agent = make_agent()
    batch = make_batch(("state",))
    with use_backend("eager"):
        agent.update(batch, agent.make_optimizers(), seeded())
    for op in ("observe", "imagine"):
        assert last_backend(op) == "eager"
    with use_backend("triton"), pytest.raises(BackendError, match="observe: backend 'triton'"):
        agent.update(batch, agent.make_optimizers(), seeded())


def test_an_update_on_a_cpu_is_native():
    agent = make_agent()
    with use_backend("auto"):
        agent.update(make_batch(("state",)), agent.make_optimizers(), seeded())
    assert {op: last_backend(op) for op in ("observe", "imagine")} == {
        "observe": "native",
        "imagine": "native",
    }
