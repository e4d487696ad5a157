"""Safety: signals, the barrier's losses, the multiplier, the shield on a double integrator."""

import dataclasses
import sys

import numpy as np
import pytest
import torch

from fastdreamer.acting.shield import Guard, Shield, filter_actions, safety_rates
from fastdreamer.acting.signals import Violations, load_signal, walker_signal
from fastdreamer.cli import main
from fastdreamer.config import ConfigError, ExploreConfig, SafetyConfig, preset
from fastdreamer.learning.barrier import barrier_losses, shortfall, update_multiplier
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.ops.backend import last_backend, use_backend
from fastdreamer.ops.cells import GRUParams
from fastdreamer.ops.layers import MLPParams
from fastdreamer.ops.params import RSSMParams, State, StdTransform
from fastdreamer.training.pretrained import load
from fastdreamer.training.trainer import Trainer, read_config

A, STATE, T, B = 6, 24, 6, 4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def configure(task="walker-stand", **safety):
    tiny = preset("tiny")
    env = dataclasses.replace(tiny.env, task=task)
    return dataclasses.replace(tiny, env=env, safety=SafetyConfig("walker", **safety))


def make_agent(**safety):
    return Dreamer(configure(**safety), {"state": (STATE,)}, A)


def make_batch(seed=0):
    g = seeded(seed)
    first = torch.zeros(T, B, dtype=torch.bool)
    first[0] = True
    return {
        "state": 6 * torch.randn(T, B, STATE, generator=g),
        "action": torch.rand(T, B, A, generator=g) * 2 - 1,
        "reward": torch.rand(T, B, generator=g),
        "is_first": first,
    }


# ---------------------------------------------------------------- signals


def test_walker_s_signal_is_the_worse_of_two_margins():
    state = np.zeros((3, STATE), np.float32)
    state[:, 14] = [1.0, 1.0, 0.25]  # metres
    state[:, 15:18] = 99  # the root's velocities are no joints'
    state[:, 20] = [-5, 30, 0]  # rad/s
    np.testing.assert_allclose(walker_signal(0.5, 20.0)(state), [0.75, -0.5, -0.5])


def test_walker_s_signal_reads_what_the_suite_says():
    from fastdreamer.envs import make_env

    env = make_env("walker-stand", obs="state", seed=3)
    obs = env.reset(seed=3)
    for _ in range(20):
        obs, *_ = env.step(np.ones(env.action_dim, np.float32))
    physics = env._task._env.physics
    joints = ["hip", "knee", "ankle"]
    speeds = [
        abs(float(physics.named.data.qvel[f"{side}_{joint}"][0]))
        for side in ("left", "right")
        for joint in joints
    ]
    height = float(physics.named.data.xpos["torso", "z"])
    want = min((height - 0.5) / 0.5, (20 - max(speeds)) / 20)
    assert float(walker_signal(0.5, 20.0)(obs["state"])) == pytest.approx(want, rel=1e-5)
    env.close()


SIGNALS = """
import numpy as np

def upright(state):
    return state[..., 0] - 0.5

def per_joint(state):
    return state

def bottomless(state):
    return np.full(state.shape[:-1], np.nan)

def broken(state):
    raise RuntimeError("no such joint")

number = 3
"""


def test_a_signal_of_one_s_own(tmp_path, monkeypatch):
    (tmp_path / "margins_of_mine.py").write_text(SIGNALS)
    monkeypatch.chdir(tmp_path)
    named = lambda name: dataclasses.replace(  # noqa: E731
        preset("tiny"), safety=SafetyConfig(name)
    )
    signal = load_signal(named("margins_of_mine:upright"), 4)
    np.testing.assert_allclose(signal(np.ones((2, 4), np.float32)), 0.5)
    for name, says in (
        ("margins_of_mine:per_joint", r"must map states \[\.\.\., 4\] to one finite margin"),
        ("margins_of_mine:bottomless", "values not finite"),
        ("margins_of_mine:broken", "no such joint"),
        ("margins_of_mine:number", "is not a function"),
        ("margins_of_mine:absent", "cannot be loaded"),
        ("nowhere_at_all:f", "cannot be loaded"),
        ("walker", "reads Walker's 24 numbers of state"),
    ):
        with pytest.raises(ConfigError, match=says):
            load_signal(named(name), 4)


