"""Episodes of a run's snapshots, several side by side: each on a thread of its own.

Threads that shared a decision would wait for each other at every refit of a plan, and all of them
for what steps and draws between decisions.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from fastdreamer.acting.play import TOGETHER, config_env, episode_seed, evaluate
from fastdreamer.config import Config, PlanConfig
from fastdreamer.envs import is_foreign
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.training.checkpoint import CheckpointError, checksum, load_meta
from fastdreamer.training.logger import format_seconds
from fastdreamer.training.pretrained import load

Key = tuple[str, int, int]
"""An episode: who plays it, after how many env frames of learning, the how manyth."""
Row = dict[str, Any]
"""What became of it."""

_REHEARSED = 10
"""Decisions a controller is timed for before its episodes."""
_QUIET = 30.0
"""Seconds within an episode after which a line says where it is."""


class Cast:
    """Those who play: one, or in each thread one with an environment and agents of its own.

    Args:
        config: of the run.
        snapshots: by env frames.
        plan: settings of the planner.
        episodes: a snapshot and controller.
        seed: of the episodes.
        threads: see ``write_report``.
        say: receives lines of progress, in the caller's thread.

    Attributes: ``env``, an environment for the caller's thread; ``newest``, the agent of the last
    snapshot that can be read, None without one.
    """

    def __init__(
        self,
        config: Config,
        snapshots: dict[int, Path],
        *,
        plan: PlanConfig,
        episodes: int,
        seed: int,
        threads: int,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._snapshots, self._plan = config, snapshots, plan
        self._episodes, self._seed, self._threads, self._say = episodes, seed, threads, say
        self._todo: deque[Key] = deque()
        self._lost: set[int] = set()  # snapshots that cannot be read
        # Environments and agents are made in turn: initial weights are drawn from torch's one
        # generator, and first images make GL contexts, which share what libraries keep for a
        # process.
        self._turn, self._stopped = threading.Lock(), threading.Event()
        self.env = config_env(config)
        loaded = (self._load(frames, say) for frames in sorted(snapshots, reverse=True))
        self.newest = next((agent for agent, _ in filter(None, loaded)), None)

    def play(self, keys: Sequence[Key]) -> Iterator[tuple[Row, str]]:
        """Play episodes, until who listens closes the iterator.

        Yields:
            The row of each as soon as it has ended, and a line that says so.
        """
        keys = [key for key in keys if key[1] not in self._lost]
        if not keys:
            return
        abreast, each = self._share_threads(len(keys))
        self._todo.extend(keys)
        left = set(keys)
        with _torch_threads(each):
            controllers = list(dict.fromkeys(controller for controller, _, _ in keys))
            expected = _rehearse(self.newest, self.env, controllers)
            self._say(f"{len(keys)} episodes to play, about {_about(expected, keys, abreast)}")
            played = self._play(self.env, self._say) if abreast == 1 else self._in_threads(abreast)
            with contextlib.closing(played):
                for row in played:
                    key = row["controller"], row["env_frames"], row["episode"]
                    expected[row["controller"]] = row["seconds"]  # as the last one was
                    left = {other for other in left - {key} if other[1] not in self._lost}
                    count, rest = len(keys) - len(left), _about(expected, left, abreast)
                    ended = f"{self._title(key)}: return {row['return']:.1f}"
                    yield row, f"{ended} ({count} of {len(keys)}, {rest} left)"

    def _share_threads(self, episodes: int) -> tuple[int, int]:
        """How many are played side by side, and on how many threads each."""
        # Others' environments may not bear two threads; a plan of so many milliseconds is as good
        # as it has threads.
        if is_foreign(self._config.env.task) or self._plan.budget_ms is not None:
            return 1, self._threads or torch.get_num_threads()
        # One each, also of the last: with eager ops two round otherwise.
        return min(self._threads or min(torch.get_num_threads(), TOGETHER), episodes), 1

    def _in_threads(self, count: int) -> Iterator[Row]:
        heard: SimpleQueue[Any] = SimpleQueue()
        pool = ThreadPoolExecutor(count, "fastdreamer-play", torch.set_num_threads, (1,))
        try:
            for _ in range(count):  # in the caller's context, which may name a backend
                lane = pool.submit(contextvars.copy_context().run, self._lane, heard.put)
                lane.add_done_callback(heard.put)
            while count:
                told = heard.get()
                if isinstance(told, Future):
                    told.result()
                    count -= 1
                elif isinstance(told, str):
                    self._say(told)
                else:
                    yield told
        finally:
            self._stopped.set()
            pool.shutdown()

    def _lane(self, tell: Callable[[Any], None]) -> None:
        with self._turn:
            env = config_env(self._config)
            env.reset(seed=0)
        try:
            for row in self._play(env, tell):
                tell(row)
        finally:
            with self._turn:
                env.close()  # in the thread that drew

    def _play(self, env: Any, say: Callable[[str], None]) -> Iterator[Row]:
        found, loaded = None, None
        while self._todo and not self._stopped.is_set():
            try:
                key = self._todo.popleft()
            except IndexError:  # another was faster
                return
            controller, frames, index = key
            if loaded != frames:
                found, loaded = self._load(frames, say), frames
            if found is None:
                continue
            agent, about = found
            start = time.monotonic()
            watch = _Quiet(self._title(key), env.max_decisions, say, self._stopped)
            seed = episode_seed(self._seed, "evaluate", index)
            value = evaluate(agent, env, seed, None, controller, watch=watch)
            yield {
                "controller": controller,
                "env_frames": frames,
                "episode": index,
                "return": value,
                "seconds": round(time.monotonic() - start, 3),
                **about,
            }

    def _load(self, frames: int, say: Callable[[str], None]) -> tuple[Dreamer, Row] | None:
        """A snapshot's agent and what a row says of it; None where it cannot be read."""
        with self._turn:
            if frames not in self._lost:
                path = self._snapshots[frames]
                try:
                    update, crc32 = load_meta(path)["cursor"]["update"], checksum(path)
                    return load(path, plan=self._plan), {"update": update, "crc32": crc32}
                except CheckpointError as error:
                    self._lost.add(frames)
                    say(f"skipped: {error}")
        return None

    def _title(self, key: Key) -> str:
        controller, frames, index = key
        return f"{controller} at {frames:,} env frames, episode {index + 1} of {self._episodes}"


