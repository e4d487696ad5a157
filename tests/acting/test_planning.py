"""Planners: known optima, edges of the settings, and every controller on every backend."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from fastdreamer.acting import planning
from fastdreamer.acting.planning import PlanningError, plan
from fastdreamer.acting.play import agent_policy, collect, episode_seed
from fastdreamer.acting.policy import Policy, PolicyState
from fastdreamer.config import ConfigError, PlanConfig, preset
from fastdreamer.envs import make_env
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.nn.dists import greedy_action
from fastdreamer.ops.backend import last_backend, use_backend
from fastdreamer.ops.cells import GRUParams
from fastdreamer.ops.layers import MLPParams
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.params import ActorParams, ReturnParams, RSSMParams, State, StdTransform
from fastdreamer.training.checkpoint import load_checkpoint
from fastdreamer.training.episodes import episode_path, read_episode
from fastdreamer.training.pretrained import load
from fastdreamer.training.trainer import Trainer, create_run
from fastdreamer.training.worker import collecting_controller

TINY = preset("tiny")
BACKENDS = ["eager", "native"]
SCALE = 0.05  # of the latent state: tanh is linear there
nan, inf = math.nan, math.inf


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------- world models written by hand


def linear_model(decay, gain):
    """h' = [decay · h0 + gain · u, u] for one action u, all times SCALE; stoch is noise."""
    zeros = torch.zeros
    # [relu(u), relu(-u)] of the input [stoch, action]
    inp = MLPParams((torch.tensor([[0.0, 1.0], [0.0, -1.0]]),), (zeros(2),), "relu")
    new_x = SCALE * torch.tensor([[gain, -gain], [1.0, -1.0]])
    new_h = torch.tensor([[decay, 0.0], [0.0, 0.0]])
    gru = GRUParams(
        torch.cat([zeros(4, 2), new_x]),
        torch.cat([zeros(4, 2), new_h]),
        torch.tensor([50.0, 50, -50, -50, 0, 0]),  # reset gate open, update gate shut
        zeros(6),
    )
    prior = MLPParams((zeros(2, 2),), (zeros(2),), "tanh")
    return RSSMParams(inp, gru, prior, None, StdTransform(min=0.1))


def minus_squares(weights, knots=80, end=2.0):
    """A head −Σ wᵢ hᵢ² of feat [h0, h1, stoch], in units of SCALE: linear between many knots."""
    step = end / knots
    bends = torch.full((knots,), 2 * step)  # slopes (2k + 1)·step between knots
    bends[0] = step
    at = torch.arange(knots) * step
    rows, biases, out = [], [], []
    for i, weight in enumerate(weights):
        for sign in (1.0, -1.0):
            row = torch.zeros(knots, 3)
            row[:, i] = sign / SCALE
            rows.append(row)
            biases.append(-at)
            out.append(-weight * bends)
    head = (torch.cat(rows), torch.cat(out)[None]), (torch.cat(biases), torch.zeros(1))
    return MLPParams(*head, "relu")


def lqr(decay, gain, cost, effort, gamma):
    """Gain and value of the optimal regulator: u = −k s, V = −p s², costs after each step."""
    p = 0.0
    for _ in range(1000):
        # minimise over u: cost s'² + effort u² + γ p s'², s' = decay s + gain u
        q = cost + gamma * p
        k = q * decay * gain / (effort + q * gain**2)
        p = q * (decay - gain * k) ** 2 + effort * k**2
    return k, p


