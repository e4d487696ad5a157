"""The collector: episodes and evaluations, in a worker process beside training.

The hand-over is deterministic: a job names the episode, the weights travel with it, the worker
seeds everything from the configuration's seed and the episode's index, and the trainer waits for
the result at a fixed update. Timing changes nothing but the time.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from fastdreamer.config import Config, from_dict, to_dict
from fastdreamer.episodes import write_episode
from fastdreamer.ops.backend import kernel_choice, settle_kernels
from fastdreamer.play import (
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
from fastdreamer.policy import Policy
from fastdreamer.safety import Violations, safety_rates

_log = logging.getLogger("fastdreamer")
POLICY_PARTS = ("model.encoder.", "model.rssm.", "actor.")
"""Prefixes of the weights that the actor needs to act."""
PLANNER_PARTS = ("model.encoder.", "model.rssm.", "model.reward.")
"""Prefixes of the weights that planning needs; ranking by λ-return needs those as well, with which
what comes later is valued."""
CRITIC_PARTS = ("critic.", "target_critic.", "model.discount.")


class CollectorError(RuntimeError):
    """The worker process failed; the message holds its traceback or exit code."""


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

    Args:
        config: of the run.
        episodes: directory that receives the episode files.

    Raises:
        CollectorError: the worker could not start (no GL backend, for example).
    """

    def __init__(self, config: Config, episodes: Path) -> None:
        self._config, self._episodes = config, episodes
        self._pending: tuple[Job, bytes] | None = None
        header = self._start()
        self.obs_shapes = {kind: tuple(s) for kind, s in header["obs_shapes"].items()}
        self.action_dim: int = header["action_dim"]

    def _start(self) -> dict[str, Any]:
        """Start the worker; return what it says about the environment."""
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
        try:
            return self._receive()
        except EOFError:
            raise self._died("while it started") from None

    def submit(self, job: Job, weights: Mapping[str, Tensor]) -> None:
        """Start a job; ``wait()`` for it before the next."""
        if self._pending is not None:
            raise CollectorError("a job is already under way")
        self._pending = (job, save_bytes({k: v.cpu().contiguous() for k, v in weights.items()}))
        self._send()

    def ready(self, timeout: float) -> bool:
        """Whether ``wait()`` would return at once; gives it up to so many seconds."""
        return self._connection.poll(timeout)

    def wait(self) -> Result:
        """Block until the job is done.

        A worker that died (out of memory, killed) is started once more: a job is a pure function
        of its inputs.

        Raises:
            CollectorError: the job failed, or the worker died twice.
        """
        if self._pending is None:
            raise CollectorError("no job is under way")
        try:
            answer = self._receive()
        except EOFError:
            self._process.join()
            _log.warning(
                "the collector died (exit code %s); starting it again", self._process.exitcode
            )
            self._connection.close()
            self._start()
            self._send()
            try:
                answer = self._receive()
            except EOFError:
                raise self._died("twice at the same job") from None
        self._pending = None
        return Result(**answer)

    def close(self) -> None:
        """End the worker; a job under way is dropped."""
        self._connection.close()
        self._process.terminate()
        self._process.join()

    def _send(self) -> None:
        job, weights = self._pending
        try:
            self._connection.send_bytes(json.dumps(asdict(job)).encode())
            self._connection.send_bytes(weights)
        except OSError:
            pass  # the worker is dead: wait() finds out and starts it again

    def _died(self, when: str) -> CollectorError:
        self._process.join()
        return CollectorError(f"the collector died {when} (exit code {self._process.exitcode})")

    def _receive(self) -> dict[str, Any]:
        try:
            answer = json.loads(self._connection.recv_bytes())
        except ConnectionError as error:
            raise EOFError from error
        if "error" in answer:
            raise CollectorError(f"the collector failed:\n{answer['error']}")
        return answer


def policy_weights(agent: Policy) -> dict[str, Tensor]:
    """A copy of the weights that the worker acts with, on the CPU, by name."""
    parts = policy_parts(agent.config)
    return {
        name: value.detach().to("cpu", copy=True)
        for name, value in agent.state_dict().items()
        if name.startswith(parts)
    }


def policy_parts(config: Config) -> tuple[str, ...]:
    """Prefixes of the weights that collecting and evaluating need."""
    own = ("guard.barrier.",) if config.safety.shield else ()
    if config.explore.method == "ucb":
        own += ("explorer.",)
    if config.agent == "planet":
        return PLANNER_PARTS + own
    asked = {config.collect.controller, config.eval.controller}
    planner = PLANNER_PARTS if asked & {"mpc", "mixed", "planet"} else ()
    return POLICY_PARTS + own + planner + (CRITIC_PARTS if asked & {"mpc", "mixed"} else ())


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

    def send(answer: dict[str, Any]) -> None:
        connection.send_bytes(json.dumps(answer).encode())

    try:
        try:
            env = config_env(config)
            send({"obs_shapes": env.obs_shapes, "action_dim": env.action_dim})
            agent, envs = None, [env]
            while True:
                job = Job(**json.loads(connection.recv_bytes()))
                weights = load_bytes(connection.recv_bytes())
                if agent is None:
                    agent = Policy(own, env.obs_shapes, env.action_dim)
                if weights:
                    agent.load_state_dict(weights, strict=False)
                with run_backend(own):
                    result = _run_job(job, config, agent, envs, Path(episodes))
                send(asdict(result))
        except (EOFError, ConnectionError):
            return  # the trainer is gone
        except Exception:
            send({"error": traceback.format_exc()})
    except (EOFError, OSError):
        return


def _exit_with_trainer() -> None:
    """A killed trainer wants no answer: leave at once, in the middle of whatever job."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_job(job: Job, config: Config, agent: Policy, envs: list, episodes: Path) -> Result:
    """``envs``: at least one; more are made for evaluations, and kept."""
    env, episode_return, episode_safety = envs[0], None, {}
    signal = agent.guard.signal if agent.guard is not None else None
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
                explore=agent.explorer is not None,
                shield=shield,
            )
        )
        watch = Violations(signal) if signal is not None else None
        arrays, frames = collect(env, policy, seed, watch)
        episode_safety = safety_rates(watch, shield)
        episode_return = float(arrays["reward"].sum(dtype=np.float64))
        meta = {
            "env_frames": frames,
            "return": episode_return,
            "task": config.env.task,
            "action_repeat": config.env.action_repeat,
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
            watches=[watch] * job.evaluations if watch is not None else [],
        )
    return Result(episode_return, returns, episode_safety, safety_rates(watch, None))
