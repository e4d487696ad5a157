"""Policy: acting in the world and in a dream, with pixels and state."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from fastdreamer.acting.policy import PolicyState, resolve_precision
from fastdreamer.config import ExploreConfig, SafetyConfig, preset
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.nn.dists import greedy_action
from fastdreamer.ops.backend import last_backend, use_backend
from fastdreamer.ops.layers import symexp
from fastdreamer.ops.observe import observe
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.params import State

SHAPES = {"pixels": (64, 64, 3), "state": (5,)}
KINDS = [("pixels",), ("state",), ("pixels", "state")]
A = 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_agent(kinds=("state",), **changes):
    config = dataclasses.replace(preset("tiny"), **changes)
    return Dreamer(config, {kind: SHAPES[kind] for kind in kinds}, A)  # acts in every way


def make_obs(kinds, *lead, seed=0):
    r = np.random.default_rng(seed)
    obs = {
        "pixels": r.integers(0, 256, (*lead, 64, 64, 3), dtype=np.uint8),
        "state": r.normal(size=(*lead, 5)).astype(np.float32),
    }
    return {kind: obs[kind] for kind in kinds}


def test_precision(monkeypatch):
    cpu = torch.device("cpu")
    assert resolve_precision("fp32", cpu) == "fp32" and resolve_precision("bf16", cpu) == "bf16"
    for capability, precision in (((7, 5), "fp32"), ((8, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert resolve_precision("auto", torch.device("cuda")) == precision
    assert resolve_precision("auto", cpu) in ("fp32", "bf16")
    assert make_agent(precision="bf16").precision == "bf16"


# ---------------------------------------------------------------- acting


@pytest.mark.parametrize("kinds", KINDS)
def test_act_on_one_and_on_a_batch(kinds):
    agent = make_agent(kinds)
    single, batch = make_obs(kinds), make_obs(kinds, 4)
    action, state = agent.act(single)
    assert action.shape == (A,) and action.dtype == np.float32 and np.abs(action).max() <= 1
    assert [tuple(x.shape) for x in state[:3]] == [(1, 16), (1, 4), (1, A)] and state.plan is None
    action, state = agent.act(single, state)
    assert action.shape == (A,)

    actions, states = agent.act(batch)
    assert actions.shape == (4, A) and actions.dtype == np.float32
    assert [tuple(x.shape) for x in states[:3]] == [(4, 16), (4, 4), (4, A)]
    actions, states = agent.act(batch, states)
    assert np.isfinite(actions).all() and not states.action.requires_grad
    if len(kinds) == 1:
        bare, _ = agent.act(single[kinds[0]], generator=seeded())
        named, _ = agent.act(single, generator=seeded())
        assert bare.shape == (A,) and (bare == named).all()


@pytest.mark.parametrize("kinds", KINDS)
def test_a_batch_of_one_is_one(kinds):
    agent = make_agent(kinds)
    one, many = None, None
    for t in range(3):
        single = make_obs(kinds, seed=t)
        batch = {kind: x[None] for kind, x in single.items()}
        a, one = agent.act(single, one, noise=0.2, generator=seeded(t))
        b, many = agent.act(batch, many, noise=0.2, generator=seeded(t))
        assert b.shape == (1, A) and (a == b[0]).all()
        assert all(torch.equal(x, y) for x, y in zip(one[:3], many[:3], strict=True))


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("controller", ["actor", "mpc"])
def test_a_row_with_its_own_generator_is_alone(kinds, controller):
    """Native: bit by bit, over several decisions, the images' encoder included."""
    pytest.importorskip("fastdreamer._native")
    agent = make_agent(kinds)
    options = {"controller": controller, "sample": True, "noise": 0.2}
    alone, together, generators = [None] * 3, None, [seeded(i) for i in range(3)]
    own = [seeded(i) for i in range(3)]
    with use_backend("native"):
        for t in range(3):
            obs = make_obs(kinds, 3, seed=t)
            actions, together = agent.act(obs, together, generator=generators, **options)
            for i in range(3):
                single = {kind: x[i] for kind, x in obs.items()}
                action, alone[i] = agent.act(single, alone[i], generator=[own[i]], **options)
                assert (action == actions[i]).all()
                for a, b in zip(alone[i], together.rows([i]), strict=True):
                    assert a is b is None or torch.equal(a, b)
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        agent.act(obs, together, generator=generators[:2])


