"""A worker: it plays what it is sent, in environments of its own.

What it plays is a function of what it is sent and of the configuration: an episode's seed is made
of the run's and the episode's index.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_bytes
from torch import Tensor

from fastdreamer.acting.play import (
    Lanes,
    Watch,
    at_once,
    collect,
    collect_together,
    config_env,
    episode_seed,
    evaluate_together,
    more_envs,
    on_cpu,
    random_policy,
    run_backend,
)
from fastdreamer.acting.policy import Policy
from fastdreamer.acting.shield import safety_rates
from fastdreamer.acting.signals import Signal, Violations, load_signal
from fastdreamer.config import Config, from_dict
from fastdreamer.envs import is_foreign
from fastdreamer.errors import FastdreamerError
from fastdreamer.ops.backend import settle_kernels
from fastdreamer.training.episodes import write_episode

ALIVE = {"alive": True}
"""The sign of a worker at work."""
_SIGN = 1.0  # seconds between signs, where decisions are quicker


class Lost(Exception):
    """A worker is no more; says how it ended."""


class _Gone(Exception):
    """The trainer is no more: there is nobody to talk to."""


@dataclass
class Share:
    """What one worker does of a job."""

    random: bool  # uniformly random actions instead of the actor's
    batches: list[list[int]] = field(default_factory=list)
    """Indices of episodes to collect; those of a batch are played side by side."""
    evaluations: int = 0  # episodes to evaluate, without noise
    video: str | None = None  # file for a video of the first evaluation episode


@dataclass(frozen=True)
class Played:
    """A collected episode; itself it is in its file."""

    episode: int
    episode_return: float
    safety: dict[str, float]  # see safety_rates


@dataclass(frozen=True)
class Result:
    """What became of a share or a job."""

    played: list[Played] = field(default_factory=list)
    eval_returns: list[float] = field(default_factory=list)
    eval_safety: dict[str, float] = field(default_factory=dict)
    finished: float = 0.0  # by time.time(), the clock that machines share more or less


def collecting_controller(config: Config, episode: int) -> str:
    """Who acts in an episode that is collected."""
    chosen = config.collect.controller
    return ("actor", "mpc")[episode % 2] if chosen == "mixed" else chosen


def by_optimism(config: Config, episode: int) -> bool:
    """Whether an optimist collects that episode; where the planner is one, those that it plays."""
    explore = config.explore
    if explore.method == "none":
        return False
    return explore.at == "actor" or collecting_controller(config, episode) != "actor"


def batches(config: Config, episodes: Sequence[int]) -> list[list[int]]:
    """The episodes of a round by who is played side by side: up to ``collect.envs`` of those that
    the same controller plays.

    A function of settings and episodes, not of how many workers there are: with eager ops an
    episode is not quite the same beside others.
    """
    by: dict[str, list[int]] = {}
    for episode in episodes:
        by.setdefault(collecting_controller(config, episode), []).append(episode)
    size = config.collect.envs
    return [same[i : i + size] for same in by.values() for i in range(0, len(same), size)]


def work(
    connection: Any, config_json: str, episodes: str, kernels: dict[str, str] | None, lanes: int
) -> None:
    """The process: do shares until the trainer is gone; see :func:`converse`."""
    threading.Thread(target=_exit_with_trainer, daemon=True).start()
    converse(connection, config_json, episodes, kernels, lanes)


def converse(
    connection: Any, config_json: str, episodes: str, kernels: dict[str, str] | None, lanes: int
) -> None:
    """Do shares until there is nobody to talk to, with the trainer's kernels.

    Args:
        connection: to the trainer. The first answer is what the environment is; then each share,
            in JSON and followed by the weights, is answered by its result. Signs come between.
        config_json: the run's settings.
        episodes, lanes: see :class:`Player`.
    """
    torch.set_num_threads(1)

    # Around these two alone: an environment may have connections of its own, and lose them.
    def send(answer: dict[str, Any]) -> None:
        with _to_trainer():
            connection.send_bytes(json.dumps(answer).encode())

    def receive() -> bytes:
        with _to_trainer():
            return connection.recv_bytes()

    try:
        settle_kernels(kernels)
        config = from_dict(json.loads(config_json))
        player = Player(config, Path(episodes), lanes, lambda: send(ALIVE))
        send({"obs_shapes": player.obs_shapes, "action_dim": player.action_dim})
        while True:
            share = Share(**json.loads(receive()))
            send(asdict(player.play(share, load_bytes(receive()))))
    except _Gone:
        return
    except FastdreamerError as error:
        failure = str(error)
    except Exception:
        failure = f"the collector failed:\n{traceback.format_exc()}"
    with contextlib.suppress(_Gone, OSError):
        send({"error": failure})


@contextlib.contextmanager
def _to_trainer() -> Iterator[None]:
    """What is said to the trainer or heard from it; raises _Gone where it is no more."""
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise _Gone from error


def _exit_with_trainer() -> None:
    """A killed trainer wants no answer: leave at once, in the middle of whatever share."""
    multiprocessing.parent_process().join()
    os._exit(1)


class Player:
    """Plays shares: its environments and networks are made once, and kept.

    Args:
        config: of the run.
        episodes: directory that receives the episode files.
        lanes: threads that the suite's environments draw in; others are stepped in one.
        alive: called at decisions, once a second.

    Attributes: ``obs_shapes`` and ``action_dim`` of the environment.
    """

    def __init__(
        self, config: Config, episodes: Path, lanes: int, alive: Callable[[], None]
    ) -> None:
        self._config, self._episodes, self._alive = config, episodes, alive
        self._own = on_cpu(config)
        # What others made may not bear two threads, and without drawing the suite's own leave
        # Python for too short a time to be worth one.
        draws = config.env.obs != "state" and not is_foreign(config.env.task)
        self._lanes = Lanes(lanes if draws else 1)
        self._envs = [config_env(config)]
        self.obs_shapes = self._envs[0].obs_shapes
        self.action_dim = self._envs[0].action_dim
        self._agent: Policy | None = None
        self._signal: Signal | None = None
        self._signed = time.monotonic()

    def play(self, share: Share, weights: dict[str, Tensor]) -> Result:
        """Play a share with such weights; episodes are written as soon as their batch is over."""
        if self._agent is None:
            self._agent = Policy(self._own, self.obs_shapes, self.action_dim)
            if self._own.safety.signal != "none":
                self._signal = load_signal(self._own, self.obs_shapes["state"][0])
        if not share.random or share.evaluations:
            self._agent.load_state_dict(weights)  # strictly: all that acts is sent
        collected = self._collect_random if share.random else self._collect
        with run_backend(self._own):
            played = [one for batch in share.batches for one in collected(batch)]
            returns, watch = self._evaluate(share) if share.evaluations else ([], None)
        return Result(played, returns, safety_rates(watch, None), time.time())

    def _collect(self, batch: list[int]) -> list[Played]:
        """Play episodes side by side."""
        config, agent = self._config, self._agent
        shields = [agent.make_shield() for _ in batch] if config.safety.shield else []
        counts = [self._violations() for _ in batch]
        made = collect_together(
            agent,
            more_envs(self._envs, config, len(batch)),
            [episode_seed(config.seed, "collect", episode) for episode in batch],
            controller=collecting_controller(config, batch[0]),
            sample=config.collect.sample,
            noise=config.collect.noise,
            explore=by_optimism(config, batch[0]),
            shields=shields,
            watches=[self._watching(count) for count in counts],
            lanes=self._lanes,
        )
        rates = map(safety_rates, counts, shields or [None] * len(batch))
        return [
            self._write(episode, arrays, frames, safety, random=False)
            for episode, (arrays, frames), safety in zip(batch, made, rates, strict=True)
        ]

    def _collect_random(self, batch: list[int]) -> list[Played]:
        """Play episodes one after the other: nobody decides anything together."""
        played = []
        for episode in batch:
            seed, count = episode_seed(self._config.seed, "collect", episode), self._violations()
            # Of one seed gymnasium makes the very generator that the actions are drawn from: they
            # would repeat what the environment has drawn. The suite's is of another kind.
            own = (seed, 1) if is_foreign(self._config.env.task) else seed
            policy = random_policy(self.action_dim, own)
            arrays, frames = collect(self._envs[0], policy, seed, self._watching(count))
            played.append(
                self._write(episode, arrays, frames, safety_rates(count, None), random=True)
            )
        return played

    def _evaluate(self, share: Share) -> tuple[list[float], Violations | None]:
        config, count = self._config, self._violations()
        returns = evaluate_together(
            self._agent,
            more_envs(
                self._envs, config, at_once(config, config.eval.controller, share.evaluations)
            ),
            [episode_seed(config.seed, "evaluate", i) for i in range(share.evaluations)],
            Path(share.video) if share.video else None,
            config.eval.controller,
            watches=[self._watching(count)] * share.evaluations,
            lanes=self._lanes,
        )
        return returns, count

    def _write(
        self,
        episode: int,
        arrays: dict[str, np.ndarray],
        env_frames: int,
        safety: dict[str, float],
        *,
        random: bool,
    ) -> Played:
        config = self._config
        episode_return = float(arrays["reward"].sum(dtype=np.float64))
        meta = {
            "env_frames": env_frames,
            "return": episode_return,
            "task": config.env.task,
            "action_repeat": config.env.action_repeat,
            "time_limit": config.env.time_limit,
            "image_size": config.env.image_size,
            "render": config.env.render,
            "render_quality": config.env.render_quality,
            "seed": episode_seed(config.seed, "collect", episode),
            "random": random,
        }
        write_episode(self._episodes, episode, arrays, meta)
        return Played(episode, episode_return, safety)

    def _violations(self) -> Violations | None:
        return None if self._signal is None else Violations(self._signal)

    def _watching(self, watch: Watch | None) -> Watch:
        """Look on, and say that the worker is alive."""

        def look(*step: Any) -> None:
            if time.monotonic() - self._signed >= _SIGN:
                self._signed = time.monotonic()
                self._alive()
            if watch is not None:
                watch(*step)

        return look
