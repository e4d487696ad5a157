"""How well the reward heads know what they do not know: a table and its picture."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fastdreamer.analysis.viz.figure import COLOURS, STYLE, save_figure
from fastdreamer.files import write_csv


def write_calibration(rows: Iterable[Any], out: Path) -> Path:
    """Write what `analysis.calibration.calibrate_episodes` found as CSV, a row per decisions ahead.

    Columns: ahead, count, rmse, spread, scale (factor on the spread that brings 90 % of the true
    rewards inside the 90 % interval), then coverage_50 and so on, shares. Returns out.
    """
    table = [
        {
            **{name: getattr(row, name) for name in ("ahead", "count", "rmse", "spread", "scale")},
            **{f"coverage_{100 * level:g}": share for level, share in row.coverage.items()},
        }
        for row in rows
    ]
    return write_csv(Path(out), table)


def calibration_figure(table: Path, out: Path) -> Path:
    """Draw the share of true rewards inside an interval against the interval's nominal level.

    table: a file of `write_calibration`. out: .png, .svg or .pdf. Returns out.
    """
    with Path(table).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], color="#8c8c8c", lw=1, ls="--", label="calibrated")
        for i, row in enumerate(rows):
            points = {float(n[9:]): 100 * float(v) for n, v in row.items() if n[:9] == "coverage_"}
            ahead = "1 decision" if row["ahead"] == "1" else f"{row['ahead']} decisions"
            label = "filtered" if row["ahead"] == "0" else f"{ahead} ahead"
            axes.plot(points.keys(), points.values(), "o-", color=COLOURS[i % 7], label=label)
        axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="nominal level, %")
        axes.set_ylabel("true rewards inside the interval, %")
        axes.legend(loc="upper left", fontsize=9)
        return save_figure(figure, Path(out))
