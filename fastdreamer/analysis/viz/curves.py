"""Learning curves: return against env frames (report, Figure 3) or minutes, of runs and CSVs."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fastdreamer.analysis.viz.comparison import mean_and_std
from fastdreamer.analysis.viz.figure import COLOURS, STYLE, save_figure, thousands
from fastdreamer.errors import ArgumentError
from fastdreamer.files import write_csv
from fastdreamer.training.logger import METRICS_FILE, SEEDS_FILE, read_metrics

_DASHES = ("--", ":", "-.")  # one per task
# Published method in the CSV: label, and the marker and grey that tell it from the others.
_METHODS = {
    "report-actor": ("course report, actor", "o", "#4d4d4d"),
    "report-mpc": ("course report, MPC", "s", "#6e6e6e"),
    "dreamer-v1": ("Dreamer (V1)", "^", "#8c8c8c"),
    "dreamer-v2": ("DreamerV2", "D", "#5e5e5e"),
    "dreamer-v3": ("DreamerV3", "v", "#7d7d7d"),
}
Axis = Literal["frames", "minutes"]
_AXES = {"frames": ("env_frames", 1, "env frames"), "minutes": ("seconds", 60, "minutes")}
"""An axis: its column, how many of that make one, and its name."""
# Columns of a curve file and keys of a curve's rows.
_CSV_COLUMNS = ("kind", "env_frames", "update", "seconds", "return_mean", "return_std", "episodes")


@dataclass(frozen=True)
class _Curve:
    """One run: rows of `_CSV_COLUMNS`, kind "eval" (mean of episodes) or "episode" (training)."""

    name: str
    task: str | None  # "walker-walk"
    obs: str | None  # "pixels", "state" or both
    rows: list[dict[str, Any]]
    setting: str | None = None  # the folder of the seeds of one setting, where it is in one

    def of_kind(self, kind: str, axis: Axis) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Place on the axis, return mean and return std of one kind's rows, each [n] float64."""
        rows = [row for row in self.rows if row["kind"] == kind]
        column, unit, _ = _AXES[axis]
        columns = (column, "return_mean", "return_std")
        place, *returns = (np.array([r[c] for r in rows], dtype=np.float64) for c in columns)
        return place / unit, *returns

    @property
    def label(self) -> str:
        obs = "pixels and state" if self.obs == "both" else self.obs
        about = " from ".join(part for part in (self.task, obs) if part)
        return f"{self.name} ({about})" if about else self.name


def plot_runs(
    runs: list[Path],
    out: Path,
    *,
    published: bool = True,
    task: str | None = None,
    axis: Axis = "frames",
    band: bool = False,
) -> Path:
    """Plot return against env frames (report, Figure 3), or against minutes of training.

    runs: run directories, or CSV files with at least the columns env_frames and return_mean (as
    `export_csv` writes them). Evaluations are solid with a band of ±1 standard deviation over
    their episodes; single training episodes are thin and light.
    out: .png, .svg or .pdf.
    published: draw the published Walker curves dashed; they are over env frames alone.
    task: "walker-walk" and so on, where it is not to be taken from the runs; published curves
    appear for Walker tasks only.
    axis: "minutes" is the wall clock since the run's start.
    band: join the runs of a task and kind of observation, seeds of one setting, into one curve, the
    mean of their evaluations, with a band of ±1 standard deviation over runs. What
    ``fastdreamer train --seeds`` made is a curve a folder, which it is named after.
    Returns out. Raises ValueError naming a run that cannot be read, holds no returns yet, or lacks
    what the axis or the band asks for.
    """
    out = Path(out)
    curves = [_read_curve(Path(run)) for run in runs]
    if not curves:
        raise ArgumentError("plot_runs: no run given")
    if axis == "minutes":
        published = False
        for curve in curves:
            if not any(row["seconds"] for row in curve.rows):
                raise ArgumentError(f"{curve.name}: its curve has no seconds to draw minutes from")
    if band:
        curves = _joined(curves, axis)
    tasks = [task] if task else sorted({curve.task for curve in curves if curve.task})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.8), layout="constrained")
        axes = figure.subplots()
        tops = [
            _draw_run(axes, curve, COLOURS[i % len(COLOURS)], axis)
            for i, curve in enumerate(curves)
        ]
        column, unit, name = _AXES[axis]
        end = 1.03 * max(row[column] / unit for curve in curves for row in curve.rows)
        walker = [name for name in tasks if name.startswith("walker-")] if published else []
        if walker:
            end = max(end, 103_000)  # most published curves begin at 100k
        for walker_task, dash in zip(walker, _DASHES, strict=False):
            tops.append(_draw_published(axes, walker_task, dash, end))
        axes.set_xlim(0, max(end, 1))
        low = min([0.0, *(row["return_mean"] for c in curves for row in c.rows if _seen(row))])
        axes.set_ylim(1.06 * low, 1.06 * max(*tops, 1 if low == 0 else 0))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda frames, _: thousands(frames)))
        axes.set_xlabel(name)
        axes.set_ylabel(_return_label(curves))
        axes.set_title(", ".join(tasks), loc="left", fontweight="bold")
        over = "runs" if band else "episodes"
        notes = {"thin: single training episodes": "episode", f"band: ±1 std of {over}": "eval"}
        kinds = {row["kind"] for curve in curves for row in curve.rows}
        note = "; ".join(text for text, kind in notes.items() if kind in kinds)
        axes.set_title(note, loc="right", fontsize=9, color="#6e6e6e")
        longest = max(len(label) for label in axes.get_legend_handles_labels()[1])
        columns = 2 if longest <= 52 else 1  # what the figure's width holds
        figure.legend(loc="outside lower center", ncols=columns, fontsize=9)
        return save_figure(figure, out)


