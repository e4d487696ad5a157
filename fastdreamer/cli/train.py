"""``fastdreamer train``: a new run, or one that goes on; of several seeds, all of them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from fastdreamer.acting.signals import refuse_signal
from fastdreamer.analysis.viz.curves import plot_runs
from fastdreamer.cli import seeds
from fastdreamer.cli.run import allow_task, named_by_file
from fastdreamer.config import PRESETS, Config, ConfigError, preset
from fastdreamer.envs import canonical_task
from fastdreamer.errors import FastdreamerError
from fastdreamer.files import DiskFullError
from fastdreamer.learning.dreamer import NonFiniteLoss
from fastdreamer.learning.ranks import RankError
from fastdreamer.machine.device import resolve_config
from fastdreamer.named import names_code
from fastdreamer.ops.gpu import why_no_cuda
from fastdreamer.training import preflight
from fastdreamer.training.checkpoint import list_checkpoints, runs_in
from fastdreamer.training.cluster import Cluster, ClusterError, connected
from fastdreamer.training.collector import CollectorError
from fastdreamer.training.ranks import joined, launcher
from fastdreamer.training.trainer import (
    RunError,
    Stopped,
    Trainer,
    create_run,
    new_settings,
    read_config,
    read_settings,
)

_PRESET = "walker-v3"


@dataclass
class Train:
    """Train an agent, from nothing or from where a run was stopped.

    For example: fastdreamer train walker

    A run directory receives config.json, metrics.jsonl, tensorboard/, episodes/, checkpoints/,
    snapshots/, videos/ and, at its end, curves.png. Ctrl-C finishes the update, saves, and prints
    how to go on.
    """

    task: Annotated[Positional[str], tyro.conf.arg(metavar="TASK")] = ""
    """DeepMind Control task, domain-task: walker-walk, cheetah-run, ...; walker is walker-walk. Or
    gym:ID, a registered gymnasium environment, or module:function, which returns one."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="|".join(PRESETS))] = None
    """Where the settings of a new run start from, walker-v3 by default; the options below change
    single ones."""
    file: Annotated[Path | None, tyro.conf.arg(name="config", metavar="JSON")] = None
    """Settings of a new run in place of the preset's: config.json of a run, or a part of one. TASK
    and the options below win."""
    run: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Run directory to make; default: runs/TASK-DATE-TIME-seedSEED."""
    seeds: Annotated[str | None, tyro.conf.arg(metavar="0,1,2")] = None
    """Make a run of each of these seeds, one after the other, in directories seed0, seed1, ... of
    one folder (--run), and draw their curves together; --resume FOLDER goes on with them."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Go on with this run; options given here replace its settings, except those that decide its
    networks, what they see and the random numbers."""
    ray: Annotated[str | None, tyro.conf.arg(metavar="auto|local|HOST:PORT")] = None
    """Collect and evaluate by Ray actors on any node: of the cluster that runs here, of one that is
    started on this machine, or of another that it has joined. With --seeds: train the runs side by
    side, as its tasks."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def train_defaults(argv: list[str], config: Config | None = None) -> Train:
    """What ``train``'s options start from: a preset, or the settings of the run to resume, of a
    folder of runs those of its first; ``config``, where that is given."""
    if config is not None:
        return Train(config=_as_defaults(config))
    if not argv or argv[0] != "train":
        return Train(config=PRESETS[_PRESET])
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # One that has no value here has none for the parser of all options either, which says so.
    early.add_argument("--preset", nargs="?", default=_PRESET, const=_PRESET)
    early.add_argument("--config", nargs="?", type=Path)
    early.add_argument("--resume", nargs="?", type=Path)
    known, _ = early.parse_known_args(argv[1:])
    if known.resume is not None:
        of_seeds = list(seeds.runs_of(known.resume).values())
        config = read_config(of_seeds[0] if of_seeds else known.resume)
    else:
        config = _starting_point(known.preset, known.config)
    return Train(config=_as_defaults(config))


def _as_defaults(config: Config) -> Config:
    """What options start from: code that a file names has to be named again."""
    return dataclasses.replace(config, safety=named_by_file(config.safety))


def _starting_point(name: str, file: Path | None) -> Config:
    """A preset, with what a file says in place of its settings."""
    config = preset(name)
    if file is None:
        return config
    try:
        return preset(name, read_settings(file))
    except ConfigError as error:
        raise ConfigError(f"--config {file}: {error}") from error


def run_train(command: Train, say: Callable[[str], None], parse: Callable[[Config], Train]) -> int:
    """Train; ``parse`` reads the same words again, options starting from other settings."""
    with joined() as ranks, contextlib.ExitStack() as stack:
        cluster = None
        if command.ray is not None:  # before anything of a run is made
            cluster = stack.enter_context(connected(command.ray, command.config.collect.workers))
        return _run_train(command, cluster, ranks.size, say, parse)


