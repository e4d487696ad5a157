"""``fastdreamer plot``: learning curves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from fastdreamer.analysis.viz.curves import Axis, export_csv, plot_runs
from fastdreamer.cli.seeds import runs_of
from fastdreamer.config import ConfigError
from fastdreamer.training.checkpoint import runs_within
from fastdreamer.training.logger import METRICS_FILE
from fastdreamer.training.trainer import RunError


@dataclass
class Plot:
    """Draw the report's Figure 3: return against env frames, published curves dashed.

    Or against minutes, and several seeds of one setting as one curve with a band.
    """

    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN")]
    """Run directories, CSV curves that --csv wrote, or folders of runs that --seeds made."""
    out: Annotated[Path, tyro.conf.arg(metavar="PNG")] = Path("curves.png")
    """The picture (.png, .svg or .pdf)."""
    published: bool = True
    """Draw published Walker curves where the task has some (over env frames alone)."""
    axis: Axis = "frames"
    """Return against env frames, or against minutes of the wall clock since the run's start."""
    band: bool = False
    """Join the runs of a task and kind of observation: the mean of their evaluations, ±1 standard
    deviation over runs. A folder that --seeds made is a band of its own."""
    csv: Annotated[Path | None, tyro.conf.arg(metavar="CSV")] = None
    """Also write the curve of the (only) run as CSV."""


def run_plot(command: Plot, say: Callable[[str], None]) -> None:
    runs = [run for path in command.runs for run in runs_of(path).values() or [path]]
    for run in runs:
        if not (run / METRICS_FILE).exists() and (hint := runs_within(run)):
            raise RunError(f"{run} is not a run directory (no {METRICS_FILE}){hint}")
    if command.csv and len(runs) != 1:
        raise ConfigError("--csv writes the curve of one run; name one RUN")
    out = plot_runs(
        runs,
        command.out,
        published=command.published,
        axis=command.axis,
        band=command.band,
    )
    say(f"picture: {out}")
    if command.csv:
        table = export_csv(runs[0], command.csv)
        say(f"curve: {table}")
