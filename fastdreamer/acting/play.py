"""Playing episodes: who acts in an environment, what is seen, and what it returns.

An episode is a function of its seed and the weights, wherever it is played.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from fastdreamer.acting.planning import PLANNERS
from fastdreamer.acting.policy import Policy, PolicyState
from fastdreamer.acting.shield import Shield, Shields
from fastdreamer.config import Config
from fastdreamer.envs import make_env
from fastdreamer.errors import ArgumentError
from fastdreamer.machine.device import resolve_device
from fastdreamer.ops.backend import use_backend
from fastdreamer.video import check_video, write_video

Act = Callable[[dict[str, np.ndarray]], np.ndarray]
"""Chooses an action on an observation."""
Watch = Callable[[int, dict[str, np.ndarray], np.ndarray, float], None]
"""Looks on at an episode: called with t, the observation, the action that led to it, its reward."""

TOGETHER = 10
"""Episodes evaluated side by side at most: an environment from pixels takes about 45 MB."""

_T = TypeVar("_T")


def config_env(config: Config) -> Any:
    """The environment that a configuration describes."""
    return make_env(
        config.env.task,
        obs=config.env.obs,
        action_repeat=config.env.action_repeat,
        seed=config.seed,
        time_limit=config.env.time_limit,
        image_size=config.env.image_size,
        render=config.env.render,
        render_quality=config.env.render_quality,
    )


def more_envs(envs: list[Any], config: Config, count: int) -> list[Any]:
    """The first so many of them, made where they lack."""
    while len(envs) < count:
        envs.append(config_env(config))
    return envs[:count]


def at_once(config: Config, controller: str | None, episodes: int) -> int:
    """How many episodes are evaluated side by side: of a plan by the clock, whose time is meant for
    one environment, one after the other."""
    plans = config.agent == "planet" or controller in PLANNERS
    return 1 if plans and config.plan.budget_ms is not None else min(episodes, TOGETHER)


def on_cpu(config: Config) -> Config:
    """The learner's settings for whoever plays; what a GPU is told is no advice to a CPU."""
    if resolve_device(config.device, config.backend) == "cpu":
        return replace(config, device="cpu")
    backend = "auto" if config.backend == "triton" else config.backend
    return replace(config, device="cpu", precision="auto", backend=backend)


def run_backend(config: Config) -> contextlib.AbstractContextManager[None]:
    """The backend that a run names; with ``auto`` the environment's, where that names one."""
    return contextlib.nullcontext() if config.backend == "auto" else use_backend(config.backend)


