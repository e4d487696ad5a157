"""The curves, plot and table of a comparison, from the records under its directory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastdreamer.analysis.compare.methods import METHODS
from fastdreamer.analysis.compare.records import Settings, read_json
from fastdreamer.analysis.viz.comparison import comparison_figure, mean_and_std, read_comparison
from fastdreamer.files import replacing, write_csv
from fastdreamer.training.logger import format_seconds
from fastdreamer.training.trainer import RunError


def write_results(out: Path) -> list[Path]:
    """Write compare.csv, compare.png and compare.md of everything evaluated under ``out``.

    Returns the three paths. Raises RunError where nothing was evaluated yet.
    """
    settings = read_json(out / "compare.json", {})
    rows, machines = [], {}
    for method, kind in METHODS.items():
        for seed, directory in _runs_of(out, kind.training):
            evaluations = read_json(directory / f"{method}.json", [])
            for done in evaluations:
                rows.append({
                    "method": method,
                    "seed": seed,
                    "env_frames": done["env_frames"],
                    "seconds": round(done["seconds"], 3),
                    "return_mean": float(np.mean(done["returns"])),
                    "return_std": float(np.std(done["returns"])),
                    "episodes": len(done["returns"]),
                })  # fmt: skip
            if evaluations:
                stages = read_json(directory / "stages.json")
                machines |= dict.fromkeys(stage["machine"] for stage in stages)
    if not rows:
        raise RunError(f"{out} holds no evaluation yet")
    about = {**settings, "machines": list(machines)}
    table = write_csv(out / "compare.csv", rows, about=about)
    labels = {name: method.label for name, method in METHODS.items()}
    plot = comparison_figure(table, out / "compare.png", labels)
    text = out / "compare.md"
    with replacing(text) as temporary:
        temporary.write_text(comparison_table(table), encoding="utf-8")
    return [table, plot, text]


def comparison_table(path: Path) -> str:
    """The Markdown table of a comparison's CSV.

    Returns at up to four frame counts and after up to four times of training, mean ± standard
    deviation over seeds, between evaluations by straight lines; "–" where some seed has no
    evaluation on both sides.
    """
    about, curves = read_comparison(path)
    settings = Settings(about["task"], frames=about["frames"], eval_every=about["eval_every"])
    targets = settings.targets()
    frames = sorted({targets[max(0, round(len(targets) * part / 4) - 1)] for part in range(1, 5)})
    times = _times(curves)
    head = ["method", "seeds", *(f"return at {n:,} env frames" for n in frames)]
    head += [*(f"after {format_seconds(s)} of training" for s in times), "env frames per hour"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for method, seeds in curves.items():
        cells = [METHODS[method].label, str(len(seeds))]
        for axis, points in (("env_frames", frames), ("seconds", times)):
            mean, std = mean_and_std(seeds, axis, np.array(points, float))
            cells += [_cell(m, s, len(seeds)) for m, s in zip(mean, std, strict=True)]
        speed = sum(c["env_frames"][-1] for c in seeds) / sum(c["seconds"][-1] for c in seeds)
        lines.append([*cells, f"{3600 * speed:,.0f}"])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _times(curves: dict[str, list[dict[str, np.ndarray]]]) -> list[float]:
    """Up to four round times, in seconds, at which at least one method has a value."""
    minutes = [1 / 12, 1 / 6, 0.5, 1, 2, 5, 10, 15, 30, *(60 * 2**i for i in range(12))]
    spans = [
        (max(c["seconds"][0] for c in seeds), min(c["seconds"][-1] for c in seeds))
        for seeds in curves.values()
    ]
    inside = [60 * m for m in minutes if any(low <= 60 * m <= high for low, high in spans)]
    return inside[-4:]


def _cell(mean: float, std: float, seeds: int) -> str:
    if not np.isfinite(mean):
        return "–"
    return f"{mean:.0f} ± {std:.0f}" if seeds > 1 else f"{mean:.0f}"


def _runs_of(out: Path, training: str) -> list[tuple[int, Path]]:
    """Its runs by seed, whatever else somebody has put beside them."""
    found = ((directory.name.rpartition("-seed")[2], directory)
             for directory in out.glob(f"{training}-seed*"))  # fmt: skip
    return sorted((int(seed), directory) for seed, directory in found if seed.isdecimal())