def started(*positions):
    return State(
        SCALE * torch.tensor([[s, 0.0] for s in positions]), torch.zeros(len(positions), 1)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lam", [1.0, 0.8])
def test_mpc_is_the_optimal_regulator_of_a_linear_quadratic_model(backend, lam):
    decay, gain, cost, effort, gamma = 0.95, 0.6, 1.0, 0.3, 0.9
    k, p = lqr(decay, gain, cost, effort, gamma)
    returns = ReturnParams(
        minus_squares([cost, effort]), minus_squares([p, 0.0]), None, gamma=gamma, lam=lam
    )
    config = PlanConfig(plan_horizon=4, num_samples=300, num_elites=30, iterations=12, init_std=0.7)
    positions = (1.0, -0.4, 0.0)
    action, info = plan(
        started(*positions), linear_model(decay, gain), returns, config,
        generator=seeded(), backend=backend,
    )  # fmt: skip
    assert last_backend("cem") == backend
    want = torch.tensor([[-k * s] for s in positions])
    torch.testing.assert_close(action, want, rtol=0, atol=0.04)
    # the plan goes on as the regulator would
    s = torch.tensor(positions)[:, None]
    for u in info.mean:
        torch.testing.assert_close(u, -k * s, rtol=0, atol=0.08)
        s = decay * s + gain * u
    assert info.std.max() < 0.05 and info.iterations == 12 and info.seconds > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_planet_minimises_a_finite_sum_without_critic_or_actor(backend):
    decay, gain, effort, horizon = 0.95, 0.6, 0.3, 3
    returns = ReturnParams(minus_squares([1.0, effort]), None, None, gamma=0.5, lam=0.5)
    config = PlanConfig(plan_horizon=horizon, num_samples=300, num_elites=30, iterations=12)
    action, info = plan(
        started(1.0), linear_model(decay, gain), returns, config,
        score="reward", generator=seeded(), backend=backend,
    )  # fmt: skip
    # least squares: s = F s0 + G u, minimise |s|² + effort |u|²
    F = torch.tensor([decay ** (t + 1) for t in range(horizon)])
    G = torch.zeros(horizon, horizon)
    for t in range(horizon):
        for j in range(t + 1):
            G[t, j] = gain * decay ** (t - j)
    want = -torch.linalg.solve(G.T @ G + effort * torch.eye(horizon), G.T @ F)
    torch.testing.assert_close(info.mean[:, 0, 0], want, rtol=0, atol=0.05)
    assert torch.equal(action, info.mean[0])


def arms(left, right):
    """Reward left · |u| for u < 0 and right · |u| for u > 0."""
    pick = torch.tensor([[0.0, -1 / SCALE, 0.0], [0.0, 1 / SCALE, 0.0]])
    out = torch.tensor([[left, right]])
    return MLPParams((pick, out), (torch.zeros(2), torch.zeros(1)), "relu")


def constant_actor(value, std=0.01):
    """An actor whose mean action is about `value`, everywhere."""
    raw = math.atanh(value)
    bias = torch.tensor([raw, math.log(math.expm1(std))])
    return ActorParams(MLPParams((torch.zeros(2, 3),), (bias,), "elu"), 1e6, StdTransform())


@pytest.mark.parametrize("better", [-1, 1])
def test_the_better_of_two_arms_is_taken_even_from_the_side_of_the_worse(better):
    returns = ReturnParams(arms(*((1.0, 0.5) if better < 0 else (0.5, 1.0))), None, None, 1.0, 1.0)
    config = PlanConfig(plan_horizon=2, num_samples=200, num_elites=20, iterations=8)
    given = (started(0.0), linear_model(0.0, 1.0), returns, config)
    action, _ = plan(*given, score="reward", generator=seeded())
    assert action.item() * better > 0.95
    actor = constant_actor(-0.3 * better)
    action, _ = plan(*given, score="reward", actor=actor, generator=seeded())
    assert action.item() * better > 0.95


# ------------------------------------------------------------------- edges of the settings


def random_agent(**changes):
    """A small Dreamer with random weights, and a latent state of three environments."""
    config = dataclasses.replace(TINY, precision="fp32", **changes)
    agent = Dreamer(config, {"state": (5,)}, 2)
    agent.state = State(*(torch.randn(3, n, generator=seeded(n)) for n in (16, 4)))
    return agent


@pytest.fixture(scope="module")
def agent():
    return random_agent()


def planned(agent, controller="mpc", *, state=None, last=None, seed=0, **settings):
    base = agent.config
    agent.config = dataclasses.replace(base, plan=dataclasses.replace(base.plan, **settings))
    try:
        return agent.plan(state or agent.state, controller, last=last, generator=seeded(seed))
    finally:
        agent.config = base


def test_what_act_returned_is_planned_from(agent):
    acted = PolicyState(*agent.state, torch.zeros(3, 2))
    action, info = planned(agent, state=acted)
    assert torch.equal(action, planned(agent)[0]) and info.mean.shape[1:] == (3, 2)


@pytest.mark.parametrize("controller", ["mpc", "planet"])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_elites": 8},
        {"num_samples": 1, "num_elites": 1},
        {"plan_horizon": 1},
        {"plan_horizon": 1, "num_samples": 1, "num_elites": 1, "iterations": 1},
        {"init_std": 1e-9, "min_std": 0.2},
    ],
)
def test_the_edges_of_the_settings_plan(agent, controller, settings):
    action, info = planned(agent, controller, **settings)
    want = dataclasses.replace(TINY.plan, **settings)
    assert action.shape == (3, 2) and action.dtype == torch.float32 and action.abs().max() <= 0.9999
    assert info.mean.shape == info.std.shape == (want.plan_horizon, 3, 2)
    assert info.scores.shape == (want.iterations, 3, want.num_samples)
    assert info.mean.isfinite().all() and (info.std >= want.min_std).all()
    assert torch.equal(action, info.mean[0])


