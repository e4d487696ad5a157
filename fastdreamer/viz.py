"""Figures and videos, made from files and frames only; nothing here opens a window."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from itertools import cycle
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import matplotlib
import numpy as np
from matplotlib.figure import Figure  # not pyplot: a bare Figure knows no windows
from matplotlib.ticker import FuncFormatter

from fastdreamer.files import replacing
from fastdreamer.logger import METRICS_FILE, read_metrics

# Okabe and Ito's palette, told apart with every kind of colour blindness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("--", ":", "-.")  # one per task
# Published method in the CSV: label, and the marker and grey that tell it from the others.
_METHODS = {
    "report-actor": ("course report, actor", "o", "#4d4d4d"),
    "report-mpc": ("course report, MPC", "s", "#6e6e6e"),
    "dreamer-v1": ("Dreamer (V1)", "^", "#8c8c8c"),
    "dreamer-v2": ("DreamerV2", "D", "#5e5e5e"),
    "dreamer-v3": ("DreamerV3", "v", "#7d7d7d"),
}
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "fastdreamer",  # the same data makes the same file
}
# Columns of a curve file and keys of a curve's rows.
_CSV_COLUMNS = ("kind", "env_frames", "update", "seconds", "return_mean", "return_std", "episodes")


@dataclass(frozen=True)
class _Curve:
    """One run: rows of `_CSV_COLUMNS`, kind "eval" (mean of episodes) or "episode" (training)."""

    name: str
    task: str | None  # "walker-walk"
    obs: str | None  # "pixels", "state" or both
    rows: list[dict[str, Any]]

    def of_kind(self, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """env frames, return mean and return std of one kind's rows, each [n] float64."""
        rows = [row for row in self.rows if row["kind"] == kind]
        return tuple(
            np.array([row[column] for row in rows], dtype=np.float64)
            for column in ("env_frames", "return_mean", "return_std")
        )

    @property
    def label(self) -> str:
        obs = "pixels and state" if self.obs == "both" else self.obs
        about = " from ".join(part for part in (self.task, obs) if part)
        return f"{self.name} ({about})" if about else self.name


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


def plot_runs(
    runs: list[Path], out: Path, *, published: bool = True, task: str | None = None
) -> Path:
    """Plot return against env frames (report, Figure 3).

    runs: run directories, or CSV files with at least the columns env_frames and return_mean (as
    `export_csv` writes them). Evaluations are solid with a band of ±1 standard deviation over
    their episodes; single training episodes are thin and light.
    out: .png, .svg or .pdf.
    published: draw the published Walker curves dashed. task: "walker-walk" and so on, where it is
    not to be taken from the runs; published curves appear for Walker tasks only.
    Returns out. Raises ValueError naming a run that cannot be read or holds no returns yet.
    """
    out = Path(out)
    curves = [_read_curve(Path(run)) for run in runs]
    if not curves:
        raise ValueError("plot_runs: no run given")
    tasks = [task] if task else sorted({curve.task for curve in curves if curve.task})
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8, 4.8), layout="constrained")
        axes = figure.subplots()
        tops = [
            _draw_run(axes, curve, _COLOURS[i % len(_COLOURS)]) for i, curve in enumerate(curves)
        ]
        end = 1.03 * max(row["env_frames"] for curve in curves for row in curve.rows)
        walker = [name for name in tasks if name.startswith("walker-")] if published else []
        if walker:
            end = max(end, 103_000)  # most published curves begin at 100k
        for name, dash in zip(walker, _DASHES, strict=False):
            tops.append(_draw_published(axes, name, dash, end))
        axes.set_xlim(0, max(end, 1))
        axes.set_ylim(0, 1.06 * max(*tops, 1))  # no reward of the suite is negative
        axes.xaxis.set_major_formatter(FuncFormatter(lambda frames, _: _thousands(frames)))
        axes.set_xlabel("env frames")
        axes.set_ylabel(_return_label(curves))
        axes.set_title(", ".join(tasks), loc="left", fontweight="bold")
        notes = {"thin: single training episodes": "episode", "band: ±1 std of episodes": "eval"}
        kinds = {row["kind"] for curve in curves for row in curve.rows}
        note = "; ".join(text for text, kind in notes.items() if kind in kinds)
        axes.set_title(note, loc="right", fontsize=9, color="#6e6e6e")
        longest = max(len(label) for label in axes.get_legend_handles_labels()[1])
        columns = 2 if longest <= 52 else 1  # what the figure's width holds
        figure.legend(loc="outside lower center", ncols=columns, fontsize=9)
        return _save(figure, out)


def export_csv(run: Path, out: Path) -> Path:
    """Write the curve of a run as CSV, one row per training episode and evaluation.

    Columns: kind ("episode" or "eval"), env_frames, update, seconds (wall clock since the run's
    start), return_mean, return_std (0 for one episode), episodes (how many the mean is over); the
    first line is a comment that names run, task and observations. Returns out. Raises ValueError
    as `plot_runs`.
    """
    out = Path(out)
    curve = _read_curve(Path(run))
    about = {"run": curve.name, "task": curve.task, "obs": curve.obs}
    return write_curve(out, about, curve.rows)


