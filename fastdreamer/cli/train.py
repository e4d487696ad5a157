"""``fastdreamer train``: a new run, or one that goes on."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from fastdreamer.agent import NonFiniteLoss
from fastdreamer.checkpoint import list_checkpoints
from fastdreamer.cli.run import allow_task
from fastdreamer.config import PRESETS, Config, ConfigError, preset
from fastdreamer.device import resolve_config
from fastdreamer.envs import canonical_task, is_foreign
from fastdreamer.ops.gpu import why_no_cuda
from fastdreamer.trainer import Stopped, Trainer, create_run, read_config, write_config


@dataclass
class Train:
    """Train an agent, from nothing or from where a run was stopped.

    For example: fastdreamer train walker

    A run directory receives config.json, metrics.jsonl, tensorboard/, episodes/, checkpoints/ and
    videos/. Ctrl-C finishes the update, saves, and prints how to go on.
    """

    task: Annotated[Positional[str], tyro.conf.arg(metavar="TASK")] = ""
    """DeepMind Control task, domain-task: walker-walk, cheetah-run, ...; walker is walker-walk. Or
    gym:ID, a registered gymnasium environment, or module:function, which returns one."""
    preset: Annotated[str, tyro.conf.arg(metavar="|".join(PRESETS))] = "walker"
    """Where the settings start from; the options below change single ones."""
    run: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Run directory to make; default: runs/TASK-DATE-TIME."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Go on with this run; options given here replace its settings, except task and sizes."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def train_defaults(argv: list[str]) -> Train:
    """What ``train``'s options start from: a preset, or the settings of the run to resume."""
    if not argv or argv[0] != "train":
        return Train(config=PRESETS["walker"])
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="walker")
    early.add_argument("--resume", type=Path)
    known, _ = early.parse_known_args(argv[1:])
    if known.resume is not None:
        return Train(config=read_config(known.resume))
    return Train(config=preset(known.preset))


def run_train(command: Train, say: Callable[[str], None]) -> int:
    run_dir = _resumed_run(command, say) if command.resume else _new_run(command)
    say(f"run directory: {run_dir}")
    again = f"fastdreamer train --resume {shlex.quote(str(run_dir))}"
    try:
        Trainer(run_dir).train()
    except Stopped:
        say(f"stopped, nothing is lost; go on with: {again}")
        return 130
    except NonFiniteLoss as error:
        kept = list_checkpoints(run_dir / "checkpoints")
        where = f"The last good checkpoint is {kept[-1]}." if kept else "No checkpoint was due yet."
        say(
            f"stopped: the {error}. {where}\nGo on from there with other settings, for example: "
            f"{again} --precision fp32 --optim.model-lr 3e-4"
        )
        return 1
    videos = sorted((run_dir / "videos").glob("eval-*.mp4"))
    if videos:
        say(f"video of the final evaluation's first episode: {videos[-1]}")
    say(f"done; try: fastdreamer eval {run_dir}, fastdreamer plot {run_dir}")
    return 0


def _new_run(command: Train) -> Path:
    if not command.task:
        raise ConfigError("train needs a TASK (for example: fastdreamer train walker) or --resume")
    task = canonical_task(command.task)
    config = command.config
    config = dataclasses.replace(config, env=dataclasses.replace(config.env, task=task))
    if config.model.discount is None:
        model = dataclasses.replace(config.model, discount=is_foreign(task))
        config = dataclasses.replace(config, model=model)
    config.validate()
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = re.sub(r"[^\w.-]+", "-", task)
    run_dir = command.run or Path("runs") / f"{name}-{stamp}"
    create_run(run_dir, config)
    return run_dir


def _resumed_run(command: Train, say: Callable[[str], None]) -> Path:
    """Take new settings into a run; refuse those that its weights or episodes don't fit."""
    run_dir = command.resume
    if command.run is not None:
        raise ConfigError("--run makes a new run and --resume goes on with one: give one of them")
    old, new = read_config(run_dir), command.config.validate()
    allow_task(old, run_dir, command.task)
    if new.device == old.device != "cpu" and (reason := why_no_cuda()):
        raise ConfigError(
            f"{run_dir} was trained on {old.device}, and here is {reason}; --device cpu goes on "
            "without it, with the same random numbers but not bit for bit"
        )
    new = resolve_config(new)
    if new.device != old.device:
        say(f"trained on {old.device} so far: from here on not bit for bit as it would have been")
    if command.task and canonical_task(command.task) != old.env.task:
        raise ConfigError(f"{run_dir} is a run of {old.env.task}, not of {command.task}")
    fixed = ("agent", "seed", "env", "model", "collect", "explore", "safety")
    # A trained agent may be given an explorer or a guard later; they start with what it knows.
    later = {"explore": old.explore.method == "none", "safety": old.safety.signal == "none"}
    for name in fixed:
        if getattr(old, name) != getattr(new, name) and not later.get(name):
            raise ConfigError(
                f"{name} is fixed when a run starts; make a new run to change it "
                f"(fixed: {', '.join(fixed)})"
            )
    if old != new:
        write_config(run_dir, new)
    return run_dir
