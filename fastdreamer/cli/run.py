"""What commands that play take from the run they are given: its settings and its backend."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal

from fastdreamer.checkpoint import load_meta
from fastdreamer.config import Config, from_dict
from fastdreamer.ops.backend import check_backend, use_backend
from fastdreamer.play import on_cpu, run_backend
from fastdreamer.pretrained import find_agent
from fastdreamer.trainer import read_config

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


def playing_backend(run: Path, backend: Backend) -> contextlib.AbstractContextManager[None]:
    """The backend for playing with a trained agent, which is on the CPU."""
    if backend == "run":
        return run_backend(on_cpu(config_of(run)))
    check_backend(backend, "cpu")
    return use_backend(backend)
