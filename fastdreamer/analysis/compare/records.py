"""What a comparison keeps of itself as JSON: its settings, and the stages of its runs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdreamer.config import Config, ConfigError, preset
from fastdreamer.files import replacing
from fastdreamer.training.trainer import RunError


@dataclass(frozen=True)
class Settings:
    """What every run of a comparison has in common; fixed by the first command.

    Frames are env frames. ``preset`` is Dreamer's, and gives every method its environment.
    """

    task: str
    obs: str = "state"
    frames: int = 100_000
    eval_every: int = 10_000
    eval_episodes: int = 5
    preset: str = "state"
    threads: int = 0
    device: str = "auto"

    def config(self, seed: int) -> Config:
        """Dreamer's configuration for one seed; its environment is every method's.

        Raises:
            ConfigError: a setting that cannot run.
        """
        for name in ("frames", "eval_every", "eval_episodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        start = preset(self.preset)
        return dataclasses.replace(
            start,
            seed=seed,
            threads=self.threads or start.threads,
            device=self.device,
            env=dataclasses.replace(start.env, task=self.task, obs=self.obs),
            train=dataclasses.replace(start.train, frames=self.frames),
            eval=dataclasses.replace(start.eval, every=0),  # between the stages instead
        ).validate()

    def targets(self) -> list[int]:
        """Env frames after which every method is evaluated."""
        return sorted({*range(self.eval_every, self.frames + 1, self.eval_every), self.frames})


@dataclass(frozen=True)
class Stage:
    """How far a run has come."""

    env_frames: int
    seconds: float  # wall clock of training up to here, without start-up and evaluation
    file: str  # in the run's directory, holds the policy
    machine: str  # that trained it


def read_json(path: Path, default: Any = None) -> Any:
    """The file's value, or the default where there is none; RunError where it is damaged."""
    if default is not None and not path.exists():
        return default
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: damaged ({error})") from error


def write_json(path: Path, value: Any) -> None:
    """Write a value, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