@pytest.mark.parametrize("greedy", ["median", "mode"])
def test_no_iterations_take_the_actor_s_action(greedy):
    """A search starts at what the actor would do, and so does one that ends there."""
    behavior = dataclasses.replace(TINY.behavior, greedy=greedy)
    agent = random_agent(behavior=behavior)
    action, info = planned(agent, iterations=0)
    want = greedy_action(agent.actor(agent.state.feat), greedy).clamp(-0.9999, 0.9999)
    torch.testing.assert_close(action, want.detach())
    assert (want.abs().max() > 0.99) == (greedy == "mode")  # of a standard deviation of 5
    # each action leads to the state that the next is chosen in
    draw = seeded()
    if greedy == "median":
        torch.randn(3, 3, 2, generator=draw)  # of actions, not used
    noise = torch.randn(3, 3, 4, generator=draw)
    states = open_loop(agent.model.rssm.params(), agent.state, info.mean, noise)
    want = greedy_action(agent.actor(states.feat[:-1]), greedy)
    torch.testing.assert_close(info.mean[1:], want.detach())
    assert info.iterations == 0 and info.scores.shape == (0, 3, 8)
    action, _ = planned(agent, "planet", iterations=0)
    assert (action == 0).all()


def test_the_refit_s_standard_deviation_is_the_one_asked_for(agent):
    sample, population = (
        planned(agent, refit_std=kind, iterations=1)[1] for kind in ("sample", "population")
    )
    assert torch.equal(sample.mean, population.mean)
    torch.testing.assert_close(sample.std, population.std * (3 / 2) ** 0.5)  # of three elites


def test_ties_take_the_first_candidates(agent):
    head = agent.model.reward.layers[-1]
    kept = head.weight.detach().clone()
    with torch.no_grad():
        head.weight.zero_()
    try:
        action, info = planned(agent, "planet", iterations=1, init_std=0.25)
    finally:
        with torch.no_grad():
            head.weight.copy_(kept)
    assert (info.scores == info.scores[0, 0, 0]).all()
    noise = torch.randn(3, 3, 8, 2, generator=seeded())  # [H, B, N, A], drawn first
    torch.testing.assert_close(action, 0.25 * noise[0, :, :3].mean(1))


def test_a_seed_fixes_the_plan_and_nothing_else_does(agent):
    for settings in ({}, {"proposals": 3}, {"warm_start": True}):
        last = torch.zeros(3, 3, 2) if "warm_start" in settings else None
        before = torch.get_rng_state()
        a, b, c = (planned(agent, seed=s, last=last, **settings)[1].mean for s in (0, 0, 1))
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert torch.equal(before, torch.get_rng_state())