def write_curve(out: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write a curve as `export_csv` does; rows hold its columns. Returns out."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.write("# " + json.dumps({k: v for k, v in about.items() if v}) + "\n")
        writer = csv.DictWriter(file, _CSV_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return out


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
        raise ValueError(f"{path}: not a comparison: {error}") from error


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
    longest = max(c["seconds"][-1] for curves in methods.values() for c in curves)
    unit, name = (60, "minutes") if longest < 2 * 3600 else (3600, "hours")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for (method, curves), colour in zip(methods.items(), cycle(_COLOURS), strict=False):
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
            axes.set_ylim(bottom=0)
        panels[0].xaxis.set_major_formatter(FuncFormatter(lambda frames, _: _thousands(frames)))
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
        return _save(figure, Path(out))


def write_calibration(rows: Iterable[Any], out: Path) -> Path:
    """Write what `exploration.calibrate_episodes` found as CSV, one row per decisions ahead.

    Columns: ahead, count, rmse, spread, scale (factor on the spread that brings 90 % of the true
    rewards inside the 90 % interval), then coverage_50 and so on, shares. Returns out.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    table = [
        {
            **{name: getattr(row, name) for name in ("ahead", "count", "rmse", "spread", "scale")},
            **{f"coverage_{100 * level:g}": share for level, share in row.coverage.items()},
        }
        for row in rows
    ]
    with replacing(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    return out


def calibration_figure(table: Path, out: Path) -> Path:
    """Draw the share of true rewards inside an interval against the interval's nominal level.

    table: a file of `write_calibration`. out: .png, .svg or .pdf. Returns out.
    """
    with Path(table).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], color="#8c8c8c", lw=1, ls="--", label="calibrated")
        for i, row in enumerate(rows):
            points = {float(n[9:]): 100 * float(v) for n, v in row.items() if n[:9] == "coverage_"}
            ahead = "1 decision" if row["ahead"] == "1" else f"{row['ahead']} decisions"
            label = "filtered" if row["ahead"] == "0" else f"{ahead} ahead"
            axes.plot(points.keys(), points.values(), "o-", color=_COLOURS[i % 7], label=label)
        axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="nominal level, %")
        axes.set_ylabel("true rewards inside the interval, %")
        axes.legend(loc="upper left", fontsize=9)
        return _save(figure, Path(out))


def dream_figure(
    imagined: np.ndarray,
    real: np.ndarray,
    out: Path,
    *,
    columns: int = 10,
    frames_per_column: int | None = None,
) -> Path:
    """Draw the imagined row over the real row under the same actions (report, Figure 4).

    imagined, real: uint8 [T, h, w, 3], one frame per decision. columns: how many frames to show.
    frames_per_column: decisions between neighbouring columns; by default the columns spread over
    all T. Each column is labelled with its decision. Returns out. Raises ValueError for frames of
    another type, shape or unequal length.
    """
    _check_pair("dream_figure", imagined, real)
    length, height, width, _ = real.shape
    if columns < 1 or (frames_per_column is not None and frames_per_column < 1):
        raise ValueError("dream_figure: columns and frames_per_column must be at least 1")
    if frames_per_column is None:
        shown = np.unique(np.linspace(0, length - 1, columns).round().astype(int))
    else:
        shown = np.arange(0, length, frames_per_column)[:columns]
    cell = 1.0  # inch per frame
    with matplotlib.rc_context(_STYLE | {"axes.grid": False}):
        size = (0.9 + cell * len(shown), 0.45 + 2 * cell * height / width)
        figure = Figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
        grid = figure.subplots(2, len(shown), squeeze=False)
        for row, (name, frames) in enumerate((("imagined", imagined), ("real", real))):
            for axes, index in zip(grid[row], shown, strict=True):
                axes.imshow(frames[index], interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                if row == 1:
                    axes.set_xlabel(f"{index}", fontsize=9)
            grid[row, 0].set_ylabel(name, fontsize=10)
        figure.supxlabel("decision", fontsize=9)
        return _save(figure, Path(out))


def state_figure(imagined: np.ndarray, real: np.ndarray, out: Path, *, panels: int = 6) -> Path:
    """Draw imagined and real state components under the same actions: Figure 4 without images.

    imagined, real: [T, n], one row per decision. panels: how many components to show, those that
    really move most. Returns out. Raises ValueError for another shape or unequal ones.
    """
    if imagined.ndim != 2 or imagined.shape != real.shape or not imagined.size or panels < 1:
        got = f"{list(imagined.shape)} and {list(real.shape)}, {panels} panels"
        raise ValueError(f"state_figure: imagined and real must both be [T, n], got {got}")
    shown = np.sort(np.argsort(-real.std(0), kind="stable")[:panels])
    with matplotlib.rc_context(_STYLE):
        rows = -(-len(shown) // 2)
        figure = Figure(figsize=(8, 0.8 + 1.4 * rows), layout="constrained")
        grid = figure.subplots(rows, 2, sharex=True, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        for axes, index in zip(grid.flat, shown, strict=False):
            axes.plot(real[:, index], color=_COLOURS[-1], lw=1.2, label="real")
            axes.plot(imagined[:, index], color=_COLOURS[1], lw=1.2, ls="--", label="imagined")
            axes.set_ylabel(f"state {index}", fontsize=9)
        figure.supxlabel("decision", fontsize=9)
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
        return _save(figure, Path(out))


def dream_video(imagined: np.ndarray, real: np.ndarray, out: Path, fps: float) -> Path:
    """Write a video of the imagined frames above the real ones, a thin line between.

    imagined, real: uint8 [T, h, w, 3], one frame per decision. out: .mp4. fps: decisions per
    second. Small frames are enlarged by a whole factor to about 256 pixels. Returns out. Raises
    ValueError as `dream_figure`.
    """
    _check_pair("dream_video", imagined, real)
    scale = max(1, 256 // max(real.shape[1:3]))
    line = np.full((max(2, scale), real.shape[2] * scale, 3), 255, np.uint8)

    def large(frame: np.ndarray) -> np.ndarray:
        return frame.repeat(scale, axis=0).repeat(scale, axis=1)

    stacked = (
        np.concatenate([large(top), line, large(bottom)])
        for top, bottom in zip(imagined, real, strict=True)
    )
    return write_video(out, stacked, fps)


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float) -> Path:
    """Write frames as an mp4 (H.264, yuv420p) that every player shows.

    path: .mp4; appears only when complete. frames: uint8 [h, w, 3], all of one size; an odd size
    is padded to even by repeating the last row or column. fps: frames per second.
    Returns path. Raises ValueError when there is no frame or one of another type or size.
    """
    path = Path(path)
    if path.suffix != ".mp4":
        raise ValueError(f"write_video: the file name must end in .mp4, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = None
    writer = None
    with replacing(path) as temporary:
        try:
            for frame in frames:
                frame = np.asarray(frame)
                if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                    got = f"{frame.dtype} {list(frame.shape)}"
                    raise ValueError(f"write_video: frames must be uint8 [h, w, 3], got {got}")
                if shape not in (None, frame.shape):
                    got = f"{list(shape)} and {list(frame.shape)}"
                    raise ValueError(f"write_video: frames must be of one size, got {got}")
                shape = frame.shape
                even = np.pad(frame, ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0)), mode="edge")
                if writer is None:
                    writer = imageio_ffmpeg.write_frames(
                        str(temporary),
                        (even.shape[1], even.shape[0]),
                        fps=fps,
                        codec="libx264",
                        pix_fmt_out="yuv420p",
                        quality=8,
                        macro_block_size=2,
                    )
                    writer.send(None)
                writer.send(np.ascontiguousarray(even))
        finally:
            if writer is not None:
                writer.close()
        if shape is None:
            raise ValueError(f"write_video: no frames for {path}")
    return path


def _read_curve(run: Path) -> _Curve:
    """Read a run directory or a CSV file; ValueError names one that cannot be drawn."""
    if not run.exists():
        raise ValueError(f"{run}: no such run")
    try:
        curve = _read_run(run) if run.is_dir() else _read_csv(run)
    except KeyError as error:
        raise ValueError(f"{run}: cannot read its curve: no value {error}") from error
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{run}: cannot read its curve: {error}") from error
    if not curve.rows:
        raise ValueError(f"{run}: holds no finished episode or evaluation yet")
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
    return _Curve(run.resolve().name, env["task"], env["obs"], rows)


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
    return _Curve(about.get("run", path.stem), about.get("task"), about.get("obs"), rows)


def _draw_run(axes: Any, curve: _Curve, colour: str) -> float:
    """Draw one run and return the highest point that must be seen."""
    frames, returns, _ = curve.of_kind("episode")
    eval_frames, mean, std = curve.of_kind("eval")
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


def _thousands(frames: float) -> str:
    """250000 as "250k", 1500000 as "1.5M"."""
    if abs(frames) >= 1_000_000:
        return f"{frames / 1_000_000:g}M"
    return f"{frames / 1000:g}k" if abs(frames) >= 1000 else f"{frames:g}"


def _check_pair(name: str, imagined: np.ndarray, real: np.ndarray) -> None:
    for frames in (imagined, real):
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
            got = f"{frames.dtype} {list(frames.shape)}"
            raise ValueError(f"{name}: frames must be uint8 [T, h, w, 3], T at least 1, got {got}")
    if imagined.shape != real.shape:
        got = f"{list(imagined.shape)} and {list(real.shape)}"
        raise ValueError(f"{name}: imagined and real must have one shape, got {got}")


def _save(figure: Figure, out: Path) -> Path:
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"a figure's file name must end in .png, .svg or .pdf, got {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[out.suffix]
    with replacing(out) as temporary:
        figure.savefig(temporary, dpi=150, metadata=metadata)
    return out