@pytest.mark.parametrize("part", ["mode", "plan from modes", "plan by the bound", "shield"])
def test_what_libraries_compute_of_a_row_with_its_own_generator_is_of_it_alone(part):
    """In layers so wide that they round a row of a batch otherwise."""
    pytest.importorskip("fastdreamer._native")
    tiny = preset("tiny")
    agent = make_agent(
        model=dataclasses.replace(tiny.model, deter=64, hidden=64, units=64),
        behavior=dataclasses.replace(tiny.behavior, greedy="mode"),
        collect=dataclasses.replace(tiny.collect, controller="mpc"),
        explore=ExploreConfig("ucb", at="plan"),
        safety=SafetyConfig("walker"),
    )
    with torch.no_grad():
        agent.actor.mlp.layers[-1].bias[A:] = -8  # narrow: its modes are not ±1
    state = torch.randn(3, 64, generator=seeded(1)), torch.randn(3, 4, generator=seeded(2))
    proposed, obs = torch.rand(3, A, generator=seeded(3)), make_obs(("state",), 3)["state"]

    def found(rows):
        own, now = [seeded(i) for i in rows], State(*(x[rows] for x in state))
        if part == "mode":
            return agent.act(obs[rows], generator=own)[1].action
        if part == "shield":
            return agent.make_shield().filter(now, proposed[rows], own).margin
        _, info = agent.plan(now, "mpc", explore=part == "plan by the bound", generator=own)
        return torch.cat([x.transpose(0, 1).flatten(1) for x in info[:3]], 1)

    with use_backend("native"):
        together = found([0, 1, 2])
        assert all(torch.equal(together[i], found([i])[0]) for i in range(3))


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("batch", [1, 5])
def test_native_acts_as_eager_does(kinds, batch):
    pytest.importorskip("fastdreamer._native")
    agent, states = make_agent(kinds), {}
    for backend in ("native", "eager"):
        state = None
        with use_backend(backend):
            for t in range(3):
                obs = make_obs(kinds, batch, seed=t)
                _, state = agent.act(obs, state, sample=True, noise=0.1, generator=seeded(t))
            assert last_backend("decide") == backend
        states[backend] = state
    for got, want in zip(states["native"][:3], states["eager"][:3], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_act_follows_its_generator():
    agent, obs = make_agent(), make_obs(("state",))
    first, _ = agent.act(obs, noise=0.3, generator=seeded(1))
    again, _ = agent.act(obs, noise=0.3, generator=seeded(1))
    other, _ = agent.act(obs, noise=0.3, generator=seeded(2))
    assert (first == again).all() and (first != other).any()
    # without one, the agent's own: two agents of one seed agree call by call
    twin = make_agent()
    for _ in range(3):
        assert (agent.act(obs, noise=0.3)[0] == twin.act(obs, noise=0.3)[0]).all()


@pytest.mark.parametrize("greedy", ["median", "mode"])
def test_act_filters_then_takes_the_actor_s_action(greedy):
    behavior = dataclasses.replace(preset("tiny").behavior, greedy=greedy)
    agent = make_agent(("pixels", "state"), behavior=behavior)
    obs = make_obs(("pixels", "state"), 2)
    state = PolicyState(torch.randn(2, 16), torch.randn(2, 4), torch.rand(2, A))
    action, new = agent.act(obs, state, generator=seeded(3))
    with torch.no_grad():
        embed = agent.model.encoder({kind: torch.from_numpy(x)[None] for kind, x in obs.items()})
        seen = observe(
            agent.model.rssm.params(),
            State(state.deter, state.stoch),
            embed,
            state.action[None],
            torch.zeros(1, 2, dtype=torch.bool),
            torch.randn(1, 2, 4, generator=seeded(3)),
        ).state
        want = greedy_action(agent.actor(seen.feat[0]), greedy)
        assert torch.equal(want, torch.tanh(agent.actor(seen.feat[0]).mean)) == (greedy == "median")
    torch.testing.assert_close(new, PolicyState(seen.deter[0], seen.stoch[0], want))
    np.testing.assert_array_equal(action, new.action.numpy())
    start = agent.initial_state(2)
    assert not any(x.any() for x in start[:3])
    a, _ = agent.act(obs, start, generator=seeded())
    b, _ = agent.act(obs, None, generator=seeded())
    assert (a == b).all()


def test_the_noisy_clipped_action_is_what_the_filter_sees():
    """Trap 2: what is returned, and so stored and executed, is what the state holds."""
    agent, obs = make_agent(), make_obs(("state",), 200)
    clean, quiet = agent.act(obs, generator=seeded(1))
    noisy, state = agent.act(obs, noise=0.7, generator=seeded(1))
    draw = seeded(1)
    torch.randn(200, 4, generator=draw)  # the posterior sample
    raw = clean + 0.7 * torch.randn(200, A, generator=draw).numpy()
    assert (np.abs(raw) > 1).any() and (np.abs(raw) < 1).any()
    np.testing.assert_allclose(noisy, np.clip(raw, -1, 1), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(state.action.numpy(), noisy)
    assert torch.equal(state.deter, quiet.deter) and torch.equal(state.stoch, quiet.stoch)
    # and so the next latent state depends on it
    _, after_clean = agent.act(obs, quiet, generator=seeded(2))
    _, after_noisy = agent.act(obs, state, generator=seeded(2))
    assert (after_clean.deter != after_noisy.deter).any(-1).all()


def test_a_sample_then_the_noise_then_the_clip():
    """Both sources: a draw of the tanh-Normal, then N(0, noise), clipped, and so remembered."""
    agent, obs = make_agent(), make_obs(("state",), 200)
    _, state = agent.act(obs, generator=seeded(1))
    noisy, after = agent.act(obs, sample=True, noise=0.3, generator=seeded(1))
    draw = seeded(1)
    torch.randn(200, 4, generator=draw)  # the posterior sample
    epsilon, noise = (torch.randn(200, A, generator=draw) for _ in range(2))
    with torch.no_grad():
        dist = agent.actor(torch.cat([state.deter, state.stoch], -1))
    want = (torch.tanh(dist.mean + dist.std * epsilon) + 0.3 * noise).clamp(-1, 1)
    torch.testing.assert_close(after.action, want)
    np.testing.assert_array_equal(noisy, after.action.numpy())
    # at the start, with a standard deviation of 5, that is nearly bang-bang; tanh(mean) is near 0
    sampled, _ = agent.act(obs, sample=True, generator=seeded(1))
    assert (np.abs(sampled) > 0.9).mean() > 0.5 and np.abs(np.tanh(dist.mean.numpy())).max() < 0.5


def test_a_plan_is_no_sample():
    agent, obs = make_agent(), make_obs(("state",), 2)
    planned = [
        agent.act(obs, controller="mpc", sample=sample, noise=0.3, generator=seeded(1))[0]
        for sample in (False, True)
    ]
    assert (planned[0] == planned[1]).all()


def test_the_caller_owns_the_action():
    """Scaling or shielding the array in place must not reach into the filter's memory."""
    agent = make_agent()
    action, state = agent.act(make_obs(("state",)))
    kept = state.action.clone()
    action += 1
    assert torch.equal(state.action, kept)


def test_act_takes_what_environments_and_replay_give():
    agent, obs = make_agent(("pixels",)), make_obs(("pixels",))["pixels"]
    want, _ = agent.act(obs, generator=seeded())
    frozen = obs.copy()
    frozen.flags.writeable = False  # a memory-mapped frame
    flipped = obs[::-1].copy()[::-1]  # a renderer's bottom-up frame: negative strides
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (frozen, flipped, torch.from_numpy(obs)):
            assert (agent.act(x, generator=seeded())[0] == want).all()
    agent, state = make_agent(), make_obs(("state",))["state"]
    double, _ = agent.act(state.astype(np.float64), generator=seeded())
    assert (double == agent.act(state, generator=seeded())[0]).all()


@pytest.mark.parametrize(
    ("kinds", "obs", "message"),
    [
        (("state",), np.zeros(4, np.float32), r"act: state must be \[5\] or \[B, 5\], got \[4\]"),
        (("state",), np.zeros((1, 1, 5)), r"act: state must be .*, got \[1, 1, 5\]"),
        (("state",), {"pixels": 0}, "act: obs lacks 'state', got pixels"),
        (("pixels",), np.zeros((64, 64, 3)), "act: pixels must be uint8, got float64"),
        (("pixels",), np.zeros((3, 64, 64), np.uint8), r"\[64, 64, 3\].*, got \[3, 64, 64\]"),
        (("pixels", "state"), np.zeros(5), "act: obs must be a dict with pixels and state"),
        (
            ("pixels", "state"),
            {"pixels": np.zeros((2, 64, 64, 3), np.uint8), "state": np.zeros((3, 5))},
            "act: pixels and state differ in their batch size",
        ),
        (
            ("pixels", "state"),
            {"pixels": np.zeros((1, 64, 64, 3), np.uint8), "state": np.zeros(5)},
            "act: pixels and state differ in their batch size",
        ),
    ],
)
def test_an_observation_that_does_not_fit(kinds, obs, message):
    with pytest.raises(ValueError, match=message):
        make_agent(kinds).act(obs)


def test_a_state_that_does_not_fit():
    agent = make_agent()
    with pytest.raises(ValueError, match="act: a batch of 3 observations, 2 states"):
        agent.act(make_obs(("state",), 3), agent.initial_state(2))


# ---------------------------------------------------------------- dreaming


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("horizon", [1, 4])
def test_dream(kinds, horizon):
    agent = make_agent(kinds)
    _, state = agent.act(make_obs(kinds))
    action, seen = agent.dream(state, horizon, seeded(1))
    assert action.shape == (horizon, A) and np.abs(action).max() <= 1
    np.testing.assert_array_equal(action[0], state.action[0].numpy())
    assert {kind: x.shape for kind, x in seen.items()} == {
        kind: (horizon, *SHAPES[kind]) for kind in kinds
    }
    assert all(x.dtype == (np.uint8 if k == "pixels" else np.float32) for k, x in seen.items())
    again, _ = agent.dream(state, horizon, seeded(1))
    assert (action == again).all()
    if horizon > 1:
        assert (agent.dream(state, horizon, seeded(2))[0] != action).any()


def test_a_dream_s_actions_lead_to_what_it_shows():
    agent = make_agent()
    _, state = agent.act(make_obs(("state",)))
    action, seen = agent.dream(state, 5, seeded(1))
    noise = torch.randn(5, 1, 4, generator=seeded(1))
    with torch.no_grad():
        states = open_loop(
            agent.model.rssm.params(),
            State(state.deter, state.stoch),
            torch.from_numpy(action)[:, None],
            noise,
        )
        want = symexp(agent.model.decoder(states.feat[:, 0])["state"])
    np.testing.assert_allclose(seen["state"], want.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kinds", KINDS)
def test_predict_watches_then_goes_by_the_actions_alone(kinds):
    agent, T, watched = make_agent(kinds), 6, 2
    obs = make_obs(kinds, T, 3)
    batch = {kind: torch.from_numpy(x) for kind, x in obs.items()}
    batch["action"] = torch.rand(T, 3, A, generator=seeded(5)) * 2 - 1
    batch["is_first"] = torch.zeros(T, 3, dtype=torch.bool)
    batch["is_first"][0] = batch["is_first"][1, 2] = True
    seen = agent.predict(batch, watched, seeded(1))
    assert {k: x.shape for k, x in seen.items()} == {k: (T, 3, *SHAPES[k]) for k in kinds}
    # what comes behind the context is not looked at, its actions are
    other = {k: x.clone() for k, x in batch.items()}
    for kind in kinds:
        other[kind][watched:] = 0
    again = agent.predict(other, watched, seeded(1))
    assert all((seen[k] == again[k]).all() for k in kinds)
    other["action"][watched] += 0.5
    moved = agent.predict(other, watched, seeded(1))
    assert all((seen[k][:watched] == moved[k][:watched]).all() for k in kinds)
    if "state" in kinds:
        assert (seen["state"][watched] != moved["state"][watched]).any()
    if kinds == ("state",):  # the whole of it, written out
        noise = torch.randn(T, 3, 4, generator=seeded(1))
        with torch.no_grad():
            rssm = agent.model.rssm
            embed = agent.model.encoder({"state": batch["state"][:watched]})
            given = batch["action"][:watched], batch["is_first"][:watched], noise[:watched]
            state = observe(rssm.params(), rssm.initial(3), embed, *given).state
            last = State(state.deter[-1], state.stoch[-1])
            ahead = open_loop(rssm.params(), last, batch["action"][watched:], noise[watched:])
            want = symexp(agent.model.decoder(ahead.feat)["state"])
        np.testing.assert_allclose(seen["state"][watched:], want.numpy(), rtol=1e-5, atol=1e-6)
    batch["is_first"][4, 1] = True
    for context in (2, 0, 6):
        with pytest.raises(ValueError, match=f"predict: {context} of 6 steps watched"):
            agent.predict(batch, context)


def test_a_dream_needs_one_environment_and_a_horizon():
    agent = make_agent()
    with pytest.raises(ValueError, match="dream: 0 decisions of 1 environments"):
        agent.dream(agent.initial_state(1), 0)
    with pytest.raises(ValueError, match="dream: 3 decisions of 2 environments"):
        agent.dream(agent.initial_state(2), 3)