def test_fewer_iterations_are_the_first_ones(agent):
    _, many = planned(agent, iterations=4)
    _, few = planned(agent, iterations=2)
    assert torch.equal(many.scores[:2], few.scores)


@pytest.mark.parametrize(("budget", "iterations"), [(0.001, 1), (42, 4), (1e6, 6)])
def test_the_budget_decides_how_many_iterations_fit(agent, monkeypatch, budget, iterations):
    ticks = itertools.count()  # every look at the clock takes 5 ms, two an iteration
    monkeypatch.setattr(planning.time, "perf_counter", lambda: next(ticks) * 0.005)
    action, info = planned(agent, iterations=6, budget_ms=budget)
    assert info.iterations == iterations
    monkeypatch.undo()
    whole, same = planned(agent, iterations=iterations)
    assert torch.equal(action, whole) and torch.equal(info.scores, same.scores)


def test_a_warm_start_goes_on_from_the_last_plan(agent):
    last = torch.linspace(-0.9, 0.9, 18).view(3, 3, 2)
    settings = {"warm_start": True, "warm_iterations": 1, "init_std": 1e-7}
    _, info = planned(agent, last=last, **settings)
    want = torch.cat([last[1:], last[2:]])
    torch.testing.assert_close(info.mean, want, rtol=0, atol=1e-5)
    assert info.iterations == 1
    _, cold = planned(agent, last=None, **settings)  # an episode's first plan
    assert cold.iterations == TINY.plan.iterations
    assert planned(agent, last=last, init_std=1e-7)[1].iterations == TINY.plan.iterations
    with pytest.raises(ValueError, match=r"plan: last must be \[3, 3, 2\], got \[2, 3, 2\]"):
        planned(agent, last=last[:2], **settings)


def test_common_noise_leaves_nothing_but_the_actions_to_tell_candidates_apart(agent):
    alike = {"init_std": 1e-9, "iterations": 1}  # candidates of one action sequence
    for common in (True, False):
        _, info = planned(agent, common_noise=common, **alike)
        spread = info.scores.std(-1)
        assert (spread < 1e-6).all() if common else (spread > 1e-4).all()
    _, info = planned(agent, common_noise=True, iterations=2, init_std=0.5)
    assert (info.scores.std(-1) > 1e-4).all()
    assert (info.scores[0].mean(-1) - info.scores[1].mean(-1)).abs().min() > 1e-5


def test_proposals_are_the_actor_s_rollouts(agent):
    everyone = {"proposals": 8, "num_elites": 8, "iterations": 1}
    a, b = (planned(agent, init_std=std, **everyone)[1] for std in (0.1, 1.0))
    assert torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std)  # nothing else was ranked
    assert not torch.equal(
        *(planned(agent, init_std=std, **everyone | {"proposals": 7})[1].mean for std in (0.1, 1.0))
    )
    actor = constant_actor(0.6, std=1e-6)
    returns = ReturnParams(arms(1.0, 0.5), None, None, 1.0, 1.0)
    config = PlanConfig(
        plan_horizon=3, num_samples=4, num_elites=4, iterations=2, proposals=4, min_std=0.1
    )
    _, info = plan(
        started(0.0, 1.0), linear_model(0.0, 1.0), returns, config,
        actor=actor, score="reward", generator=seeded(),
    )  # fmt: skip
    torch.testing.assert_close(info.mean, torch.full((3, 2, 1), 0.6), rtol=0, atol=1e-4)
    assert (info.std == 0.1).all()
    with pytest.raises(ValueError, match="plan: 4 proposals need an actor"):
        plan(started(0.0), linear_model(0.0, 1.0), returns, config, score="reward")


