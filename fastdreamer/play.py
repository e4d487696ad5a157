"""Playing episodes: who acts in an environment, what is seen, and what it returns.

An episode is a function of its seed and the weights, wherever it is played.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdreamer.config import Config
from fastdreamer.device import resolve_device
from fastdreamer.envs import make_env
from fastdreamer.ops.backend import use_backend
from fastdreamer.policy import Policy
from fastdreamer.safety import Shield
from fastdreamer.viz.video import write_video

Act = Callable[[dict[str, np.ndarray]], np.ndarray]
"""Chooses an action on an observation."""
Watch = Callable[[int, dict[str, np.ndarray], np.ndarray, float], None]
"""Looks on at an episode: called with t, the observation, the action that led to it, its reward."""


def config_env(config: Config) -> Any:
    """The environment that a configuration describes."""
    return make_env(
        config.env.task,
        obs=config.env.obs,
        action_repeat=config.env.action_repeat,
        seed=config.seed,
        time_limit=config.env.time_limit,
        image_size=config.env.image_size,
        render_quality=config.env.render_quality,
    )


def on_cpu(config: Config) -> Config:
    """The learner's settings for whoever plays; what a GPU is told is no advice to a CPU."""
    if resolve_device(config.device, config.backend) == "cpu":
        return replace(config, device="cpu")
    backend = "auto" if config.backend == "triton" else config.backend
    return replace(config, device="cpu", precision="auto", backend=backend)


def run_backend(config: Config) -> contextlib.AbstractContextManager[None]:
    """The backend that a run names; with ``auto`` the environment's, where that names one."""
    return contextlib.nullcontext() if config.backend == "auto" else use_backend(config.backend)


def rollout_episode(
    env: Any, policy: Act, seed: int
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, float, bool, int]]:
    """Play one episode; yield (obs, action that led to it, reward, terminated, env_frames).

    The first item is the reset: zero action, zero reward, zero frames.
    """
    obs = env.reset(seed=seed)
    yield obs, np.zeros(env.action_dim, np.float32), 0.0, False, 0
    done = False
    while not done:
        action = policy(obs)
        obs, reward, terminated, truncated, frames = env.step(action)
        done = terminated or truncated
        yield obs, action, reward, terminated, frames


def episode_seed(seed: int, purpose: str, index: int) -> int:
    """A seed for one episode, a function of the run's seed, the purpose and the index."""
    kind = {"collect": 0, "evaluate": 1}[purpose]
    return int(np.random.SeedSequence([seed, kind, index]).generate_state(1)[0])


def random_policy(action_dim: int, seed: int) -> Act:
    """Uniform actions in [-1, 1]."""
    rng = np.random.default_rng(seed)
    return lambda obs: rng.uniform(-1, 1, action_dim).astype(np.float32)


def agent_policy(
    agent: Policy,
    seed: int,
    noise: float,
    controller: str | None = None,
    *,
    sample: bool = False,
    explore: bool = False,
    shield: Shield | None = None,
) -> Act:
    """The agent with exploration noise (0: none), for one episode; see ``Policy.act``."""
    generator = torch.Generator().manual_seed(seed)
    state = None

    def policy(obs: dict[str, np.ndarray]) -> np.ndarray:
        nonlocal state
        action, state = agent.act(
            obs,
            state,
            controller=controller,
            sample=sample,
            noise=noise,
            explore=explore,
            shield=shield,
            generator=generator,
        )
        return action

    return policy


def collect(
    env: Any,
    policy: Act,
    seed: int,
    watch: Watch | None = None,
) -> tuple[dict[str, np.ndarray], int]:
    """Play one episode for replay.

    Returns:
        Its arrays (see ``episodes.write_episode``) and its env frames.
    """
    steps: list[dict[str, Any]] = []
    env_frames = 0
    for t, step in enumerate(rollout_episode(env, policy, seed)):
        obs, action, reward, terminated, frames = step
        env_frames += frames
        if watch is not None:
            watch(t, obs, action, reward)
        steps.append({**obs, "action": action, "reward": np.float32(reward),
                      "terminated": np.bool_(terminated)})  # fmt: skip
    return {key: np.stack([step[key] for step in steps]) for key in steps[0]}, env_frames


class Recorder:
    """A Watch that keeps what it sees, episode by episode."""

    def __init__(self) -> None:
        self._steps: list[list[dict[str, Any]]] = []

    def __call__(
        self, t: int, obs: dict[str, np.ndarray], action: np.ndarray, reward: float
    ) -> None:
        """See one step; t = 0 starts an episode."""
        if t == 0:
            self._steps.append([])
        self._steps[-1].append({**obs, "action": action, "reward": np.float32(reward)})

    def episodes(self) -> list[dict[str, np.ndarray]]:
        """The arrays of every episode, time first."""
        return [{k: np.stack([s[k] for s in steps]) for k in steps[0]} for steps in self._steps]


def evaluate(
    agent: Policy,
    env: Any,
    seed: int,
    video: Path | None = None,
    controller: str | None = None,
    *,
    shield: Shield | None = None,
    watch: Watch | None = None,
) -> float:
    """Return of one episode without any sampled action or exploration noise; optionally write a
    video of it."""
    images, total = [], 0.0
    policy = agent_policy(agent, seed, 0.0, controller, shield=shield)
    for t, (obs, action, reward, _, _) in enumerate(rollout_episode(env, policy, seed)):
        total += reward
        if watch is not None:
            watch(t, obs, action, reward)
        if video is not None and t % 2 == 0:
            images.append(env.render(height=240, width=320))
    if video is not None:
        write_video(video, images, fps=1 / (2 * env.decision_seconds))
    return total