def episode_steps(
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
    if seed < 0:
        raise ArgumentError(f"seed must be >= 0, got {seed}")
    kind = {"collect": 0, "evaluate": 1}[purpose]
    return int(np.random.SeedSequence([seed, kind, index]).generate_state(1)[0])


def random_policy(action_dim: int, seed: int | tuple[int, ...]) -> Act:
    """Uniform actions in [-1, 1], drawn from ``numpy.random.default_rng(seed)``."""
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
    settings = {"controller": controller, "sample": sample, "noise": noise, "explore": explore}
    generator = torch.Generator().manual_seed(seed)
    act = partial(agent.act, **settings, shield=shield, generator=generator)
    state = None

    def policy(obs: dict[str, np.ndarray]) -> np.ndarray:
        nonlocal state
        action, state = act(obs, state)
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
    for t, step in enumerate(episode_steps(env, policy, seed)):
        obs, action, reward, terminated, frames = step
        env_frames += frames
        if watch is not None:
            watch(t, obs, action, reward)
        steps.append(_recorded(obs, action, reward, terminated))
    return _arrays(steps), env_frames


def collect_together(
    agent: Policy,
    envs: Sequence[Any],
    seeds: Sequence[int],
    *,
    controller: str | None = None,
    sample: bool = False,
    noise: float = 0.0,
    explore: bool = False,
    shields: Sequence[Shield] = (),
    watches: Sequence[Watch] = (),
    lanes: Lanes | None = None,
) -> list[tuple[dict[str, np.ndarray], int]]:
    """Play episodes for replay side by side: one decision is one batch of those that still run.

    What ``evaluate_together`` says of an episode beside others holds.

    Args:
        envs: environments of the agent's task, at least as many as seeds.
        seeds: of the episodes; an episode draws from its own what it would draw alone.
        controller, sample, noise, explore: see ``Policy.act``.
        shields: one an episode, or none. watches: likewise.
        lanes: threads to step in; None: the caller's alone.

    Returns:
        Of each its arrays and its env frames, as ``collect``.
    """
    settings = {"controller": controller, "sample": sample, "noise": noise, "explore": explore}
    steps: list[list[dict[str, Any]]] = [[] for _ in seeds]
    env_frames = [0] * len(seeds)

    def act(*given: Any, rows: list[int], generator: list[torch.Generator]) -> Any:
        shield = Shields([shields[i] for i in rows]) if shields else None
        return agent.act(*given, **settings, shield=shield, generator=generator)

    def see(i: int, t: int, obs: Any, action: Any, reward: float, end: bool, frames: int) -> None:
        env_frames[i] += frames
        if watches:
            watches[i](t, obs, action, reward)
        steps[i].append(_recorded(obs, action, reward, end))

    _play(act, envs, seeds, see, lanes or Lanes())
    return [(_arrays(each), frames) for each, frames in zip(steps, env_frames, strict=True)]


def _recorded(
    obs: dict[str, np.ndarray], action: np.ndarray, reward: float, terminated: bool
) -> dict[str, Any]:
    """A step as replay has it."""
    return {**obs, "action": action, "reward": np.float32(reward),
            "terminated": np.bool_(terminated)}  # fmt: skip


def _arrays(steps: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {key: np.stack([step[key] for step in steps]) for key in steps[0]}


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
        return [_arrays(steps) for steps in self._steps]


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
    watches = [] if watch is None else [watch]
    (total,) = evaluate_together(
        agent, [env], [seed], video, controller, shield=shield, watches=watches
    )
    return total


def evaluate_together(
    agent: Policy,
    envs: Sequence[Any],
    seeds: Sequence[int],
    video: Path | None = None,
    controller: str | None = None,
    *,
    shield: Shield | None = None,
    watches: Sequence[Watch] = (),
    lanes: Lanes | None = None,
) -> list[float]:
    """Returns of episodes like ``evaluate``'s, side by side: one decision is one batch of all.

    An episode is a function of its seed and the weights: its environment and its generator are its
    own. Where the ops run native it is the same, bit by bit, beside whatever others (but for plans
    in bfloat16 on AMX, of which a call of 16 rows rounds as one of fewer does not); elsewhere the
    libraries round a row by what is beside it, and a chaotic task makes that another episode.

    Args:
        envs: environments of the agent's task, as many as episodes are played at once.
        seeds: of the episodes.
        video: where to write one of the first.
        watches: one an episode, or none.
        lanes: threads to step in; None: the caller's alone.
    """
    returns: list[float] = []
    for first in range(0, len(seeds), len(envs)):
        part = slice(first, first + len(envs))
        act = partial(agent.act, controller=controller, shield=shield)
        returns += _evaluate(
            act, envs, seeds[part], None if first else video, watches[part], lanes or Lanes()
        )
    return returns


def _evaluate(
    choose: Callable[..., tuple[np.ndarray, PolicyState]],
    envs: Sequence[Any],
    seeds: Sequence[int],
    video: Path | None,
    watches: Sequence[Watch],
    lanes: Lanes,
) -> list[float]:
    if video is not None:  # before what may take an hour is played
        check_video(video)
    images: list[np.ndarray] = []
    totals = [0.0] * len(seeds)

    def act(*given: Any, rows: list[int], generator: list[torch.Generator]) -> Any:
        return choose(*given, generator=generator)

    def see(i: int, t: int, obs: Any, action: Any, reward: float, end: bool, frames: int) -> None:
        totals[i] += reward
        if watches:
            watches[i](t, obs, action, reward)
        if video is not None and i == 0 and t % 2 == 0:
            images.append(envs[0].render(height=240, width=320))

    _play(act, envs, seeds, see, lanes)
    if video is not None:
        envs[0].end_video()
        write_video(video, images, fps=1 / (2 * envs[0].decision_seconds))
    return totals


class Lanes:
    """Threads that environments step in side by side, each always in the same one.

    The simulator and the renderer leave Python to others while they compute, and what has been
    drawn with belongs to the thread that drew. The first lane is the caller's own thread.

    count: of lanes, at least 1.
    """

    def __init__(self, count: int = 1) -> None:
        self._others = [ThreadPoolExecutor(1, "fastdreamer-lane") for _ in range(count - 1)]

    def __call__(self, calls: Mapping[int, Callable[[], _T]]) -> list[_T]:
        """Call them, each in the lane of its environment's number; what they return, in order."""
        lanes: list[dict[int, Callable[[], _T]]] = [{} for _ in range(1 + len(self._others))]
        for i, call in calls.items():
            lanes[i % len(lanes)][i] = call
        own, *others = lanes
        going = [
            pool.submit(_called, lane)
            for pool, lane in zip(self._others, others, strict=True)
            if lane
        ]
        done = _called(own)
        for one in going:
            done |= one.result()
        return [done[i] for i in calls]


def _called(calls: Mapping[int, Callable[[], _T]]) -> dict[int, _T]:
    return {i: call() for i, call in calls.items()}


def _play(
    act: Callable[..., tuple[np.ndarray, PolicyState]],
    envs: Sequence[Any],
    seeds: Sequence[int],
    see: Callable[..., None],
    lanes: Lanes,
) -> None:
    """One episode in each of the first environments, until the last is over.

    Args:
        act: called with a batch of observations, the last state of those that still run, the
            numbers of these as ``rows``, and a generator of each; returns their actions and state.
        see: called with the number of an episode, t, and what ``episode_steps`` yields.
    """
    # In turn: the first images make GL contexts, which share what libraries keep for a process.
    resets = [{i: partial(envs[i].reset, seed=seed)} for i, seed in enumerate(seeds)]
    seen = [obs for reset in resets for obs in lanes(reset)]
    for i, obs in enumerate(seen):
        see(i, 0, obs, np.zeros(envs[i].action_dim, np.float32), 0.0, False, 0)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    running, state, t = list(range(len(seeds))), None, 0
    while running:
        batch = {kind: np.stack([seen[i][kind] for i in running]) for kind in seen[0]}
        draws = [generators[i] for i in running]
        actions, state = act(batch, state, rows=running, generator=draws)
        t += 1
        steps = lanes(
            {i: partial(envs[i].step, action) for i, action in zip(running, actions, strict=True)}
        )
        going = []
        for row, (i, step) in enumerate(zip(running, steps, strict=True)):
            seen[i], reward, terminated, truncated, frames = step
            see(i, t, seen[i], actions[row], reward, terminated, frames)
            if not (terminated or truncated):
                going.append(row)
        if len(going) < len(running):
            running, state = [running[row] for row in going], state.rows(going)
