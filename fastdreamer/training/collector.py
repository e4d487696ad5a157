"""The collector: episodes and evaluations, in a worker process beside training.

The hand-over is deterministic: a job names the episode, the weights travel with it, the worker
seeds everything from the configuration's seed and the episode's index, and the trainer waits for
the result at a fixed update. Timing changes nothing but the time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from fastdreamer.acting.play import (
    Watch,
    agent_policy,
    collect,
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
from fastdreamer.config import Config, from_dict, to_dict
from fastdreamer.errors import FastdreamerError
from fastdreamer.ops.backend import kernel_choice, settle_kernels
from fastdreamer.training.episodes import write_episode

_log = logging.getLogger("fastdreamer")

QUIET, SILENT = 30.0, 300.0
"""Seconds without a sign of the worker until that is said, and until another takes its place."""
_GRACE = 2.0  # seconds that a killed process and who writes to it may take to be gone
_SIGN = 1.0  # seconds between signs of a worker at work, where decisions are quicker
_ALIVE = {"alive": True}


class CollectorError(FastdreamerError, RuntimeError):
    """The worker process failed; the message holds its traceback, its reason or exit code."""


@dataclass(frozen=True)
class Job:
    """What the worker does with one set of weights."""

    update: int  # that the weights are of
    episode: int | None  # index of the episode to collect, or none
    random: bool  # uniformly random actions instead of the actor's
    evaluations: int  # episodes to evaluate, without noise
    video: str | None  # file for a video of the first evaluation episode


@dataclass(frozen=True)
class Result:
    """What became of a job; the episode itself is in its file."""

    episode_return: float | None = None
    eval_returns: list[float] = field(default_factory=list)
    episode_safety: dict[str, float] = field(default_factory=dict)  # see Violations and Shield
    eval_safety: dict[str, float] = field(default_factory=dict)


class Collector:
    """The trainer's side of the worker process.

    A worker that died (out of memory, killed), or that gives no sign for ``SILENT`` seconds
    (stopped, or in a driver that hangs), is replaced once a job: a job is a pure function of its
    inputs. At work it gives a sign at least with every decision.

    Args:
        config: of the run.
        episodes: directory that receives the episode files.
        check: called several times a second while the worker starts; what it raises ends that.

    Raises:
        CollectorError: the worker could not start (no GL backend, for example).
    """

    def __init__(
        self, config: Config, episodes: Path, check: Callable[[], None] = lambda: None
    ) -> None:
        self._config, self._episodes = config, episodes
        self._pending: tuple[Job, bytes] | None = None
        self._replaced = False  # at this job, or at the start
        self._start()
        try:
            while not self.ready(0.2):
                check()
        except BaseException:
            self.close()
            raise
        header = self._header
        self.obs_shapes = {kind: tuple(s) for kind, s in header["obs_shapes"].items()}
        self.action_dim: int = header["action_dim"]

    def _start(self) -> None:
        """Start a worker; the first that it says is what the environment is."""
        # spawn: a forked child would inherit OpenMP's and the GPU driver's threads half-dead.
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(
            target=_worker,
            args=(child, json.dumps(to_dict(self._config)), str(self._episodes), kernel_choice()),
            daemon=True,
            name="fastdreamer-collector",
        )
        # Ctrl-C reaches the whole process group, and only the trainer may answer it: the worker
        # inherits this mask. The tracker comes first because starting it undoes the mask.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        child.close()
        self._header: dict[str, Any] | None = None
        self._answer: dict[str, Any] | None = None
        self._sender: threading.Thread | None = None
        self._silence, self._said = 0.0, False

    def submit(self, job: Job, weights: Mapping[str, Tensor]) -> None:
        """Start a job; ``wait()`` for it before the next."""
        if self._pending is not None:
            raise CollectorError("a job is already under way")
        self._pending = (job, save_bytes({k: v.cpu().contiguous() for k, v in weights.items()}))
        self._replaced, self._silence, self._said = False, 0.0, False
        self._send()

    def ready(self, timeout: float) -> bool:
        """Whether ``wait()`` would return at once; gives it up to so many seconds.

        Raises:
            CollectorError: the job failed, or two workers at it.
        """
        end = time.monotonic() + timeout
        try:
            while not self._done():
                start = time.monotonic()
                left = max(0.0, end - start)
                if not self._connection.poll(left):
                    # No more than was meant to be waited: both may be stopped, as by Ctrl-Z.
                    self._listen(min(time.monotonic() - start, left))
                    break
                self._silence, self._said = 0.0, False
                said = json.loads(self._connection.recv_bytes())
                if "error" in said:
                    raise CollectorError(said["error"])
                if self._header is None:
                    self._header = said
                elif said != _ALIVE:
                    self._answer = said
        except (EOFError, ConnectionError):
            self._process.join(_GRACE)
            self._replace("died", f"exit code {self._process.exitcode}")
        return self._done()

    def _done(self) -> bool:
        return (self._header if self._pending is None else self._answer) is not None

    def _listen(self, waited: float) -> None:
        """Say that a worker is silent, and replace it where it stays so."""
        self._silence += waited
        if self._silence < QUIET:
            return
        if self._silence >= SILENT:
            self._replace("gave no sign", f"in {SILENT:.0f} s")
        elif not self._said:
            self._said = True
            _log.warning(
                "the collector (process %d) has given no sign for %.0f s: it is stopped, or in a "
                "driver that hangs; after %.0f s another takes its place",
                self._process.pid,
                self._silence,
                SILENT,
            )

    def _replace(self, what: str, how: str) -> None:
        """Start another worker, which does the job anew; not twice, nor where the first died."""
        self._end()
        if self._replaced or (self._pending is None and what == "died"):
            when = "while it started" if self._pending is None else "twice at the same job"
            raise CollectorError(f"the collector {what} {when} ({how})")
        self._replaced = True
        _log.warning("the collector %s (%s); starting it again", what, how)
        self._start()
        if self._pending is not None:
            self._send()

    def wait(self) -> Result:
        """Block until the job is done.

        Raises:
            CollectorError: the job failed, or two workers at it.
        """
        if self._pending is None:
            raise CollectorError("no job is under way")
        while not self.ready(1.0):
            pass
        answer, self._answer, self._pending = self._answer, None, None
        return Result(**answer)

    def close(self) -> None:
        """End the worker, whatever it does; a job under way is dropped."""
        self._end()

    def _end(self) -> None:
        # Not terminate(): a stopped process does not get to that signal. All it leaves half-done
        # are temporary files, which nobody reads.
        self._process.kill()
        self._process.join(_GRACE)
        if self._sender is not None:
            self._sender.join(_GRACE)
        self._connection.close()

    def _send(self) -> None:
        # Beside, as a worker that is stopped takes nothing in and the trainer must hear a signal.
        job, weights = self._pending
        messages = json.dumps(asdict(job)).encode(), weights
        self._sender = threading.Thread(
            target=_send_all, args=(self._connection, messages), daemon=True
        )
        self._sender.start()


def _send_all(connection: Any, messages: Sequence[bytes]) -> None:
    with contextlib.suppress(OSError):  # the worker is dead: ready() finds out
        for message in messages:
            connection.send_bytes(message)


def collecting_controller(config: Config, episode: int) -> str:
    """Who acts in an episode that is collected."""
    chosen = config.collect.controller
    return ("actor", "mpc")[episode % 2] if chosen == "mixed" else chosen


def _worker(
    connection: Any, config_json: str, episodes: str, kernels: dict[str, str] | None
) -> None:
    """The worker process: answer jobs until the trainer is gone, with the trainer's kernels."""
    threading.Thread(target=_exit_with_trainer, daemon=True).start()
    torch.set_num_threads(1)
    settle_kernels(kernels)
    config = from_dict(json.loads(config_json))
    own = on_cpu(config)

    signed = time.monotonic()

    def send(answer: dict[str, Any]) -> None:
        connection.send_bytes(json.dumps(answer).encode())

    def sign() -> None:
        nonlocal signed
        if time.monotonic() - signed >= _SIGN:
            signed = time.monotonic()
            send(_ALIVE)

    try:
        try:
            env = config_env(config)
            send({"obs_shapes": env.obs_shapes, "action_dim": env.action_dim})
            agent, signal, envs = None, None, [env]
            while True:
                job = Job(**json.loads(connection.recv_bytes()))
                weights = load_bytes(connection.recv_bytes())
                if agent is None:
                    agent = Policy(own, env.obs_shapes, env.action_dim)
                    if own.safety.signal != "none":
                        signal = load_signal(own, env.obs_shapes["state"][0])
                if not job.random or job.evaluations:
                    agent.load_state_dict(weights)  # strictly: all that acts is sent
                with run_backend(own):
                    result = _run_job(job, config, agent, signal, envs, Path(episodes), sign)
                send(asdict(result))
        except (EOFError, ConnectionError):
            return  # the trainer is gone
        except FastdreamerError as error:
            send({"error": str(error)})
        except Exception:
            send({"error": f"the collector failed:\n{traceback.format_exc()}"})
    except (EOFError, OSError):
        return