@pytest.mark.parametrize("backend", BACKENDS)
def test_candidates_that_score_nan_are_never_elite(backend):
    # ∞ · relu(u): infinite for u > 0, NaN (0 · ∞) for the others
    returns = ReturnParams(arms(0.0, inf), None, None, 1.0, 1.0)
    config = PlanConfig(plan_horizon=1, num_samples=40, num_elites=40, iterations=1)
    action, info = plan(
        started(0.0), linear_model(0.0, 1.0), returns, config,
        score="reward", generator=seeded(), backend=backend,
    )  # fmt: skip
    noise = torch.randn(1, 1, 40, 1, generator=seeded()).flatten().clamp(-0.9999, 0.9999)
    assert 0 < info.scores.isnan().sum() < 40
    torch.testing.assert_close(action.item(), noise[noise > 0].mean().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [None, 1e6])
def test_nothing_but_nan_is_an_error_that_names_the_environments(agent, backend, budget):
    lost = State(agent.state.deter.clone(), agent.state.stoch)
    lost.deter[1] = nan
    with (
        use_backend(backend),
        pytest.raises(PlanningError, match=r"NaN in environments \[1\] of 3"),
    ):
        planned(agent, "planet", state=lost, budget_ms=budget)


# ------------------------------------------------------------------ controllers of an agent


@pytest.mark.parametrize("controller", ["actor", "mpc", "planet"])
def test_every_controller_is_the_eager_one_on_the_same_noise(controller):
    settings = PlanConfig(plan_horizon=6, num_samples=20, num_elites=20, iterations=3, proposals=4)
    config = dataclasses.replace(TINY, plan=settings)
    agent = Dreamer(config, {"state": (5,)}, 2)
    obs = np.random.default_rng(0).normal(size=(4, 2, 5)).astype(np.float32)
    found = {}
    for backend in BACKENDS:
        with use_backend(backend):
            state, found[backend] = None, []
            if controller == "planet":
                agent.config = dataclasses.replace(
                    config, plan=dataclasses.replace(settings, proposals=0)
                )
            for t, o in enumerate(obs):
                action, state = agent.act(
                    o, state, controller=controller, noise=0.1, generator=seeded(t)
                )
                found[backend].append(action)
            if controller != "actor":
                assert last_backend("cem") == backend
    np.testing.assert_allclose(found["native"], found["eager"], rtol=0, atol=2e-5)
    assert np.std(found["eager"]) > 1e-3


def test_act_plans_from_the_filtered_state_and_remembers_the_plan(agent):
    obs = np.zeros((2, 5), np.float32)
    action, state = agent.act(obs, controller="mpc", generator=seeded())
    assert state.plan.shape == (3, 2, 2) and (action == state.plan[0].numpy()).all()
    noisy, after = agent.act(obs, state, controller="mpc", noise=0.5, generator=seeded())
    assert (noisy != after.plan[0].numpy()).any() and (noisy == after.action.numpy()).all()
    _, acted = agent.act(obs, after)
    assert acted.plan is None
    with pytest.raises(ConfigError, match="controller must be one of actor, mpc, planet for a dre"):
        agent.act(obs, controller="random")


def planet(**changes):
    return Dreamer(dataclasses.replace(TINY, agent="planet", **changes), {"state": (5,)}, 2)


def test_planet_has_neither_actor_nor_critic_and_learns_its_model():
    agent = planet()
    names = agent.state_dict()
    assert not [n for n in names if n.startswith(("actor", "critic", "target"))]
    same = Dreamer(TINY, {"state": (5,)}, 2).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in names.items())
    optimizers = agent.make_optimizers()
    assert list(optimizers) == ["model"]
    T, B = 6, 3
    batch = {
        "state": torch.randn(T, B, 5, generator=seeded(1)),
        "action": torch.randn(T, B, 2, generator=seeded(2)).clamp(-1, 1),
        "reward": torch.rand(T, B, generator=seeded(3)),
        "is_first": torch.zeros(T, B, dtype=torch.bool),
    }
    losses = [agent.update(batch, optimizers, seeded(4)) for _ in range(30)]
    assert losses[-1]["model_loss"] < losses[0]["model_loss"]
    assert not [name for name in losses[0] if "actor" in name or "critic" in name]
    obs = np.zeros(5, np.float32)
    action, state = agent.act(obs, generator=seeded())
    assert action.shape == (2,) and state.plan is not None
    with pytest.raises(ConfigError, match="controller must be one of planet for a planet agent"):
        agent.act(obs, controller="mpc")
    actions, seen = agent.dream(state, 4, seeded())
    assert actions.shape == (4, 2) and seen["state"].shape == (4, 5)
    np.testing.assert_array_equal(actions[0], action)