class _Stopped(Exception):
    """An episode is not played to its end."""


class _Quiet:
    """A watch that says where a long episode is, and ends it where nobody waits for it any more."""

    def __init__(
        self, title: str, decisions: int, say: Callable[[str], None], stopped: threading.Event
    ) -> None:
        self._title, self._decisions, self._say = title, decisions, say
        self._stopped, self._last = stopped, time.monotonic()

    def __call__(self, t: int, *_: Any) -> None:
        if self._stopped.is_set():
            raise _Stopped
        now = time.monotonic()
        if now - self._last >= _QUIET:
            self._last = now
            self._say(f"{self._title}: decision {t} of {self._decisions}")


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rehearse(agent: Dreamer, env: Any, controllers: Sequence[str]) -> dict[str, float]:
    """Seconds of an episode by controller, from some decisions."""
    expected = {}
    for controller in controllers:
        agent.controller(controller)
        obs, state, times = env.reset(seed=0), None, []
        for _ in range(min(_REHEARSED, env.max_decisions)):
            start = time.monotonic()
            action, state = agent.act(obs, state, controller=controller)
            obs, _, terminated, truncated, _ = env.step(action)
            times.append(time.monotonic() - start)
            if terminated or truncated:
                obs, state = env.reset(seed=0), None
        expected[controller] = float(np.median(times)) * env.max_decisions
    return expected


def _about(expected: dict[str, float], keys: Collection[Key], abreast: int) -> str:
    """How long episodes take, so many of them side by side."""
    seconds = sum(expected[controller] for controller, _, _ in keys)
    return format_seconds(seconds / max(1, min(abreast, len(keys))))