@pytest.mark.parametrize("task", ["fish-swim", "gym:BipedalWalker-v3"])
def test_walker_s_signal_is_of_walker_alone(task):
    """Others have 24 numbers, too."""
    assert load_signal(configure(), STATE) and load_signal(configure("walker_run"), STATE)
    with pytest.raises(ConfigError, match=f"reads Walker's 24 .*, {task} has others; name your"):
        load_signal(configure(task), STATE)


def test_nothing_that_a_file_names_is_imported_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "margins_that_tell.py"
    tells = "import pathlib\npathlib.Path(__file__).with_name('imported').touch()\n"
    module.write_text(tells + SIGNALS)
    own = ["--safety", "margins_that_tell:upright"]
    tiny = ["--preset", "tiny", "--train.frames", "120", "--safety.shield", "--run", "run"]
    assert main(["train", "walker", *tiny, *own]) == 0
    run, imported = tmp_path / "run", tmp_path / "imported"
    assert imported.exists()

    def forget():
        imported.unlink(missing_ok=True)
        sys.modules.pop("margins_that_tell", None)

    forget()
    agent = load(run)
    agent.act(np.zeros(STATE, np.float32), shield=agent.make_shield())
    with pytest.raises(ConfigError, match="is named by a file alone, which imports nothing"):
        agent.guard.signal(np.zeros(STATE, np.float32))
    (newest,) = sorted((run / "checkpoints").iterdir())[-1:]
    for path in ("run", str(newest)):
        capsys.readouterr()
        assert main(["eval", path, "--episodes", "1", "--shield"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "with --safety margins_that_tell:upright it is imported" in said
        assert "violations:" not in said
    before = (run / "config.json").read_bytes()
    assert main(["train", "--resume", "run", "--train.frames", "160"]) == 1
    assert "name it again by --safety margins_that_tell:upright" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"name it again by Trainer\(run_dir, config\)"):
        Trainer(run).train()
    assert (run / "config.json").read_bytes() == before
    assert not imported.exists()

    assert main(["eval", "run", "--episodes", "1", *own]) == 0
    assert "violations: " in capsys.readouterr().out and imported.exists()
    forget()
    assert main(["train", "--resume", "run", "--train.frames", "160", *own]) == 0
    assert imported.exists() and read_config(run).safety.shield
    forget()
    agent = load(run, safety=SafetyConfig(own[1]))
    assert not imported.exists() and agent.guard.signal(np.ones(STATE, np.float32)) == 0.5
    forget()


@pytest.mark.parametrize(
    ("safety", "other", "says"),
    [
        ({"signal": "height"}, {}, "safety.signal must be none, walker or module:function"),
        ({"signal": "gym:make"}, {}, "safety.signal must be none, walker or module:function"),
        ({"alpha": 0.0}, {}, "safety.alpha must be > 0 and <= 1"),
        ({"alpha": 1.5}, {}, "safety.alpha must be > 0 and <= 1"),
        ({"hinge": 0.0}, {}, "safety.hinge must be > 0"),
        ({"shield_elites": 65}, {}, "safety.shield_elites must be <= 64 candidates"),
        ({"signal": "none", "shield": True}, {}, "safety.shield must be false without"),
        ({}, {"agent": "planet"}, "agent must be 'dreamer' with safety"),
        ({}, {"env": dataclasses.replace(preset("tiny").env, obs="pixels")}, "env.obs must be"),
    ],
)
def test_bad_settings_are_named(safety, other, says):
    config = dataclasses.replace(
        preset("tiny"), safety=SafetyConfig(**{"signal": "walker", **safety}), **other
    )
    with pytest.raises(ConfigError, match=says):
        config.validate()


def test_violations_are_counted_of_decisions_alone():
    count = Violations(walker_signal(0.5, 20.0))
    for t, height in enumerate([0.0, 1.0, 0.4, 0.5, 1.2]):
        state = np.zeros(STATE, np.float32)
        state[14] = height
        count(t, {"state": state}, np.zeros(A), 0.0)
    assert (count.decisions, count.count) == (4, 2)  # an edge is not safe
    assert safety_rates(count, None) == {"violations": 500.0}


# ---------------------------------------------------------------- learning


def test_losses_say_what_the_page_says():
    config = configure(hinge=0.3, alpha=0.25, step_scale=2.0)
    guard = Guard(config, 20, STATE)
    seen = torch.randn(T, B, 20, generator=seeded())
    margin = torch.randn(T, B, generator=seeded(1))
    imagined = torch.randn(3, 5, 20, generator=seeded(2), requires_grad=True)
    guard.multiplier.fill_(1.5)
    named, metrics, _ = barrier_losses(guard, config.safety, seen, margin, imagined)
    loss, price = named["barrier"], named["actor"]

    safe, unsafe, steps = [], [], []
    for b, m in zip(guard.barrier(seen).flatten().tolist(), margin.flatten().tolist(), strict=True):
        wanted = max(-0.3, min(0.3, m))
        (safe if m > 0 else unsafe).append(max(0, wanted - b if m > 0 else b - wanted))
    along = guard.barrier(imagined)[..., 0].tolist()
    for now, then in zip(along[:-1], along[1:], strict=True):
        steps += [max(0, 0.75 * x - y) for x, y in zip(now, then, strict=True)]
    mean = lambda x: sum(x) / len(x)  # noqa: E731
    assert loss.item() == pytest.approx(mean(safe) + mean(unsafe) + 2 * mean(steps), rel=1e-5)
    assert price.item() == pytest.approx(1.5 * mean(steps), rel=1e-5)
    assert metrics["unsafe_share"] == pytest.approx(len(unsafe) / margin.numel())

    price.backward(retain_graph=True)  # reaches the actor, through the states, alone
    assert imagined.grad.abs().sum() > 0
    assert all(p.grad is None for p in guard.barrier.parameters())
    imagined.grad = None
    loss.backward()  # reaches the barrier alone
    assert imagined.grad is None
    assert all(p.grad is not None for p in guard.barrier.parameters())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_batch_all_safe_or_all_unsafe_has_a_finite_loss(sign):
    config = configure()
    seen, imagined = torch.randn(T, B, 20), torch.randn(3, 5, 20)
    margin, guard = sign * torch.ones(T, B), Guard(config, 20, STATE)
    found = barrier_losses(guard, config.safety, seen, margin, imagined)
    assert torch.isfinite(found.named["barrier"])


def test_shortfall():
    barrier = torch.tensor([[1.0, 1.0, -1.0], [0.9, 0.7, -0.9], [0.8, 0.7, -0.5]])
    want = [[0.0, 0.1, 0.1], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(shortfall(barrier, 0.2), torch.tensor(want))


def test_the_multiplier_climbs_while_too_much_is_missing():
    config = configure(limit=0.1, multiplier_lr=0.5, multiplier_max=0.3)
    guard = Guard(config, 20, STATE)
    for missing, want in ((0.5, 0.2), (0.5, 0.3), (0.0, 0.25), (0.0, 0.2)):
        update_multiplier(guard, config.safety, torch.tensor(missing))
        assert guard.multiplier.item() == pytest.approx(want)
    for _ in range(9):
        update_multiplier(guard, config.safety, torch.tensor(0.0))
    assert guard.multiplier == 0


@pytest.mark.parametrize("before", [0.0, 27.0])
def test_without_a_multiplier_all_but_the_barrier_learns_as_ever(before):
    """Model, actor and critic of an agent whose multiplier is 0 are those of one without; also
    where the run had one before."""
    agent = make_agent(multiplier_lr=0.0)
    agent.guard.multiplier.fill_(before)
    plain_config = dataclasses.replace(agent.config, safety=SafetyConfig())
    plain = Dreamer(plain_config, {"state": (STATE,)}, A)
    assert set(plain.make_optimizers()) == {"model", "actor", "critic"}
    for one in (agent, plain):
        optimizers, g = one.make_optimizers(), seeded(1)
        for i in range(2):
            one.update(make_batch(i), optimizers, g)
    ours, theirs = agent.state_dict(), plain.state_dict()
    assert {name.split(".")[0] for name in set(ours) - set(theirs)} == {"guard"}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_actor_that_pays_learns_something_else():
    agents = [make_agent(multiplier_lr=lr, limit=0.0) for lr in (0.0, 5.0)]
    for agent in agents:
        optimizers, g = agent.make_optimizers(), seeded(1)
        for i in range(3):
            metrics = agent.update(make_batch(i), optimizers, g)
    free, paying = (agent.state_dict() for agent in agents)
    name = "actor.mlp.layers.0.weight"
    assert metrics["safety_multiplier"] > 0 and not torch.equal(free[name], paying[name])
    assert torch.equal(free["model.reward.layers.0.weight"], paying["model.reward.layers.0.weight"])


def test_price_and_optimism_have_one_gradient_on_every_backend():
    config = dataclasses.replace(configure(), explore=ExploreConfig("ucb", critics=True))
    found = {}
    for backend in ("eager", "native"):
        agent = Dreamer(config, {"state": (STATE,)}, A)
        agent.guard.multiplier.fill_(100.0)
        with use_backend(backend):
            found[backend] = agent.update(make_batch(), agent.make_optimizers(), seeded(1))
        assert last_backend("imagine") == backend
    for name in ("actor", "barrier", "explorer", "critics", "rewards"):
        norms = [numbers[f"{name}_grad_norm"] for numbers in found.values()]
        assert norms[0] > 0 and norms[1] == pytest.approx(norms[0], rel=1e-3), name
    assert found["eager"]["safety_shortfall"] > 0


def test_no_barrier_no_shield():
    agent = Dreamer(preset("tiny"), {"state": (STATE,)}, A)
    with pytest.raises(ConfigError, match="has no barrier"):
        agent.make_shield()


# ---------------------------------------------------------------- a double integrator

DT, K, SCALE = 0.05, 1.5, 1e-3


def double_integrator(dtype=torch.float32):
    """deter = SCALE · (p, v) with p' = p + DT·v, v' = v + DT·a, exact but for tanh(x) ≈ x."""
    new = lambda rows: torch.tensor(rows, dtype=dtype)  # noqa: E731
    inp = MLPParams((new([[0.0, 1.0], [0.0, -1.0]]),), (new([0.0, 0.0]),), "relu")  # ±a
    # h' = (h + n)/2 with n = tanh(x + h·W), the reset gate open: W = 2·[[1, DT], [0, 1]] − 1.
    zeros = [[0.0, 0.0]] * 4
    push = 2 * DT * SCALE
    gru = GRUParams(
        new([*zeros, [0.0, 0.0], [push, -push]]),
        new([*zeros, [1.0, 2 * DT], [0.0, 1.0]]),
        new([30.0, 30.0, 0.0, 0.0, 0.0, 0.0]),
        new([0.0] * 6),
    )
    hidden = (new([[0.0, 0.0]]), new([[0.0], [0.0]])), (new([0.0]), new([0.0, 0.0])), "relu"
    return RSSMParams(inp, gru, MLPParams(*hidden), None, StdTransform(min=0.1))


def box_barrier(dtype=torch.float32):
    """B = 1 − |p + K·v|: where it is positive and |p| ≤ 1, the box can be held with |a| ≤ 1."""
    new = lambda rows: torch.tensor(rows, dtype=dtype) / SCALE  # noqa: E731
    layers = (new([[1.0, K, 0.0], [-1.0, -K, 0.0]]), -torch.ones(1, 2, dtype=dtype))
    return MLPParams(layers, (torch.zeros(2, dtype=dtype), torch.ones(1, dtype=dtype)), "relu")


def latent(p, v):
    deter = SCALE * torch.stack([p, v], -1).float()
    return State(deter, torch.zeros(len(deter), 1))


def settings(**changes):
    return SafetyConfig("walker", **{"shield_samples": 64, "shield_elites": 8, **changes})


class Modules:
    """What a Shield asks of the modules of an agent."""

    def __init__(self, params):
        self.params = lambda: params


def drive(policy, shield, steps=200, rows=12):
    """True double integrators under a policy; the greatest |p| of each over time."""
    g = seeded(5)
    p, v = torch.linspace(-0.8, 0.8, rows).double(), torch.zeros(rows).double()
    farthest, changed = p.abs(), 0.0
    for t in range(steps):
        action = policy(t, rows, g)
        if shield is not None:
            kept = shield(latent(p, v), action, g)
            changed = max(changed, (kept - action).abs().max().item())
            action = kept
        p, v = p + DT * v, v + DT * action[:, 0].double()
        farthest = torch.maximum(farthest, p.abs())
    return farthest, changed


POLICIES = {
    "push": lambda t, rows, g: torch.ones(rows, 1),
    "swing": lambda t, rows, g: torch.full((rows, 1), 1.0 if t // 40 % 2 else -1.0),
    "drift": lambda t, rows, g: 0.2 + 0.5 * torch.randn(rows, 1, generator=g).clamp(-1, 1),
}


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("name", POLICIES)
def test_the_shield_keeps_a_double_integrator_in_its_box(name, backend):
    policy = POLICIES[name]
    alone, _ = drive(policy, None)
    assert (alone > 1.5).any()
    shield = Shield(settings(), Modules(double_integrator()), Modules(box_barrier()))
    with use_backend(backend):
        shielded, changed = drive(policy, shield)
    assert last_backend("open_loop") == backend
    assert (shielded <= 1.0).all() and changed > 0.1
    assert shield.decisions == 12 * 200 and 0 < shield.changed < shield.decisions
    assert shield.failed == 0


def test_the_hand_made_model_is_a_double_integrator():
    p, v = torch.linspace(-1, 1, 9), torch.linspace(1, -1, 9)
    action = torch.linspace(-1, 1, 9)[:, None]
    params, barrier = double_integrator(), box_barrier()
    noise = torch.zeros(1, 9, 1, 1)
    kept = filter_actions(
        params, barrier, latent(p, v), action, noise, alpha=1.0, std=0.5, num_elites=1
    )
    after = 1 - ((p + DT * v) + K * (v + DT * action[:, 0])).abs()
    torch.testing.assert_close(kept.margin, after, rtol=1e-3, atol=1e-3)  # α = 1: B(next) alone


def test_an_action_that_keeps_the_condition_is_left_alone():
    action = torch.tensor([[0.1], [-0.2]])
    state = latent(torch.zeros(2), torch.zeros(2))
    noise = torch.randn(3, 2, 64, 1, generator=seeded())
    kept = filter_actions(
        double_integrator(), box_barrier(), state, action, noise, alpha=0.2, std=0.5, num_elites=8
    )
    assert torch.equal(kept.action, action) and not kept.changed.any() and not kept.failed.any()


def test_the_nearest_action_that_keeps_it_is_chosen():
    """At p = 0.7, v = 0.2 there is B = 0; the condition allows a ≤ −v/K, so −2/15 is nearest."""
    state = latent(torch.full((2,), 0.7), torch.full((2,), 0.2))
    action = torch.tensor([[0.9], [-0.5]])
    noise = torch.randn(3, 2, 64, 1, generator=seeded())
    kept = filter_actions(
        double_integrator(), box_barrier(), state, action, noise, alpha=0.2, std=0.5, num_elites=8
    )
    assert kept.changed.tolist() == [True, False] and not kept.failed.any()
    assert -0.2 <= kept.action[0, 0] <= -0.13 and kept.action[1, 0] == -0.5
    assert (kept.margin >= 0).all()


def test_where_nothing_keeps_it_the_greatest_margin_is_chosen():
    """Far out and fast: full brakes is the best there is."""
    state = latent(torch.tensor([2.0]), torch.tensor([2.0]))
    noise = torch.randn(4, 1, 64, 1, generator=seeded())
    kept = filter_actions(
        double_integrator(), box_barrier(), state, torch.tensor([[0.5]]), noise,
        alpha=0.2, std=0.5, num_elites=8,
    )  # fmt: skip
    assert kept.changed.all() and kept.failed.all()
    assert kept.action.item() == -1.0 and kept.margin.item() < 0


def test_a_proposal_that_is_the_best_there_is_is_not_replaced():
    """Full brakes themselves, which are clamped from no candidate to more."""
    state = latent(torch.tensor([2.0, 2.0]), torch.tensor([2.0, 2.0]))
    noise = torch.randn(4, 2, 64, 1, generator=seeded())
    kept = filter_actions(
        double_integrator(), box_barrier(), state, torch.tensor([[-1.0], [0.5]]), noise,
        alpha=0.2, std=0.5, num_elites=8,
    )  # fmt: skip
    assert kept.action.tolist() == [[-1.0], [-1.0]] and kept.failed.all()
    assert kept.changed.tolist() == [False, True]


def test_nan_keeps_nothing_and_is_not_preferred():
    state = latent(torch.tensor([float("nan"), 0.0]), torch.tensor([0.0, 0.0]))
    noise = torch.randn(2, 2, 8, 1, generator=seeded())
    kept = filter_actions(
        double_integrator(), box_barrier(), state, torch.zeros(2, 1), noise,
        alpha=0.2, std=0.5, num_elites=2,
    )  # fmt: skip
    assert kept.failed.tolist() == [True, False] and torch.isfinite(kept.action).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"alpha": 0.0}, "alpha must be in"),
        ({"num_elites": 9}, r"num_elites must be in 1\.\.N=8, got 9"),
        ({"noise": torch.zeros(2, 3, 8, 1)}, r"noise must be \[I, 2, N, 1\], got \[2, 3, 8, 1\]"),
        ({"noise": torch.zeros(0, 2, 8, 1)}, "noise must be"),
    ],
)
def test_bad_input_of_the_shield(change, says):
    given = {"noise": torch.zeros(1, 2, 8, 1), "alpha": 0.2, "std": 0.5, "num_elites": 2} | change
    state = latent(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=says):
        filter_actions(double_integrator(), box_barrier(), state, torch.zeros(2, 1), **given)


def test_act_stores_the_action_that_the_shield_returned():
    agent = make_agent(shield_std=0.7)
    with torch.no_grad():  # a barrier that is never satisfied
        agent.guard.barrier.layers[-1].weight.zero_()
        agent.guard.barrier.layers[-1].bias.fill_(-1.0)
    shield, obs = agent.make_shield(), np.zeros((3, STATE), np.float32)
    plain, _ = agent.act(obs, generator=seeded())
    action, state = agent.act(obs, shield=shield, generator=seeded())
    assert (shield.decisions, shield.changed, shield.failed) == (3, 0, 3)
    np.testing.assert_array_equal(action, state.action.numpy())
    assert np.abs(action).max() <= 1
    np.testing.assert_array_equal(action, plain)  # no better one
    rates = safety_rates(None, shield)
    assert rates == {"shield_changed": 0.0, "shield_failed": 1000.0}