@pytest.mark.parametrize(
    ("section", "changes", "says"),
    [
        ("collect", {"controller": "mpc"}, "collect.controller must be 'auto' for planet"),
        ("eval", {"controller": "actor"}, "eval.controller must be 'auto' or 'planet' for planet"),
        ("plan", {"proposals": 1}, "plan.proposals must be 0 for planet"),
        ("plan", {"num_elites": 9}, "plan.num_elites must be <= plan.num_samples = 8"),
        ("plan", {"clip": 1.5}, "plan.clip must be > 0 and <= 1"),
        ("plan", {"budget_ms": 0.0}, "plan.budget_ms must be none or > 0"),
        ("plan", {"iterations": -1}, "plan.iterations must be >= 0"),
    ],
)
def test_settings_that_cannot_run_are_refused(section, changes, says):
    part = dataclasses.replace(getattr(TINY, section), **changes)
    config = dataclasses.replace(TINY, agent="planet", **{section: part})
    with pytest.raises(ConfigError, match=says):
        config.validate()


# --------------------------------------------------------------------------- collection


def test_mixed_collection_alternates():
    collect = dataclasses.replace(TINY.collect, controller="mixed")
    config = dataclasses.replace(TINY, collect=collect)
    assert [collecting_controller(config, k) for k in range(4)] == ["actor", "mpc"] * 2
    assert collecting_controller(TINY, 3) == "auto"


@pytest.mark.parametrize("agent_kind", ["dreamer", "planet"])
def test_a_run_collects_with_its_planner(tmp_path, agent_kind, capfd):
    """Episodes are those that the job's weights, all that planning needs, play with noise."""
    dreamer = agent_kind == "dreamer"
    config = dataclasses.replace(
        TINY,
        agent=agent_kind,
        behavior=dataclasses.replace(TINY.behavior, target_every=7),
        collect=dataclasses.replace(TINY.collect, controller="mixed" if dreamer else "auto"),
        train=dataclasses.replace(TINY.train, frames=200, checkpoint_every=1, keep_checkpoints=99),
        eval=dataclasses.replace(TINY.eval, every=120, controller="mpc" if dreamer else "auto"),
    )
    create_run(tmp_path / "run", config)
    Trainer(tmp_path / "run").train()
    played = {}
    for path in sorted((tmp_path / "run" / "checkpoints").iterdir()):
        tensors, meta = load_checkpoint(path)
        job = meta["cursor"]["job"]
        if job and job["episodes"] and not job["random"]:
            weights = {k[12:]: v for k, v in tensors.items() if k.startswith("job_weights/")}
            played[job["episodes"][0]] = weights, meta
    assert set(played) >= {2, 3}
    env = make_env("walker-walk", obs="state", action_repeat=2, time_limit=1.0)
    for index in (2, 3):
        weights, meta = played[index]
        agent = Policy(config, meta["obs_shapes"], meta["action_dim"])
        agent.load_state_dict(weights)
        seed = episode_seed(config.seed, "collect", index)
        controller = ("actor", "mpc")[index % 2] if dreamer else "planet"
        policy = agent_policy(agent, seed, config.collect.noise, controller, sample=True)
        arrays, _ = collect(env, policy, seed)
        recorded, _ = read_episode(episode_path(tmp_path / "run" / "episodes", index))
        np.testing.assert_array_equal(arrays["action"], recorded["action"])
    loaded = load(tmp_path / "run", plan=PlanConfig(plan_horizon=7))
    assert loaded.config.plan.plan_horizon == 7 and (loaded.actor is not None) == dreamer