def _run_train(
    command: Train,
    cluster: Cluster | None,
    ranks: int,
    say: Callable[[str], None],
    parse: Callable[[Config], Train],
) -> int:
    runs = {} if command.resume is None else seeds.runs_of(command.resume)
    if cluster is not None and ranks > 1 and (runs or command.seeds is not None):
        raise ConfigError("--seeds with --ray: a run is a task of one process, without torchrun")
    if runs:
        return _resume_seeds(command, runs, cluster, say, parse)
    if command.seeds is not None:
        return _train_seeds(command, cluster, say)
    make = _resumed_run if command.resume else _new_run
    run_dir, config = make(command, say)
    say(f"run directory: {run_dir}")
    status = 0
    if _has_ended(run_dir, config):
        say(_further([run_dir], config, run_dir, command.ray))
    else:
        status = _train(run_dir, config, run_dir, command.ray, say)
    if status == 0:
        say(f"picture: {plot_runs([run_dir], run_dir / 'curves.png')}")
        say(f"done; try: fastdreamer eval {run_dir}, fastdreamer plot {run_dir}")
    return status


def _train(
    run_dir: Path, config: Config, whole: Path, ray: str | None, say: Callable[[str], None]
) -> int:
    """Train a run to its end; ``whole`` is what --resume takes to go on, it or its folder."""
    again = _again(config, whole, ray)
    try:
        Trainer(run_dir, config, ray=ray).train()
    except Stopped as stopped:
        how = "nothing is lost" if stopped.saved else "at once: the newest checkpoint stands"
        say(f"stopped, {how}; go on with: {again}")
        return 130
    except KeyboardInterrupt:  # before the trainer takes it
        say(f"stopped before it began; go on with: {again}")
        return 130
    except NonFiniteLoss as error:
        kept = list_checkpoints(run_dir / "checkpoints")
        where = f"The last good checkpoint is {kept[-1]}." if kept else "No checkpoint was due yet."
        say(
            f"stopped: the {error}. {where}\nGo on from there with other settings, for example: "
            f"{again} --precision fp32 --optim.model-lr 3e-4"
        )
        return 1
    except (ClusterError, CollectorError, DiskFullError, RankError) as error:
        raise type(error)(f"{error}\nGo on with: {again}") from error
    videos = sorted((run_dir / "videos").glob("eval-*.mp4"))
    if videos:
        say(f"video of the final evaluation's first episode: {videos[-1]}")
    return 0


def _again(config: Config, whole: Path, ray: str | None) -> str:
    """The command that goes on."""
    named = f" {config.env.task}" if names_code(config.env.task) else ""
    again = f"{launcher()}fastdreamer train{named} --resume {shlex.quote(str(whole))}"
    if names_code(config.safety.signal):
        again += f" --safety {config.safety.signal}"
    return again if ray is None else f"{again} --ray {ray}"


def _has_ended(run_dir: Path, config: Config) -> bool:
    """Whether a run has nothing left to do that these settings ask for."""
    return config == read_config(run_dir) and seeds.is_finished(run_dir, config)


def _further(runs: list[Path], config: Config, whole: Path, ray: str | None) -> str:
    """How to go on with runs that have ended: a command that gives them twice what they have."""
    frames = max(seeds.frames_of(run_dir) for run_dir in runs)
    return (
        f"{whole} has all env frames that it was to have; go on to more with: "
        f"{_again(config, whole, ray)} --train.frames {2 * frames}"
    )


def _train_seeds(command: Train, cluster: Cluster | None, say: Callable[[str], None]) -> int:
    """New runs of several seeds, all of them made before the first is trained."""
    if command.resume is not None:
        raise ConfigError(f"--seeds makes new runs, and {command.resume} is one run, or none")
    numbers = seeds.parse_seeds(command.seeds)
    if command.config.seed != _starting_point(command.preset or _PRESET, command.file).seed:
        raise ConfigError(f"--seed {command.config.seed} and --seeds: give one of them")
    if cluster is not None and not command.config.threads:
        share = cluster.share(len(numbers))
        command = dataclasses.replace(
            command, config=dataclasses.replace(command.config, threads=share)
        )
    config = _new_settings(command)
    configs = [dataclasses.replace(config, seed=seed).validate() for seed in numbers]
    folder = command.run or _default_dir(config, "-".join(["seeds", *map(str, numbers)]))
    if seeds.runs_of(folder) or (folder / "config.json").exists():
        raise ConfigError(
            f"{folder} holds a run already, or several; go on by `fastdreamer train --resume "
            f"{folder}`, or choose another --run"
        )
    if others := runs_in(folder):
        raise ConfigError(
            f"{folder} holds other runs: {', '.join(map(str, others))}; choose a folder for these "
            f"alone, as --run {folder / 'NAME'}"
        )
    preflight.check(config, folder, say)
    if command.run is None:
        folder = _claim(folder)
    runs = seeds.make_folder(folder, numbers)
    for own in configs:
        create_run(runs[own.seed], own)
    settle = lambda seed: (runs[seed], read_config(runs[seed]))  # noqa: E731
    return _train_all(folder, runs, settle, command.ray, cluster, say)


