"""``fastdreamer report``: the report's figures from a run's snapshots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from fastdreamer.analysis.report import POINTS, write_report
from fastdreamer.cli.run import Backend
from fastdreamer.config import PlanConfig


@dataclass
class Report:
    """Draw the report's Figures 3, 4 and 5 from a run's snapshots; what is done is not done again.

    The same episodes are played by the actor and by MPC at points along the run. The planner starts
    from the run's own settings, not from the defaults below.
    """

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run directory; its snapshots are evaluated (its checkpoints where it has none)."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("report")
    """Where figures, curves and episodes.csv go; episodes found there are not played again."""
    controllers: tuple[Literal["actor", "mpc", "planet"], ...] = ()
    """Who plays; default: actor and mpc, or planet for a PlaNet agent."""
    episodes: int = 10
    """Episodes a snapshot and controller, without exploration noise."""
    points: int = POINTS
    """Snapshots used at most, spread evenly over the run; 0: all."""
    seed: int = 0
    """Seeds the episodes."""
    threads: int = 0
    """Episodes played side by side, on a thread each; 0: one a core, ten at most."""
    task: str = ""
    """Of a run whose task is a function of yours: module:function again, to have it imported."""
    backend: Backend = "run"
    """Who computes the recurrent loops; run: who did in training, collection included."""
    plan: PlanConfig = field(default_factory=PlanConfig)


def run_report(command: Report, say: Callable[[str], None]) -> None:
    files = write_report(
        command.run,
        command.out,
        controllers=command.controllers,
        episodes=command.episodes,
        points=command.points,
        seed=command.seed,
        threads=command.threads,
        plan=command.plan,
        say=say,
    )
    for path in files:
        say(f"wrote {path}")
