"""Methods side by side, from the CSV of `fastdreamer compare`."""

from __future__ import annotations

import csv
import json
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fastdreamer.analysis.viz.figure import COLOURS, STYLE, save_figure, thousands
from fastdreamer.errors import ArgumentError


def read_comparison(path: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, np.ndarray]]]]:
    """Read the CSV of `fastdreamer compare`.

    Returns its settings, and for each method its seeds' curves: columns by name, each [n] float64,
    in the order of env frames. Raises ValueError naming a file that is none.
    """
    try:
        first, *lines = path.read_text("utf-8").splitlines()
        about = json.loads(first.removeprefix("# "))
        curves: dict[str, dict[str, list[dict[str, str]]]] = {}
        for row in csv.DictReader(lines):
            curves.setdefault(row.pop("method"), {}).setdefault(row.pop("seed"), []).append(row)
        columns = ("env_frames", "seconds", "return_mean")
        return about, {
            method: [{c: np.array([float(row[c]) for row in rows]) for c in columns}
                     for rows in seeds.values()]
            for method, seeds in curves.items()
        }  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentError(f"{path}: not a comparison: {error}") from error


def mean_and_std(
    curves: list[dict[str, np.ndarray]], axis: str, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over seeds of the return at points of an axis.

    curves: of one method, as `read_comparison` returns them. axis: "env_frames" or "seconds".
    points: [n]. Between evaluations by straight lines. Returns two arrays [n], NaN where some seed
    has no evaluation on both sides.
    """
    values = [
        np.interp(points, curve[axis], curve["return_mean"], left=np.nan, right=np.nan)
        for curve in curves
    ]
    return np.mean(values, axis=0), np.std(values, axis=0)


def comparison_figure(path: Path, out: Path, labels: dict[str, str]) -> Path:
    """Draw a comparison twice: return against env frames, and against time of training.

    path: the CSV of `fastdreamer compare`. out: .png, .svg or .pdf. labels: of methods by name.
    Lines are means over seeds, bands ±1 standard deviation over seeds where there are several.
    Returns out. Raises ValueError as `read_comparison`.
    """
    about, methods = read_comparison(path)
    every = [curve for curves in methods.values() for curve in curves]
    longest = max(curve["seconds"][-1] for curve in every)
    negative = any((curve["return_mean"] < 0).any() for curve in every)
    unit, name = (60, "minutes") if longest < 2 * 3600 else (3600, "hours")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for (method, curves), colour in zip(methods.items(), cycle(COLOURS), strict=False):
            seeds = f"{len(curves)} seed{'s' if len(curves) > 1 else ''}"
            for axes, axis, scale in zip(panels, ("env_frames", "seconds"), (1, unit), strict=True):
                points = np.unique(np.concatenate([curve[axis] for curve in curves]))
                mean, std = mean_and_std(curves, axis, points)
                if len(curves) > 1:
                    axes.fill_between(
                        points / scale, mean - std, mean + std, color=colour, alpha=0.18, lw=0
                    )
                label = f"{labels.get(method, method)} ({seeds})"
                axes.plot(points / scale, mean, color=colour, lw=2, marker="o", ms=3, label=label)
        for axes in panels:
            axes.set_xlim(left=0)
            if not negative:  # as nothing is in the suite
                axes.set_ylim(bottom=0)
        panels[0].xaxis.set_major_formatter(FuncFormatter(lambda frames, _: thousands(frames)))
        panels[0].set_xlabel("env frames")
        panels[1].set_xlabel(f"{name} of training, evaluation not counted")
        panels[0].set_ylabel(f"return (mean of {about['eval_episodes']} episodes)")
        title = f"{about['task']} from {about['obs']}"
        panels[0].set_title(title, loc="left", fontweight="bold")
        several = any(len(curves) > 1 for curves in methods.values())
        note = "band: ±1 std of seeds" if several else "one seed: no band"
        panels[1].set_title(note, loc="right", fontsize=9, color="#6e6e6e")
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=min(len(methods), 5), fontsize=9)
        return save_figure(figure, Path(out))
