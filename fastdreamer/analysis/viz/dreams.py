"""What an agent imagined over what really happened (report, Figure 4): pictures and a video."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fastdreamer.analysis.viz.figure import COLOURS, STYLE, save_figure
from fastdreamer.video import write_video


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
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
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
        return save_figure(figure, Path(out))


def state_figure(imagined: np.ndarray, real: np.ndarray, out: Path, *, panels: int = 6) -> Path:
    """Draw imagined and real state components under the same actions: Figure 4 without images.

    imagined, real: [T, n], one row per decision. panels: how many components to show, those that
    really move most. Returns out. Raises ValueError for another shape or unequal ones.
    """
    if imagined.ndim != 2 or imagined.shape != real.shape or not imagined.size or panels < 1:
        got = f"{list(imagined.shape)} and {list(real.shape)}, {panels} panels"
        raise ValueError(f"state_figure: imagined and real must both be [T, n], got {got}")
    shown = np.sort(np.argsort(-real.std(0), kind="stable")[:panels])
    with matplotlib.rc_context(STYLE):
        rows = -(-len(shown) // 2)
        figure = Figure(figsize=(8, 0.8 + 1.4 * rows), layout="constrained")
        grid = figure.subplots(rows, 2, sharex=True, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        for axes, index in zip(grid.flat, shown, strict=False):
            axes.plot(real[:, index], color=COLOURS[-1], lw=1.2, label="real")
            axes.plot(imagined[:, index], color=COLOURS[1], lw=1.2, ls="--", label="imagined")
            axes.set_ylabel(f"state {index}", fontsize=9)
        figure.supxlabel("decision", fontsize=9)
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
        return save_figure(figure, Path(out))


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


def _check_pair(name: str, imagined: np.ndarray, real: np.ndarray) -> None:
    for frames in (imagined, real):
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
            got = f"{frames.dtype} {list(frames.shape)}"
            raise ValueError(f"{name}: frames must be uint8 [T, h, w, 3], T at least 1, got {got}")
    if imagined.shape != real.shape:
        got = f"{list(imagined.shape)} and {list(real.shape)}"
        raise ValueError(f"{name}: imagined and real must have one shape, got {got}")
