"""Playing episodes: seeds, policies, and what an episode starts with."""

import dataclasses
import functools
import threading

import numpy as np
import pytest
import torch

from fastdreamer.acting import play
from fastdreamer.acting.play import (
    Lanes,
    agent_policy,
    collect,
    collect_together,
    episode_seed,
    episode_steps,
    evaluate,
    evaluate_together,
    more_envs,
    random_policy,
)
from fastdreamer.config import preset
from fastdreamer.envs import make_env
from fastdreamer.errors import ArgumentError
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.ops.backend import use_backend

CONFIG = preset("tiny")
DECISIONS, FRAMES = 20, 40


@pytest.fixture(scope="module")
def agent():
    return Dreamer(CONFIG, {"state": (24,)}, 6)


@pytest.fixture
def env():
    return make_env("walker-walk", obs="state", action_repeat=2, time_limit=1.0)


def test_seeds_differ_by_run_purpose_and_index():
    seeds = {
        episode_seed(run, purpose, index)
        for run in (0, 1, 2**40)
        for purpose in ("collect", "evaluate")
        for index in range(50)
    }
    assert len(seeds) == 300
    assert episode_seed(1, "collect", 2) == episode_seed(1, "collect", 2)
    with pytest.raises(ArgumentError, match="seed must be >= 0, got -1"):
        episode_seed(-1, "evaluate", 0)
    with pytest.raises(KeyError):
        episode_seed(0, "play", 0)


def test_random_policy_is_uniform_and_seeded():
    draw = lambda seed: np.stack([random_policy(6, seed)({}) for _ in range(1)])  # noqa: E731
    assert np.array_equal(draw(1), draw(1)) and not np.array_equal(draw(1), draw(2))
    policy = random_policy(6, 0)
    actions = np.stack([policy({}) for _ in range(2000)])
    assert actions.dtype == np.float32 and np.abs(actions).max() <= 1
    assert np.abs(actions.mean()) < 0.02 and actions.std() == pytest.approx(1 / 3**0.5, abs=0.01)


def test_agent_policy_noise_is_seeded_and_zero_noise_is_the_mean(agent):
    obs = {"state": np.linspace(-1, 1, 24, dtype=np.float32)}
    first = lambda seed, noise: agent_policy(agent, seed, noise)(obs)  # noqa: E731
    assert np.array_equal(first(1, 0.3), first(1, 0.3))
    assert not np.array_equal(first(1, 0.3), first(2, 0.3))
    assert np.array_equal(
        first(1, 0.0), agent.act(obs, generator=torch.Generator().manual_seed(1))[0]
    )
    assert np.abs(first(1, 100.0)).max() == 1  # clipped


def test_agent_policy_samples_where_it_is_to(agent):
    obs = {"state": np.linspace(-1, 1, 24, dtype=np.float32)}
    generator = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    drawn, _ = agent.act(obs, sample=True, noise=0.3, generator=generator())
    assert np.array_equal(agent_policy(agent, 1, 0.3, sample=True)(obs), drawn)
    assert not np.array_equal(agent_policy(agent, 1, 0.3)(obs), drawn)


def test_an_episode_starts_with_its_reset(env):
    steps = list(episode_steps(env, random_policy(6, 0), seed=5))
    assert len(steps) == DECISIONS + 1
    obs, action, reward, terminated, frames = steps[0]
    assert np.array_equal(obs["state"], env.reset(seed=5)["state"])
    assert not action.any() and (reward, terminated, frames) == (0.0, False, 0)
    assert sum(frames for *_, frames in steps) == FRAMES
    again = [s[1] for s in episode_steps(env, random_policy(6, 0), seed=5)]
    assert all(np.array_equal(a, s[1]) for a, s in zip(again, steps, strict=True))
    arrays, _ = collect(env, random_policy(6, 0), 5)
    assert np.array_equal(arrays["action"], np.stack(again))
    assert {k: v.dtype for k, v in arrays.items()} == {
        "state": np.float32, "action": np.float32, "reward": np.float32, "terminated": np.bool_
    }  # fmt: skip


# ---------------------------------------------------------------- side by side


class Short:
    """An environment whose episode ends after some decisions of its own."""

    def __init__(self, env, decisions):
        self._env, self._decisions = env, decisions

    def __getattr__(self, name):
        return getattr(self._env, name)

    def reset(self, seed=None):
        self._left = self._decisions
        return self._env.reset(seed=seed)

    def step(self, action):
        self._left -= 1
        obs, reward, terminated, truncated, frames = self._env.step(action)
        return obs, reward, terminated or not self._left, truncated, frames


def play_alone(agent, env, seed, **options):
    """An episode by act on one observation at a time, and what its watch is told."""
    policy = agent_policy(agent, seed, 0.0, **options)
    return [
        (t, obs["state"].tolist(), action.tolist(), reward)
        for t, (obs, action, reward, *_) in enumerate(episode_steps(env, policy, seed))
    ]