def _resume_seeds(
    command: Train,
    runs: dict[int, Path],
    cluster: Cluster | None,
    say: Callable[[str], None],
    parse: Callable[[Config], Train],
) -> int:
    """Go on with a folder's runs, each with its own settings but for the options given here."""
    each = {seed: parse(read_config(run_dir)) for seed, run_dir in runs.items()}
    if command.seeds is not None or any(one.config.seed != seed for seed, one in each.items()):
        raise ConfigError(
            f"{command.resume} holds runs of the seeds {', '.join(map(str, runs))}; --resume goes "
            "on with these: leave --seeds and --seed out"
        )

    def settle(seed: int) -> tuple[Path, Config]:
        return _resumed_run(dataclasses.replace(each[seed], resume=runs[seed]), say)

    return _train_all(command.resume, runs, settle, command.ray, cluster, say)


def _train_all(
    folder: Path,
    runs: dict[int, Path],
    settle: Callable[[int], tuple[Path, Config]],
    ray: str | None,
    cluster: Cluster | None,
    say: Callable[[str], None],
) -> int:
    """Train those runs of a folder that have not ended, one after the other or, on a cluster, side
    by side; conclude when all of them have."""
    say(f"folder of runs: {folder}")
    together: dict[int, Config] = {}
    ended = 0
    for i, seed in enumerate(runs, 1):
        run_dir, config = settle(seed)
        if _has_ended(run_dir, config):
            say(f"seed {seed} ({i} of {len(runs)}) has ended already: {run_dir}")
            ended += 1
            continue
        say(f"seed {seed} ({i} of {len(runs)}): {run_dir}")
        if cluster is not None:
            together[seed] = config
        elif status := _train(run_dir, config, folder, None, say):
            return status
    if together:
        again = _again(next(iter(together.values())), folder, ray)
        say(f"{cluster.describe()}; going together where there are cores")
        try:
            seeds.train_on(cluster, runs, together, say)
        except (Stopped, KeyboardInterrupt):
            say(f"stopped; go on with: {again}")
            return 130
        except FastdreamerError as error:
            raise RunError(f"{error}\nGo on with: {again}") from error
    if ended == len(runs):
        say(_further(list(runs.values()), config, folder, ray))
    seeds.conclude(folder, runs, say)
    return 0


def _new_run(command: Train, say: Callable[[str], None]) -> tuple[Path, Config]:
    config = _new_settings(command)
    run_dir = command.run or _default_dir(config, f"seed{config.seed}")
    preflight.check(config, run_dir, say)
    if command.run is None:
        run_dir = _claim(run_dir)
    create_run(run_dir, config)
    return run_dir, config


def _new_settings(command: Train) -> Config:
    """Of a new run: what preset, file, TASK and options come to."""
    config, name = command.config, command.task
    if command.file is not None:
        theirs = _starting_point(command.preset or _PRESET, command.file)
        if not name and "task" in read_settings(command.file).get("env", {}):
            allow_task(theirs, command.file, name)
            name = theirs.env.task
        if names_code(theirs.safety.signal) and config.safety.signal == "none":
            refuse_signal(theirs.safety, f"--safety {theirs.safety.signal}")
    if not name:
        raise ConfigError("train needs a TASK (for example: fastdreamer train walker) or --resume")
    config = dataclasses.replace(config, env=dataclasses.replace(config.env, task=name))
    return new_settings(config)


def _default_dir(config: Config, end: str) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    task = re.sub(r"[^\w.-]+", "-", config.env.task)
    return Path("runs") / f"{task}-{stamp}-{end}"


def _claim(path: Path) -> Path:
    """Make a directory of that name or, where another run was quicker, with a number behind it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        claimed = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with contextlib.suppress(FileExistsError):
            claimed.mkdir()
            return claimed
    raise AssertionError


def _resumed_run(command: Train, say: Callable[[str], None]) -> tuple[Path, Config]:
    """The run to go on with and the settings for it; the trainer refuses those that don't fit."""
    run_dir = command.resume
    if command.run is not None:
        raise ConfigError("--run makes a new run and --resume goes on with one: give one of them")
    for option, value in (("--preset", command.preset), ("--config", command.file)):
        if value is not None:
            raise ConfigError(
                f"{option} is where a new run starts from, and --resume goes on with the settings "
                f"of {run_dir}: leave it out, and change single ones by their own options"
            )
    old, new = read_config(run_dir), command.config
    allow_task(old, run_dir, command.task)
    if names_code(old.safety.signal) and new.safety.signal == "none":
        refuse_signal(old.safety, f"--safety {old.safety.signal}")
    new.validate()
    if new.device == old.device != "cpu" and (reason := why_no_cuda()):
        raise ConfigError(
            f"{run_dir} was trained on {old.device}, and here is {reason}; --device cpu goes on "
            "without it, with the same random numbers but not bit for bit"
        )
    new = resolve_config(new)  # an auto or a 0 that is given here chooses again
    if new.device != old.device:
        say(f"trained on {old.device} so far: from here on not bit for bit as it would have been")
    if command.task and canonical_task(command.task) != old.env.task:
        raise ConfigError(f"{run_dir} is a run of {old.env.task}, not of {command.task}")
    preflight.check(new, run_dir, say)
    return run_dir, new
