"""Methods side by side: the same task, the same frames, the same evaluation.

A run is one training method under one seed. It goes in stages, from one evaluation to the next; a
stage starts from the file that the one before left and ends with a file of its own. So a stopped
comparison loses at most the stage under way (Dreamer's even goes on inside it), and its numbers are
those of an uninterrupted one. Evaluation happens between stages, outside the clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fastdreamer.acting.play import config_env, episode_seed, episode_steps
from fastdreamer.analysis.compare.methods import (
    METHODS,
    MODEL_FREE,
    ModelFreeRun,
    WorldModelRun,
    stable_baselines,
)
from fastdreamer.analysis.compare.records import Settings, Stage, read_json, write_json
from fastdreamer.analysis.compare.results import write_results
from fastdreamer.config import ConfigError
from fastdreamer.files import make_directory
from fastdreamer.machine.device import resolve_config, resolve_device
from fastdreamer.training.cluster import Call, Cluster
from fastdreamer.training.logger import format_seconds
from fastdreamer.training.tasks import carry_out, run_tasks
from fastdreamer.training.trainer import RunError, Stopped, StopSignals, lock_run, stop_signals


def compare(
    out: Path,
    settings: Settings,
    methods: Sequence[str],
    seeds: int,
    *,
    console: Console,
    cluster: Cluster | None = None,
) -> list[Path]:
    """Train and evaluate what is missing under ``out``, then write the results.

    Args:
        out: directory of the comparison; what is done there is kept.
        settings: must equal those that ``out`` was started with.
        methods: names among ``METHODS``.
        seeds: seeds 0 .. seeds - 1 of every method.
        console: for progress.
        cluster: whose tasks the runs are, side by side where there are cores; by default they are
            trained here, one after the other.

    Returns:
        The CSV, the plot and the table.

    Raises:
        ConfigError: an unknown method, a setting that cannot run or differs from the first
            command's, or a missing extra. BackendError: the device cannot run here.
        RunError: another process is at one of the runs, or a file is damaged.
        ClusterError: a run was lost too often, or no node has a GPU.
        Stopped: a signal asked to stop; the same call goes on.
    """
    settings = dataclasses.replace(settings, device=resolve_device(settings.device))
    _check(settings, methods, seeds)
    _start(out, settings)
    runs = [(method, seed) for seed in range(seeds) for method in methods]
    try:
        with stop_signals() as stop:
            if cluster is not None:
                _train_on(cluster, out, settings, methods, seeds, stop, console)
                return write_results(out)
            for i, (method, seed) in enumerate(runs, 1):
                console.rule(f"{method}, seed {seed} ({i} of {len(runs)})")
                _run(out, settings, method, seed, stop, console)
                results = write_results(out)
    except Stopped:
        with contextlib.suppress(RunError):  # nothing was evaluated yet
            write_results(out)
        raise
    return results


def _train_on(
    cluster: Cluster,
    out: Path,
    settings: Settings,
    methods: Sequence[str],
    seeds: int,
    stop: StopSignals,
    console: Console,
) -> None:
    """Bring all runs to their last evaluation, a task each; methods that train once share one."""
    groups: dict[tuple[int, str], list[str]] = {}
    for seed in range(seeds):
        for method in methods:
            groups.setdefault((seed, METHODS[method].training), []).append(method)
    cores = settings.threads or cluster.share(len(groups))
    calls, records = {}, {}
    for (seed, training), names in groups.items():
        directory = out.absolute() / f"{training}-seed{seed}"
        arguments = str(out.absolute()), asdict(settings), names, seed
        calls[f"{' and '.join(names)}, seed {seed}"] = Call(_run_here, arguments, cores)
        records |= {directory / f"{name}.json": (name, seed) for name in names}
    told = {path: len(read_json(path, [])) for path in records}

    def look() -> None:
        for path, (method, seed) in records.items():
            evaluations = read_json(path, [])
            for done in evaluations[told[path] :]:
                _tell(console, method, seed, settings, done)
            told[path] = len(evaluations)
        stop.check()

    console.print(f"{cluster.describe()}; {len(calls)} runs", highlight=False)
    gpu = settings.device != "cpu"
    run_tasks(cluster, calls, gpu=gpu, look=look)


def _run_here(out: str, settings: dict[str, Any], methods: Sequence[str], seed: int) -> bool:
    """The task: bring methods to their last evaluation, unless it is stopped."""
    if not Path(out).is_dir():
        raise RunError(f"{platform.node()} has no {out}: all nodes must share that folder")

    def work() -> None:
        with stop_signals() as stop:
            for method in methods:
                _run(Path(out), Settings(**settings), method, seed, stop, Console())

    return carry_out(work)


def _check(settings: Settings, methods: Sequence[str], seeds: int) -> None:
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        got = ", ".join(map(repr, unknown)) or "none"
        raise ConfigError(f"methods must be among {', '.join(METHODS)}, got {got}")
    if len(set(methods)) < len(methods):
        raise ConfigError(f"a method is named twice: {', '.join(methods)}")
    if seeds < 1:
        raise ConfigError(f"seeds must be at least 1, got {seeds}")
    config = settings.config(0)
    resolve_config(config)
    free = [name for name in methods if METHODS[name].training in MODEL_FREE]
    if free and settings.obs != "state":
        raise ConfigError(
            f"{' and '.join(free)}: from state only (one image shows no velocities, and there is "
            f"no memory in these methods), got obs {settings.obs}"
        )
    if free:
        stable_baselines(free)


def _start(out: Path, settings: Settings) -> None:
    """Claim a directory, or check that it was started with the same settings."""
    path = out / "compare.json"
    if not path.exists():
        make_directory(out)
        write_json(path, asdict(settings))
        return
    old = read_json(path)
    for name, value in asdict(settings).items():
        if old.get(name) != value:
            raise ConfigError(
                f"{out} was started with {name} {old.get(name)}, not {value}: repeat that, or "
                f"choose another --out (more methods and more seeds can be added)"
            )


def _run(
    out: Path, settings: Settings, method: str, seed: int, stop: Any, console: Console
) -> None:
    """Bring one method under one seed to its last evaluation."""
    training = METHODS[method].training
    directory = out / f"{training}-seed{seed}"
    make_directory(directory)
    learner_type = ModelFreeRun if training in MODEL_FREE else WorldModelRun
    learner = learner_type(directory, training, settings.config(seed), stop)
    with lock_run(directory):
        stages = [Stage(**stage) for stage in read_json(directory / "stages.json", [])]
        evaluations = read_json(directory / f"{method}.json", [])
        for target in settings.targets():
            stop.check()
            # A stage may end behind its target: PPO learns from whole rollouts.
            reached = [stage for stage in stages if stage.env_frames >= target]
            if not reached:
                stages.append(learner.train(stages[-1] if stages else None, target))
                write_json(directory / "stages.json", [asdict(stage) for stage in stages])
                reached = stages[-1:]
            stage = reached[0]
            if any(done["env_frames"] == stage.env_frames for done in evaluations):
                continue
            returns = _evaluate(learner, stage, method, settings, seed, stop)
            evaluations.append(
                {"env_frames": stage.env_frames, "seconds": stage.seconds, "returns": returns}
            )
            write_json(directory / f"{method}.json", evaluations)
            _tell(console, method, seed, settings, evaluations[-1])


def _tell(
    console: Console, method: str, seed: int, settings: Settings, done: dict[str, Any]
) -> None:
    returns = done["returns"]
    several = len(returns) > 1
    spread = f" ± {np.std(returns):.1f}" if several else ""
    console.print(
        f"{method}, seed {seed}: return {np.mean(returns):.1f}{spread} "
        f"({len(returns)} episode{'s' * several}) after {done['env_frames']:,} of "
        f"{settings.frames:,} env frames and {format_seconds(done['seconds'])} of training",
        highlight=False,
        soft_wrap=True,
    )


def _evaluate(
    learner: Any, stage: Stage, method: str, settings: Settings, seed: int, stop: Any
) -> list[float]:
    """Returns of greedy episodes; the same ones for every method under this seed."""
    make_policy = learner.policies(stage, method)
    env = config_env(learner.config)
    returns = []
    for i in range(settings.eval_episodes):
        total, start = 0.0, episode_seed(seed, "evaluate", i)
        for _, _, reward, _, _ in episode_steps(env, make_policy(start), start):
            total += reward
            if stop.asked:
                raise Stopped
        returns.append(total)
    env.close()
    return returns