def published_curves(task: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The published learning curves on Walker from 64×64 pixels.

    task: "walk", "stand" or "run". Returns (label, env frames [n], mean returns [n]) per method,
    float64; empty for another task. The file's first line names the sources.
    """
    return [(_METHODS[method][0], *curve) for method, curve in _published(task).items()]


def _published(task: str) -> dict[str, np.ndarray]:
    """Method to [2, n]: env frames and mean returns."""
    text = resources.files("fastdreamer").joinpath("data/walker_pixels.csv").read_text("utf-8")
    points: dict[str, list[tuple[float, float]]] = {}
    for row in csv.DictReader(line for line in text.splitlines() if not line.startswith("#")):
        if row["task"] == task:
            point = (float(row["env_frames"]), float(row["mean_return"]))
            points.setdefault(row["method"], []).append(point)
    return {method: np.array(curve).T for method, curve in points.items()}


def export_csv(run: Path, out: Path) -> Path:
    """Write the curve of a run as CSV, one row per training episode and evaluation.

    Columns: kind ("episode" or "eval"), env_frames, update, seconds (wall clock since the run's
    start), return_mean, return_std (0 for one episode), episodes (how many the mean is over); the
    first line is a comment that names run, task and observations. Returns out. Raises ValueError
    as `plot_runs`.
    """
    curve = _read_curve(Path(run))
    about = {"run": curve.name, "task": curve.task, "obs": curve.obs, "setting": curve.setting}
    return write_curve(Path(out), about, curve.rows)


def write_curve(out: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write a curve as `export_csv` does; rows hold its columns. Returns out."""
    about = {name: value for name, value in about.items() if value}
    return write_csv(out, rows, columns=_CSV_COLUMNS, about=about)


def _read_curve(run: Path) -> _Curve:
    """Read a run directory or a CSV file; ArgumentError names one that cannot be drawn."""
    if not run.exists():
        raise ArgumentError(f"{run}: no such run")
    try:
        curve = _read_run(run) if run.is_dir() else _read_csv(run)
    except KeyError as error:
        raise ArgumentError(f"{run}: cannot read its curve: no value {error}") from error
    except (OSError, ValueError, TypeError) as error:
        raise ArgumentError(f"{run}: cannot read its curve: {error}") from error
    if not curve.rows:
        raise ArgumentError(f"{run}: holds no finished episode or evaluation yet")
    return curve


def _read_run(run: Path) -> _Curve:
    if not (run / METRICS_FILE).exists():
        raise ValueError(f"not a run directory, it has no {METRICS_FILE}")
    env = json.loads((run / "config.json").read_text("utf-8"))["env"]
    rows = []
    for record in read_metrics(run):
        if record["kind"] == "episode":
            record |= {"return_mean": record["return"], "return_std": 0.0, "episodes": 1}
        if record["kind"] in ("episode", "eval"):
            rows.append({column: record[column] for column in _CSV_COLUMNS})
    folder = run.resolve().parent
    setting = folder.name if (folder / SEEDS_FILE).is_file() else None
    return _Curve(run.resolve().name, env["task"], env["obs"], rows, setting)


def _read_csv(path: Path) -> _Curve:
    about: dict[str, str] = {}
    lines = path.read_text("utf-8").splitlines()
    if lines and lines[0].startswith("# {"):
        about = json.loads(lines[0][2:])
    reader = csv.DictReader(line for line in lines if not line.startswith("#"))
    missing = {"env_frames", "return_mean"} - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"no column {' and '.join(sorted(missing))}")
    rows = [
        {
            "kind": row.get("kind") or "eval",
            "env_frames": int(row["env_frames"]),
            "update": int(row.get("update") or 0),
            "seconds": float(row.get("seconds") or 0.0),
            "return_mean": float(row["return_mean"]),
            "return_std": float(row.get("return_std") or 0.0),
            "episodes": int(row.get("episodes") or 1),
        }
        for row in reader
    ]
    name, *rest = about.get("run", path.stem), about.get("task"), about.get("obs")
    return _Curve(name, *rest, rows, about.get("setting"))


