"""``fastdreamer plot``: learning curves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from fastdreamer.config import ConfigError
from fastdreamer.viz.curves import export_csv, plot_runs


@dataclass
class Plot:
    """Draw the report's Figure 3: return against env frames, published curves dashed."""

    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN")]
    """Run directories, or CSV curves that --csv wrote."""
    out: Annotated[Path, tyro.conf.arg(metavar="PNG")] = Path("curves.png")
    """The picture (.png, .svg or .pdf)."""
    published: bool = True
    """Draw published Walker curves where the task has some."""
    csv: Annotated[Path | None, tyro.conf.arg(metavar="CSV")] = None
    """Also write the curve of the (only) run as CSV."""


def run_plot(command: Plot, say: Callable[[str], None]) -> None:
    if command.csv and len(command.runs) != 1:
        raise ConfigError("--csv writes the curve of one run; name one RUN")
    out = plot_runs(list(command.runs), command.out, published=command.published)
    say(f"picture: {out}")
    if command.csv:
        table = export_csv(command.runs[0], command.csv)
        say(f"curve: {table}")
