"""The collector: episodes and evaluations, in a pool of workers beside training.

The hand-over is deterministic: a job names the episodes, the weights travel with it, a worker
seeds everything from the configuration's seed and the episode's index, and the trainer waits for
the result at a fixed update. Which episodes are played side by side is a matter of the settings,
not of the number of workers. Timing changes nothing but the time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save as save_bytes
from torch import Tensor

from fastdreamer.config import Config
from fastdreamer.errors import FastdreamerError
from fastdreamer.files import remove_stale
from fastdreamer.training.processes import Processes
from fastdreamer.training.worker import ALIVE, Lost, Played, Result, Share, batches

_log = logging.getLogger("fastdreamer")

QUIET, SILENT = 30.0, 300.0
"""Seconds without a sign of a worker until that is said, and until another takes its place."""


class CollectorError(FastdreamerError, RuntimeError):
    """A worker failed; the message holds its traceback, its reason or exit code."""


class Carrier(Protocol):
    """One worker, from its start to its end, wherever it is.

    Attributes:
        where: it is; None while there is no room for it.
    """

    where: str | None

    def send(self, share: Share, weights: Any) -> None:
        """Give it a share, and the weights that its place has packed; returns at once."""

    def hear(self) -> dict[str, Any] | None:
        """The next thing that it has said; None where it is of no concern.

        Raises:
            Lost: it is no more. FastdreamerError: it cannot work where it is.
        """

    def is_to_blame(self) -> bool:
        """Of one that was lost: whether it may have been by its own doing."""

    def kill(self) -> None:
        """Let it end, whatever it does, without waiting for that."""

    def end(self) -> None:
        """End it, whatever it does."""


class Place(Protocol):
    """Where workers are: processes of this machine, or a cluster.

    Attributes:
        cores: that there are. patience: how many workers may be lost by their own doing at one
            share, before it is taken for the share's; and how many before they say where they are.
    """

    cores: int
    patience: int

    def start(
        self, name: str, config: Config, episodes: Path, lanes: int, *, instead: bool
    ) -> Carrier:
        """Start a worker; the first that it says is what the environment is.

        Args:
            episodes: directory that receives the episode files.
            lanes: threads that it may step environments in.
            instead: of one that was lost.
        """

    def pack(self, weights: bytes) -> Any:
        """Weights as carriers here send them."""

    def wait(self, carriers: Sequence[Any], timeout: float) -> list[Any]:
        """Those that have said something, or are lost; gives them up to so many seconds."""


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


def pool_size(config: Config, cores: int) -> int:
    """How many workers collect; for 0, as many as the learner's threads leave cores to, and no
    more than a round has batches."""
    if config.collect.workers:
        return config.collect.workers
    return max(1, min(cores - config.threads, len(batches(config, range(round_size(config))))))


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
        place: where the workers are; processes of this machine by default.

    Raises:
        CollectorError: a worker could not start (no GL backend, for example).
    """

    def __init__(
        self,
        config: Config,
        episodes: Path,
        check: Callable[[], None] = lambda: None,
        place: Place | None = None,
    ) -> None:
        self._config, self._under_way = config, False
        self._written = {episodes}  # where workers write
        self._place = place or Processes()
        count = pool_size(config, self._place.cores)
        names = [f"collector {i + 1} of {count}" if count > 1 else "collector"
                 for i in range(count)]  # fmt: skip
        lanes = max(1, self._place.cores // count)
        self.workers: list[_Worker] = []
        try:
            for name in names:
                self.workers.append(_Worker(self._place, name, config, episodes, lanes))
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
        if job.video is not None:
            self._written.add(Path(job.video).parent)
        packed = self._place.pack(save_bytes({k: v.cpu().contiguous() for k, v in weights.items()}))
        shares = share_out(job, self._config, len(self.workers))
        for worker, share in zip(self.workers, shares, strict=True):
            if share.batches or share.evaluations:
                worker.submit(share, packed)

    def ready(self, timeout: float) -> bool:
        """Whether ``wait()`` would return at once; gives it up to so many seconds.

        Raises:
            CollectorError: a share of the job failed, or too many workers at it.
        """
        end = time.monotonic() + timeout
        while busy := [worker for worker in self.workers if not worker.done]:
            start = time.monotonic()
            left = max(0.0, end - start)
            heard = self._place.wait([worker.carrier for worker in busy], left)
            # No more than was meant to be waited: all may be stopped, as by Ctrl-Z.
            waited = min(time.monotonic() - start, left)
            for worker in busy:
                if worker.carrier in heard:
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
            CollectorError: a share of the job failed, or too many workers at it.
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
            max((each.finished for each in results), default=time.time()),
        )

    def close(self) -> None:
        """End the workers, whatever they do; a job under way is dropped."""
        for worker in self.workers:
            worker.carrier.kill()
        for worker in self.workers:
            worker.carrier.end()
        for directory in self._written:
            if directory.is_dir():
                remove_stale(directory)