def _joined(curves: list[_Curve], axis: Axis) -> list[_Curve]:
    """One curve of evaluations a setting, task and kind of observation: mean and std over runs.

    Between evaluations by straight lines, where all runs of a group have some on both sides.
    """
    column = _AXES[axis][0]
    groups: dict[tuple[str | None, ...], list[tuple[dict[str, np.ndarray], int]]] = {}
    for curve in curves:
        rows = [row for row in curve.rows if row["kind"] == "eval"]
        if not rows:
            raise ArgumentError(f"{curve.name}: holds no evaluation, of which a band is made")
        found = {c: np.array([row[c] for row in rows], np.float64) for c in (column, "return_mean")}
        group = groups.setdefault((curve.setting, curve.task, curve.obs), [])
        group.append((found, rows[0]["episodes"]))
    joined, several = [], len({setting for setting, *_ in groups}) > 1
    for (setting, task, obs), found in groups.items():
        runs, episodes = [run for run, _ in found], max(n for _, n in found)
        points = np.unique(np.concatenate([run[column] for run in runs]))
        mean, std = mean_and_std(runs, column, points)
        rows = [
            {
                "kind": "eval",
                "env_frames": 0,
                "seconds": 0,
                column: point,
                "return_mean": m,
                "return_std": s,
                "episodes": episodes,
            }
            for point, m, s in zip(points, mean, std, strict=True)
            if np.isfinite(m)
        ]
        if not rows:
            raise ArgumentError(f"{task} from {obs}: the runs have no stretch of {axis} in common")
        name = f"{len(runs)} run{'s' * (len(runs) > 1)}"
        name = f"{setting}: {name}" if several and setting else name
        joined.append(_Curve(name, task, obs, rows, setting))
    return joined


def _seen(row: dict[str, Any]) -> bool:
    return bool(np.isfinite(row["return_mean"]))


def _draw_run(axes: Any, curve: _Curve, colour: str, axis: Axis) -> float:
    """Draw one run and return the highest point that must be seen."""
    frames, returns, _ = curve.of_kind("episode", axis)
    eval_frames, mean, std = curve.of_kind("eval", axis)
    evaluated = len(eval_frames) > 0
    axes.plot(
        frames,
        returns,
        color=colour,
        lw=0.8,
        alpha=0.4 if evaluated else 0.8,
        marker="." if len(frames) < 3 else None,
        label=None if evaluated else curve.label,
    )
    if evaluated:
        axes.fill_between(eval_frames, mean - std, mean + std, color=colour, alpha=0.18, lw=0)
        marker = "o" if len(eval_frames) <= 40 else None
        axes.plot(eval_frames, mean, color=colour, lw=2, marker=marker, ms=4, label=curve.label)
    tops = np.concatenate([returns, mean + std])
    return max(tops[np.isfinite(tops)], default=0.0)


def _draw_published(axes: Any, task: str, dash: str, end: float) -> float:
    """Draw the published curves of a Walker task; returns their highest point up to `end`."""
    top = 0.0
    task = task.removeprefix("walker-")
    for method, (frames, returns) in _published(task).items():
        name, marker, grey = _METHODS[method]
        axes.plot(
            frames,
            returns,
            color=grey,
            lw=1.2,
            ls=dash,
            marker=marker,
            ms=4.5,
            mfc="white",
            label=f"{name}, published ({task}, pixels)",
            zorder=1,  # under the runs
        )
        top = max(top, *returns[frames <= end], 0.0)
    return top


def _return_label(curves: list[_Curve]) -> str:
    counts = sorted({row["episodes"] for c in curves for row in c.rows if row["kind"] == "eval"})
    if not counts:
        return "return (single training episodes)"
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"return (mean of {many} episodes)"
