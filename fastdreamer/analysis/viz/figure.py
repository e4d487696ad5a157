"""What every figure has in common: style, colours, and how it is saved; no window is opened."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure  # not pyplot: a bare Figure knows no windows

from fastdreamer.errors import ArgumentError
from fastdreamer.files import make_directory, replacing

# Okabe and Ito's palette, told apart with every kind of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "fastdreamer",  # the same data makes the same file
}


def thousands(frames: float) -> str:
    """250000 as "250k", 1500000 as "1.5M"."""
    if abs(frames) >= 1_000_000:
        return f"{frames / 1_000_000:g}M"
    return f"{frames / 1000:g}k" if abs(frames) >= 1000 else f"{frames:g}"


def save_figure(figure: Figure, out: Path) -> Path:
    """Save as .png, .svg or .pdf, the same bytes for the same figure; ValueError for others."""
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ArgumentError(f"a figure's file name must end in .png, .svg or .pdf, got {out}")
    make_directory(out.parent)
    metadata = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[out.suffix]
    with replacing(out) as temporary:
        figure.savefig(temporary, dpi=150, metadata=metadata)
    return out