class _Worker:
    """One worker of the pool, and whoever takes its place.

    Attributes:
        carrier: of the one that works now.
        header: what the environment is; None until a worker has started.
        share: under way, or None.
    """

    def __init__(self, place: Place, name: str, config: Config, episodes: Path, lanes: int) -> None:
        self._place, self._name, self._lanes = place, name, lanes
        self._config, self._episodes = config, episodes
        self.share: Share | None = None
        self._weights: Any = None
        self._lost: list[Carrier] = []  # at this share, or at the start
        self._start()

    def _start(self) -> None:
        self.carrier = self._place.start(
            self._name, self._config, self._episodes, self._lanes, instead=bool(self._lost)
        )
        self.header: dict[str, Any] | None = None
        self._answer: dict[str, Any] | None = None
        self._silence, self._said = 0.0, False

    def submit(self, share: Share, weights: Any) -> None:
        self.share, self._weights = share, weights
        self._lost, self._silence, self._said = [], 0.0, False
        self._send()

    def _send(self) -> None:
        self.carrier.send(self.share, self._weights)

    @property
    def done(self) -> bool:
        """Whether it has said what is waited for."""
        return (self.header if self.share is None else self._answer) is not None

    def hear(self) -> None:
        """Take in something that it has said, or that it is lost."""
        self._silence, self._said = 0.0, False
        try:
            said = self.carrier.hear()
        except Lost as lost:
            self._replace("died", str(lost))
            return
        if said is None or said == ALIVE:
            return
        if "error" in said:
            raise CollectorError(said["error"])
        if self.header is None:
            self.header = said
        else:
            self._answer = said

    def miss(self, waited: float) -> None:
        """Note so many seconds without a sign; say it, and replace the worker where it lasts."""
        self._silence += waited
        if self._silence < QUIET:
            return
        where = self.carrier.where
        if where is not None and self._silence >= SILENT:
            self._replace("gave no sign", f"in {SILENT:.0f} s")
        elif not self._said:
            self._said = True
            if where is None:
                _log.warning(
                    "the %s waits for its start: no core of the cluster is free, or it is slow",
                    self._name,
                )
                return
            _log.warning(
                "the %s (%s) has given no sign for %.0f s: it is stopped, or in a "
                "driver that hangs; after %.0f s another takes its place",
                self._name,
                where,
                self._silence,
                SILENT,
            )

    def _replace(self, what: str, how: str) -> None:
        """Start another, which does the share anew; not too often, nor where the first died."""
        lost = self.carrier
        lost.end()
        self._lost.append(lost)
        blamed = sum(one.is_to_blame() for one in self._lost)
        unseen = sum(one.where is None for one in self._lost)  # whose machine nobody knows
        starting = self.share is None
        bound = 0 if starting and what == "died" else self._place.patience
        if blamed > bound or unseen > self._place.patience:
            count = max(blamed, unseen)
            often = "twice" if count == 2 else f"{count} times"
            when = "while it started" if starting else f"{often} at the same job"
            raise CollectorError(f"the {self._name} {what} {when} ({how})")
        _log.warning("the %s %s (%s); starting it again", self._name, what, how)
        self._start()
        if self.share is not None:
            self._send()

    def take(self) -> Result:
        """The result of its share, which it has said."""
        answer, self._answer, self.share = self._answer, None, None
        played = [Played(**one) for one in answer.pop("played")]
        return Result(played, **answer)
