"""The collector: episodes and evaluations, in a pool of worker processes beside training.

The hand-over is deterministic: a job names the episodes, the weights travel with it, a worker
seeds everything from the configuration's seed and the episode's index, and the trainer waits for
the result at a fixed update. Which episodes are played side by side is a matter of the settings,
not of the number of workers. Timing changes nothing but the time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_bytes
from torch import Tensor

from fastdreamer.config import Config, to_dict
from fastdreamer.errors import FastdreamerError
from fastdreamer.machine.device import CORES
from fastdreamer.ops.backend import kernel_choice
from fastdreamer.training.worker import ALIVE, Played, Result, Share, batches, work

_log = logging.getLogger("fastdreamer")

QUIET, SILENT = 30.0, 300.0
"""Seconds without a sign of a worker until that is said, and until another takes its place."""
_GRACE = 2.0  # seconds that a killed process and who writes to it may take to be gone


class CollectorError(FastdreamerError, RuntimeError):
    """A worker process failed; the message holds its traceback, its reason or exit code."""


@dataclass(frozen=True)
class Job:
    """What the pool does with one set of weights."""

    update: int  # that the weights are of
    episodes: list[int]  # indices of those to collect
    random: bool  # uniformly random actions instead of the actor's
    evaluations: int  # episodes to evaluate, without noise
    video: str | None  # file for a video of the first evaluation episode


def read_job(saved: dict[str, Any]) -> Job:
    """A job of a checkpoint; before there were rounds it had one episode or none."""
    values = dict(saved)
    if "episode" in values:
        episode = values.pop("episode")
        values["episodes"] = [] if episode is None else [episode]
    return Job(**values)


def round_size(config: Config) -> int:
    """How many episodes are collected with one set of weights."""
    return config.collect.round or config.collect.envs


def pool_size(config: Config) -> int:
    """How many worker processes collect; for 0, as many as the learner's threads leave cores to,
    and no more than a round has batches."""
    if config.collect.workers:
        return config.collect.workers
    return max(1, min(CORES - config.threads, len(batches(config, range(round_size(config))))))


def share_out(job: Job, config: Config, workers: int) -> list[Share]:
    """What each of the workers does of a job: whole batches, and one has all evaluations."""
    shares = [Share(job.random) for _ in range(workers)]
    shares[0].evaluations, shares[0].video = job.evaluations, job.video
    todo = lambda share: share.evaluations + sum(map(len, share.batches))  # noqa: E731
    for batch in sorted(batches(config, job.episodes), key=len, reverse=True):
        min(shares, key=todo).batches.append(batch)
    return shares


class Collector:
    """The trainer's side of the pool.

    A worker that died (out of memory, killed), or that gives no sign for ``SILENT`` seconds
    (stopped, or in a driver that hangs), is replaced once a job, and its share is done again: it
    is a pure function of its inputs. At work a worker gives a sign at least with every decision.

    Args:
        config: of the run.
        episodes: directory that receives the episode files.
        check: called several times a second while the workers start; what it raises ends that.

    Raises:
        CollectorError: a worker could not start (no GL backend, for example).
    """

    def __init__(
        self, config: Config, episodes: Path, check: Callable[[], None] = lambda: None
    ) -> None:
        self._config, self._under_way = config, False
        count = pool_size(config)
        names = [f"collector {i + 1} of {count}" if count > 1 else "collector"
                 for i in range(count)]  # fmt: skip
        lanes = max(1, CORES // count)
        self.workers: list[_Worker] = []
        try:
            for name in names:
                self.workers.append(_Worker(name, config, episodes, lanes))
            while not self.ready(0.2):
                check()
        except BaseException:
            self.close()
            raise
        header = self.workers[0].header
        self.obs_shapes = {kind: tuple(s) for kind, s in header["obs_shapes"].items()}
        self.action_dim: int = header["action_dim"]

    def submit(self, job: Job, weights: Mapping[str, Tensor]) -> None:
        """Start a job; ``wait()`` for it before the next."""
        if self._under_way:
            raise CollectorError("a job is already under way")
        self._under_way = True
        packed = save_bytes({k: v.cpu().contiguous() for k, v in weights.items()})
        shares = share_out(job, self._config, len(self.workers))
        for worker, share in zip(self.workers, shares, strict=True):
            if share.batches or share.evaluations:
                worker.submit(share, packed)

    def ready(self, timeout: float) -> bool:
        """Whether ``wait()`` would return at once; gives it up to so many seconds.

        Raises:
            CollectorError: a share of the job failed, or two workers at it.
        """
        end = time.monotonic() + timeout
        while busy := [worker for worker in self.workers if not worker.done]:
            start = time.monotonic()
            left = max(0.0, end - start)
            heard = multiprocessing.connection.wait([worker.connection for worker in busy], left)
            # No more than was meant to be waited: all may be stopped, as by Ctrl-Z.
            waited = min(time.monotonic() - start, left)
            for worker in busy:
                if worker.connection in heard:
                    worker.hear()
                else:
                    worker.miss(waited)
            if not heard:
                break
        return all(worker.done for worker in self.workers)

    def wait(self) -> Result:
        """Block until the job is done.

        Returns:
            What became of it, the episodes in the order of their indices.

        Raises:
            CollectorError: a share of the job failed, or two workers at it.
        """
        if not self._under_way:
            raise CollectorError("no job is under way")
        while not self.ready(1.0):
            pass
        self._under_way = False
        results = [worker.take() for worker in self.workers if worker.share is not None]
        return Result(
            sorted((one for each in results for one in each.played), key=lambda one: one.episode),
            [value for each in results for value in each.eval_returns],
            {name: value for each in results for name, value in each.eval_safety.items()},
            max((each.finished for each in results), default=time.monotonic()),
        )

    def close(self) -> None:
        """End the workers, whatever they do; a job under way is dropped."""
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.end()


class _Worker:
    """One process of the pool, and whoever takes its place.

    Attributes:
        process, connection: of the one that works now.
        header: what the environment is; None until a worker has started.
        share: under way, or None.
    """

    def __init__(self, name: str, config: Config, episodes: Path, lanes: int) -> None:
        self._name, self._lanes = name, lanes
        self._config, self._episodes = config, episodes
        self.share: Share | None = None
        self._weights = b""
        self._replaced = False  # at this share, or at the start
        self._start()

    def _start(self) -> None:
        """Start a process; the first that it says is what the environment is."""
        # spawn: a forked child would inherit OpenMP's and the GPU driver's threads half-dead.
        context = multiprocessing.get_context("spawn")
        self.connection, child = context.Pipe()
        settings = json.dumps(to_dict(self._config))
        self.process = context.Process(
            target=work,
            args=(child, settings, str(self._episodes), kernel_choice(), self._lanes),
            daemon=True,
            name=f"fastdreamer-{self._name.replace(' ', '-')}",
        )
        # Ctrl-C reaches the whole process group, and only the trainer may answer it: the worker
        # inherits this mask. The tracker comes first because starting it undoes the mask.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        child.close()
        self.header: dict[str, Any] | None = None
        self._answer: dict[str, Any] | None = None
        self._sender: threading.Thread | None = None
        self._silence, self._said = 0.0, False

    def submit(self, share: Share, weights: bytes) -> None:
        self.share, self._weights = share, weights
        self._replaced, self._silence, self._said = False, 0.0, False
        self._send()

    @property
    def done(self) -> bool:
        """Whether it has said what is waited for."""
        return (self.header if self.share is None else self._answer) is not None

    def hear(self) -> None:
        """Take in something that it has said, or that it is dead."""
        self._silence, self._said = 0.0, False
        try:
            said = json.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            self.process.join(_GRACE)
            self._replace("died", f"exit code {self.process.exitcode}")
            return
        if "error" in said:
            raise CollectorError(said["error"])
        if self.header is None:
            self.header = said
        elif said != ALIVE:
            self._answer = said

    def miss(self, waited: float) -> None:
        """Note so many seconds without a sign; say it, and replace the worker where it lasts."""
        self._silence += waited
        if self._silence < QUIET:
            return
        if self._silence >= SILENT:
            self._replace("gave no sign", f"in {SILENT:.0f} s")
        elif not self._said:
            self._said = True
            _log.warning(
                "the %s (process %d) has given no sign for %.0f s: it is stopped, or in a "
                "driver that hangs; after %.0f s another takes its place",
                self._name,
                self.process.pid,
                self._silence,
                SILENT,
            )

    def _replace(self, what: str, how: str) -> None:
        """Start another process, which does the share anew; not twice, nor where the first died."""
        self.end()
        if self._replaced or (self.share is None and what == "died"):
            when = "while it started" if self.share is None else "twice at the same job"
            raise CollectorError(f"the {self._name} {what} {when} ({how})")
        self._replaced = True
        _log.warning("the %s %s (%s); starting it again", self._name, what, how)
        self._start()
        if self.share is not None:
            self._send()

    def take(self) -> Result:
        """The result of its share, which it has said."""
        answer, self._answer, self.share = self._answer, None, None
        played = [Played(**one) for one in answer.pop("played")]
        return Result(played, **answer)

    def end(self) -> None:
        """End the process, whatever it does."""
        # Not terminate(): a stopped process does not get to that signal. All it leaves half-done
        # are temporary files, which nobody reads.
        self.process.kill()
        self.process.join(_GRACE)
        if self._sender is not None:
            self._sender.join(_GRACE)
        self.connection.close()

    def _send(self) -> None:
        # Beside, as a worker that is stopped takes nothing in and the trainer must hear a signal.
        messages = json.dumps(asdict(self.share)).encode(), self._weights
        self._sender = threading.Thread(
            target=_send_all, args=(self.connection, messages), daemon=True
        )
        self._sender.start()


def _send_all(connection: Any, messages: Sequence[bytes]) -> None:
    with contextlib.suppress(OSError):  # the worker is dead: ready() finds out
        for message in messages:
            connection.send_bytes(message)