def _exit_with_trainer() -> None:
    """A killed trainer wants no answer: leave at once, in the middle of whatever job."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_job(
    job: Job,
    config: Config,
    agent: Policy,
    signal: Signal | None,
    envs: list,
    episodes: Path,
    sign: Callable[[], None] = lambda: None,
) -> Result:
    """``envs``: at least one; more are made for evaluations, and kept. ``sign``: called at every
    decision."""
    env, episode_return, episode_safety = envs[0], None, {}
    if job.episode is not None:
        seed = episode_seed(config.seed, "collect", job.episode)
        shield = agent.make_shield() if config.safety.shield and not job.random else None
        policy = (
            random_policy(env.action_dim, seed)
            if job.random
            else agent_policy(
                agent,
                seed,
                config.collect.noise,
                collecting_controller(config, job.episode),
                sample=config.collect.sample,
                explore=config.explore.method != "none",
                shield=shield,
            )
        )
        watch = Violations(signal) if signal is not None else None
        arrays, frames = collect(env, policy, seed, _watching(watch, sign))
        episode_safety = safety_rates(watch, shield)
        episode_return = float(arrays["reward"].sum(dtype=np.float64))
        meta = {
            "env_frames": frames,
            "return": episode_return,
            "task": config.env.task,
            "action_repeat": config.env.action_repeat,
            "time_limit": config.env.time_limit,
            "image_size": config.env.image_size,
            "render": config.env.render,
            "render_quality": config.env.render_quality,
            "seed": seed,
            "random": job.random,
        }
        write_episode(episodes, job.episode, arrays, meta)
    returns = []
    watch = Violations(signal) if signal is not None and job.evaluations else None
    if job.evaluations:
        returns = evaluate_together(
            agent,
            more_envs(envs, config, job.evaluations),
            [episode_seed(config.seed, "evaluate", i) for i in range(job.evaluations)],
            Path(job.video) if job.video else None,
            config.eval.controller,
            watches=[_watching(watch, sign)] * job.evaluations,
        )
    return Result(episode_return, returns, episode_safety, safety_rates(watch, None))


def _watching(watch: Watch | None, sign: Callable[[], None]) -> Watch:
    def look(*step: Any) -> None:
        sign()
        if watch is not None:
            watch(*step)

    return look
