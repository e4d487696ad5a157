"""A folder of runs that differ in their seed alone: what ``fastdreamer train --seeds`` makes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

from fastdreamer.analysis.viz.curves import plot_runs
from fastdreamer.config import Config, ConfigError
from fastdreamer.training.checkpoint import list_checkpoints, load_meta
from fastdreamer.training.logger import METRICS_FILE, read_metrics
from fastdreamer.training.trainer import read_config


def parse_seeds(text: str) -> tuple[int, ...]:
    """The numbers of "0,1,2", in their order.

    Raises:
        ConfigError: not whole numbers with commas between them, or one of them twice.
    """
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise ConfigError(f"seeds must be numbers with commas between them, 0,1,2, got {text!r}")
    seeds = tuple(int(word) for word in words)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds must differ from each other, got {text}")
    return seeds


def seed_dir(folder: Path, seed: int) -> Path:
    """The run directory of a seed."""
    return folder / f"seed{seed}"


def runs_of(folder: Path) -> dict[int, Path]:
    """The run directories of a folder by seed, from the lowest; none where it is no such folder."""
    if (folder / "config.json").exists():  # a run itself
        return {}
    found = {
        read_config(path.parent).seed: path.parent for path in folder.glob("seed*/config.json")
    }
    return {seed: path for seed, path in sorted(found.items()) if path == seed_dir(folder, seed)}


def is_finished(run_dir: Path, config: Config) -> bool:
    """Whether a run has all of ``config``'s env frames saved, and its last evaluation."""
    saved = list_checkpoints(run_dir / "checkpoints")
    if not saved or load_meta(saved[-1])["cursor"]["env_frames"] < config.train.frames:
        return False
    if not config.eval.every:
        return True
    evaluated = read_metrics(run_dir, "eval")
    return bool(evaluated) and evaluated[-1]["env_frames"] >= config.train.frames


def conclude(folder: Path, runs: Mapping[int, Path], say: Callable[[str], None]) -> None:
    """Draw the curves of finished runs together, and say how they ended."""
    ends = []
    for seed, run_dir in runs.items():
        evaluated = read_metrics(run_dir, "eval") if (run_dir / METRICS_FILE).exists() else []
        if evaluated:
            ends.append(evaluated[-1]["return_mean"])
            say(f"seed {seed}: return {ends[-1]:.1f}")
    if len(ends) > 1:
        mean, spread = statistics.fmean(ends), statistics.pstdev(ends)
        say(f"{len(ends)} seeds: return {mean:.1f} ± {spread:.1f} (standard deviation over seeds)")
    everyone = len(ends) == len(runs) > 1
    say(f"picture: {plot_runs(list(runs.values()), folder / 'curves.png', band=everyone)}")
