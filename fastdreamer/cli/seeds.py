"""A folder of runs that differ in their seed alone: what ``fastdreamer train --seeds`` makes."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdreamer.analysis.viz.curves import plot_runs
from fastdreamer.config import Config, ConfigError, from_dict, to_dict
from fastdreamer.files import replacing
from fastdreamer.training.checkpoint import CheckpointError, list_checkpoints, load_meta
from fastdreamer.training.cluster import Call, Cluster
from fastdreamer.training.logger import METRICS_FILE, SEEDS_FILE, read_metrics
from fastdreamer.training.tasks import carry_out, run_tasks
from fastdreamer.training.trainer import RunError, Trainer, stop_signals


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


def make_folder(folder: Path, seeds: Sequence[int]) -> dict[int, Path]:
    """Write down whose runs a folder is for; where each of them goes."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / SEEDS_FILE) as temporary:
        temporary.write_text(json.dumps(list(seeds)) + "\n")
    return {seed: folder / f"seed{seed}" for seed in seeds}


def runs_of(folder: Path) -> dict[int, Path]:
    """The run directories of a folder by seed; none where it is no such folder.

    Raises:
        RunError: one of them is gone, or the folder's list of them is damaged.
    """
    file = folder / SEEDS_FILE
    if not file.is_file():
        return {}
    try:
        runs = {int(seed): folder / f"seed{int(seed)}" for seed in json.loads(file.read_text())}
    except (ValueError, TypeError) as error:
        raise RunError(f"{file}: {error}") from error
    gone = [str(run) for run in runs.values() if not (run / "config.json").is_file()]
    if gone:
        raise RunError(f"{folder} lacks what {file.name} says is there: {', '.join(gone)}")
    return runs


def frames_of(run_dir: Path) -> int:
    """The env frames of a run's newest checkpoint; 0 where there is none, or it is damaged."""
    saved = list_checkpoints(run_dir / "checkpoints")
    try:
        return load_meta(saved[-1])["cursor"]["env_frames"] if saved else 0
    except CheckpointError:
        return 0


def is_finished(run_dir: Path, config: Config) -> bool:
    """Whether a run has all of ``config``'s env frames saved, and its last evaluation; not where
    its newest checkpoint is damaged: the trainer goes on from the one before."""
    if frames_of(run_dir) < config.train.frames:
        return False
    if not config.eval.every:
        return True
    evaluated = _evaluated(run_dir)
    return bool(evaluated) and evaluated[-1]["env_frames"] >= config.train.frames


def train_on(
    cluster: Cluster,
    runs: Mapping[int, Path],
    configs: Mapping[int, Config],
    say: Callable[[str], None],
) -> None:
    """Train runs side by side, each by a task that takes as many cores as it has threads.

    Raises:
        Stopped: a signal asked to stop; everything is saved.
        ClusterError, FastdreamerError: see ``Cluster.run``.
    """
    calls, heard = {}, dict.fromkeys(runs, 0)
    for seed, config in configs.items():
        arguments = str(runs[seed].absolute()), json.dumps(to_dict(config))
        calls[f"seed {seed}"] = Call(_train, arguments, config.threads)
        heard[seed] = len(_evaluated(runs[seed]))
    with stop_signals() as stop:

        def look() -> None:
            for seed in configs:
                evaluated = _evaluated(runs[seed])
                for line in evaluated[heard[seed] :]:
                    frames, value = line["env_frames"], line["return_mean"]
                    say(f"seed {seed}: return {value:.1f} at {frames:,} env frames")
                heard[seed] = len(evaluated)
            stop.check()

        gpu = any(config.device != "cpu" for config in configs.values())
        run_tasks(cluster, calls, gpu=gpu, look=look, ended=lambda name: say(f"{name} has ended"))


def _train(run_dir: str, config_json: str) -> bool:
    """The task: train a run, to its end unless it is stopped."""
    if not (Path(run_dir) / "config.json").is_file():
        raise RunError(f"{platform.node()} has no {run_dir}: all nodes must share that folder")
    return carry_out(lambda: Trainer(run_dir, from_dict(json.loads(config_json))).train())


def _evaluated(run_dir: Path) -> list[dict[str, Any]]:
    return read_metrics(run_dir, "eval") if (run_dir / METRICS_FILE).exists() else []


def conclude(folder: Path, runs: Mapping[int, Path], say: Callable[[str], None]) -> None:
    """Draw the curves of finished runs together, and say how they ended."""
    ends = []
    for seed, run_dir in runs.items():
        if evaluated := _evaluated(run_dir):
            ends.append(evaluated[-1]["return_mean"])
            say(f"seed {seed}: return {ends[-1]:.1f}")
    if len(ends) > 1:
        mean, spread = statistics.fmean(ends), statistics.pstdev(ends)
        say(f"{len(ends)} seeds: return {mean:.1f} ± {spread:.1f} (standard deviation over seeds)")
    everyone = len(ends) == len(runs) > 1
    say(f"picture: {plot_runs(list(runs.values()), folder / 'curves.png', band=everyone)}")
    say(f"done; try: fastdreamer eval {next(iter(runs.values()))}")
