"""``fastdreamer compare``: methods side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional

from fastdreamer.analysis.compare import compare
from fastdreamer.analysis.compare.records import Settings
from fastdreamer.config import PRESETS
from fastdreamer.envs import canonical_task
from fastdreamer.learning.dreamer import NonFiniteLoss
from fastdreamer.training.cluster import connected
from fastdreamer.training.trainer import RunError


@dataclass
class Compare:
    """Compare methods on one task: the same environment, evaluation, seeds and env frames.

    For example: fastdreamer compare walker-stand --methods dreamer,sac,ppo --frames 100000

    Writes a CSV, a plot and a table: return at env frames and after hours of training. The same
    command goes on with what is missing; more methods and seeds can be added to a directory.
    """

    task: Annotated[Positional[str], tyro.conf.arg(metavar="TASK")]
    """DeepMind Control task, domain-task; walker is walker-walk."""
    methods: Annotated[str, tyro.conf.arg(metavar="NAME,NAME,...")] = "dreamer,sac,ppo"
    """Among dreamer, dreamer-mpc (the same runs, planning), planet, sac, ppo; the last two need the
    extra `compare` (stable-baselines3)."""
    obs: Literal["state", "pixels"] = "state"
    """What every method sees; sac and ppo learn from state only."""
    frames: int = 100_000
    """Env frames of every run."""
    seeds: int = 3
    """Runs of every method, with seeds 0, 1, ..."""
    eval_every: int = 10_000
    """Env frames between evaluations."""
    eval_episodes: int = 5
    """Greedy episodes of an evaluation, the same ones for every method."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="|".join(PRESETS))] = None
    """Dreamer's settings and everyone's environment; default: state or, from pixels, walker."""
    threads: int = 0
    """CPU threads of every learner; 0: as in train."""
    device: str = "auto"
    """Where every learner computes: auto, cpu, cuda or cuda:N; auto: a GPU that can run, or cpu."""
    ray: Annotated[str | None, tyro.conf.arg(metavar="auto|local|HOST:PORT")] = None
    """Train methods and seeds side by side, as tasks of a Ray cluster: the one that runs here, one
    that is started on this machine, or another that it has joined."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory of the comparison; default: runs/compare-TASK-OBS."""


def run_compare(command: Compare, say: Callable[[str], None]) -> None:
    task = canonical_task(command.task)
    settings = Settings(
        task=task,
        obs=command.obs,
        frames=command.frames,
        eval_every=command.eval_every,
        eval_episodes=command.eval_episodes,
        preset=command.preset or {"state": "state", "pixels": "walker"}[command.obs],
        threads=command.threads,
        device=command.device,
    )
    methods = [name.strip() for name in command.methods.split(",") if name.strip()]
    out = command.out or Path("runs") / f"compare-{task}-{command.obs}"
    try:
        with contextlib.ExitStack() as stack:
            cluster = stack.enter_context(connected(command.ray)) if command.ray else None
            results = compare(
                out, settings, methods, command.seeds, console=Console(), cluster=cluster
            )
    except NonFiniteLoss as error:
        raise RunError(f"compare: the {error} in the run named last") from error
    for name, path in zip(("curves", "picture", "table"), results, strict=True):
        say(f"{name}: {path}")
    say(results[-1].read_text("utf-8"))