@pytest.mark.parametrize("controller", ["actor", "mpc", "planet"])
def test_episodes_side_by_side_are_those_alone(controller):
    pytest.importorskip("fastdreamer._native")
    plan = dataclasses.replace(CONFIG.plan, warm_start=True, warm_iterations=1)
    agent = Dreamer(dataclasses.replace(CONFIG, plan=plan), {"state": (24,)}, 6)
    envs = more_envs([], CONFIG, 4)
    lengths, seeds = [5, DECISIONS, 1, 9], [7, 3, 8, 1, 5, 2]
    short = [Short(env, n) for env, n in zip(envs, lengths, strict=True)]
    told = [[] for _ in seeds]

    def watch(i):
        return lambda t, obs, action, reward: told[i].append(
            (t, obs["state"].tolist(), action.tolist(), reward)
        )

    with use_backend("native"):
        returns = evaluate_together(
            agent, short, seeds, controller=controller, watches=[watch(i) for i in range(6)]
        )
        for i, seed in enumerate(seeds):
            env = short[i % 4]
            assert told[i] == play_alone(agent, env, seed, controller=controller)
            assert len(told[i]) == lengths[i % 4] + 1
            # From Python 3.12 on sum() makes up for rounding, which adding one by one does not.
            assert returns[i] == pytest.approx(sum(step[-1] for step in told[i]), rel=1e-12)
            assert returns[i] == evaluate(agent, env, seed, controller=controller)


def counts(shield):
    return shield.decisions, shield.changed, shield.failed


def test_a_shield_side_by_side():
    pytest.importorskip("fastdreamer._native")
    config = dataclasses.replace(
        CONFIG, safety=dataclasses.replace(CONFIG.safety, signal="walker", shield_samples=8)
    )
    agent = Dreamer(config, {"state": (24,)}, 6)
    with torch.no_grad():
        agent.guard.barrier.layers[-1].weight.mul_(30)
    envs, seeds = more_envs([], config, 3), [1, 2, 3]
    together, alone = agent.make_shield(), agent.make_shield()
    each = [agent.make_shield() for _ in seeds]
    with use_backend("native"):
        returns = evaluate_together(agent, envs, seeds, shield=together)
        assert returns == [evaluate(agent, envs[0], seed, shield=alone) for seed in seeds]
        collect_together(agent, [Short(e, 5) for e in envs], seeds, noise=0.3, shields=each)
        for seed, counted in zip(seeds, each, strict=True):
            own = agent.make_shield()
            collect(Short(envs[0], 5), agent_policy(agent, seed, 0.3, shield=own), seed)
            assert counts(counted) == counts(own)
    assert counts(together) == counts(alone) and 0 < together.changed < together.decisions


@pytest.mark.parametrize("controller", ["actor", "mpc"])
@pytest.mark.parametrize("lanes", [1, 3])
def test_episodes_collected_side_by_side_are_those_alone(controller, lanes, agent):
    pytest.importorskip("fastdreamer._native")
    envs, seeds = more_envs([], CONFIG, 4), [7, 3, 8, 1]
    short = [Short(env, n) for env, n in zip(envs, [5, DECISIONS, 1, 9], strict=True)]
    how = {"controller": controller, "sample": True, "noise": 0.3}
    told = [[] for _ in seeds]
    watches = [lambda *step, seen=seen: seen.append(step[0]) for seen in told]
    with use_backend("native"):
        together = collect_together(agent, short, seeds, **how, watches=watches, lanes=Lanes(lanes))
        for i, (arrays, frames) in enumerate(together):
            policy = agent_policy(agent, seeds[i], 0.3, controller, sample=True)
            alone, same = collect(short[i], policy, seeds[i])
            assert frames == same and arrays.keys() == alone.keys()
            assert all(arrays[k].tobytes() == alone[k].tobytes() for k in alone)
            assert {k: a.dtype for k, a in arrays.items()} == {k: a.dtype for k, a in alone.items()}
            assert told[i] == list(range(len(alone["reward"])))


def test_an_environment_keeps_its_lane_and_its_place():
    lanes, threads = Lanes(2), {}

    def call(i):
        threads.setdefault(i, set()).add(threading.get_ident())
        if i == 4:
            raise ValueError("4 fell")
        return 10 * i

    calls = lambda *numbers: {i: functools.partial(call, i) for i in numbers}  # noqa: E731
    for numbers in ([0, 1, 2, 3], [3, 0], [2], [1]):
        assert lanes(calls(*numbers)) == [10 * i for i in numbers]
    assert threads[0] == threads[2] == {threading.get_ident()}
    assert threads[1] == threads[3] and len(threads[1] | threads[0]) == 2
    with pytest.raises(ValueError, match="4 fell"):
        lanes(calls(1, 4))
    assert lanes({}) == []


def test_eager_s_episodes_side_by_side(agent):
    """Equal up to what a library makes of a row: the first decisions, before it grows."""
    envs, seeds = more_envs([], CONFIG, 3), [1, 2, 3]
    short = [Short(env, 3) for env in envs]
    with use_backend("eager"):
        returns = evaluate_together(agent, short, seeds)
        alone = [evaluate(agent, short[0], seed) for seed in seeds]
    np.testing.assert_allclose(returns, alone, rtol=1e-3)


def test_environments_are_made_once(monkeypatch):
    monkeypatch.setattr(play, "config_env", lambda config: object())
    envs = []
    first = more_envs(envs, CONFIG, 2)
    assert len(first) == 2 and more_envs(envs, CONFIG, 1) == first[:1]
    assert more_envs(envs, CONFIG, 3)[:2] == first == envs[:2] and len(envs) == 3
