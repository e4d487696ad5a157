"""Playing episodes: seeds, policies, and what an episode starts with."""

import numpy as np
import pytest
import torch

from fastdreamer.agent import Dreamer
from fastdreamer.config import preset
from fastdreamer.envs import make_env
from fastdreamer.play import agent_policy, collect, episode_seed, random_policy, rollout_episode

CONFIG = preset("tiny")
DECISIONS, FRAMES = 20, 40


@pytest.fixture(autouse=True)
def one_thread():
    """Sums depend on the number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    steps = list(rollout_episode(env, random_policy(6, 0), seed=5))
    assert len(steps) == DECISIONS + 1
    obs, action, reward, terminated, frames = steps[0]
    assert np.array_equal(obs["state"], env.reset(seed=5)["state"])
    assert not action.any() and (reward, terminated, frames) == (0.0, False, 0)
    assert sum(frames for *_, frames in steps) == FRAMES
    again = [s[1] for s in rollout_episode(env, random_policy(6, 0), seed=5)]
    assert all(np.array_equal(a, s[1]) for a, s in zip(again, steps, strict=True))
    arrays, _ = collect(env, random_policy(6, 0), 5)
    assert np.array_equal(arrays["action"], np.stack(again))
    assert {k: v.dtype for k, v in arrays.items()} == {
        "state": np.float32, "action": np.float32, "reward": np.float32, "terminated": np.bool_
    }  # fmt: skip
