"""What commands that play take from the run they are given: its settings and its backend."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Literal

from fastdreamer.acting.play import on_cpu, run_backend
from fastdreamer.config import Config, ConfigError, SafetyConfig, from_dict
from fastdreamer.named import names_code
from fastdreamer.ops.backend import check_backend, use_backend
from fastdreamer.training.checkpoint import load_meta
from fastdreamer.training.pretrained import find_agent
from fastdreamer.training.trainer import read_config

Backend = Literal["run", "auto", "eager", "native", "triton"]


def config_of(path: Path) -> Config:
    """The settings of a run or checkpoint, or of an agent that comes with the package.

    Raises:
        CheckpointError: none of them.
    """
    path = find_agent(path)
    if (path / "config.json").is_file():
        return read_config(path)
    if path.is_file():
        return from_dict(load_meta(path)["config"])
    return Config()


def allow_task(config: Config, run: Path, given: str) -> None:
    """Refuse to import code because a file names it: of such a task the user names it as well.

    A run's ``config.json`` and its checkpoints need not name the same: who makes an environment of
    what a checkpoint says asks again with that.

    Raises:
        ConfigError: the task is a function, and what was given is not its name.
    """
    task = config.env.task
    if names_code(task) and given != task:
        raise ConfigError(
            f"{run} names an environment of its owner's code, which is not imported unasked; if "
            f"you trust it, name it as well: {task}"
        )


def named_by_file(safety: SafetyConfig) -> SafetyConfig:
    """A run's settings as what options start from: a module has to be named again."""
    return replace(safety, signal="none") if names_code(safety.signal) else safety


def playing_backend(config: Config, backend: Backend) -> contextlib.AbstractContextManager[None]:
    """The backend for playing with a trained agent of a run's settings, which is on the CPU."""
    if backend == "run":
        return run_backend(on_cpu(config))
    check_backend(backend, "cpu")
    return use_backend(backend)
