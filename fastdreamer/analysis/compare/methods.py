"""The methods that can be compared, and how a run of each trains up to the next evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdreamer._version import __version__
from fastdreamer.acting.play import Act, agent_policy, config_env
from fastdreamer.analysis.compare.records import Stage, read_json
from fastdreamer.config import Config, ConfigError
from fastdreamer.files import replacing
from fastdreamer.machine.cores import cpu_model
from fastdreamer.machine.device import resolve_threads
from fastdreamer.training.checkpoint import list_checkpoints
from fastdreamer.training.logger import Progress, read_metrics
from fastdreamer.training.pretrained import load
from fastdreamer.training.trainer import Stopped, Trainer


@dataclass(frozen=True)
class Method:
    """What a name on the command line stands for."""

    training: str  # whose run it evaluates; methods that share one train once
    label: str  # for the table and the plot
    controller: str | None = None  # who acts in a world model's evaluations


METHODS = {
    "dreamer": Method("dreamer", "Dreamer, actor", "actor"),
    "dreamer-mpc": Method("dreamer", "Dreamer, MPC", "mpc"),
    "planet": Method("planet", "PlaNet", "planet"),
    "sac": Method("sac", "SAC"),
    "ppo": Method("ppo", "PPO"),
}
MODEL_FREE = {"sac": "SAC", "ppo": "PPO"}
"""Trainings that stable-baselines3 does, and its names of them."""


class WorldModelRun:
    """A run of ``fastdreamer train``, stopped and gone on with at every evaluation.

    ``train`` goes on to so many env frames and returns the stage reached; ``policies`` plays a
    stage: it returns what makes, of an episode's seed, the one who acts in it.
    """

    def __init__(self, directory: Path, training: str, config: Config, stop: Any) -> None:
        self.directory, self.run_dir = directory, directory / "run"
        self.config = dataclasses.replace(config, agent=training).validate()

    def train(self, before: Stage | None, until: int) -> Stage:
        trainer = Trainer(self.run_dir, self.config)  # makes the run where there is none
        trainer.train(until=until)
        newest = list_checkpoints(self.run_dir / "checkpoints")[-1]
        name = f"stage-{trainer.env_frames:09d}{newest.suffix}"
        with replacing(self.directory / name) as temporary:
            shutil.copyfile(newest, temporary)
        seconds = max(record["seconds"] for record in read_metrics(self.run_dir))
        return Stage(trainer.env_frames, seconds, name, _machine())

    def policies(self, stage: Stage, method: str) -> Callable[[int], Act]:
        agent = load(self.directory / stage.file)
        return lambda seed: agent_policy(agent, seed, 0.0, METHODS[method].controller)


class ModelFreeRun:
    """Soft actor-critic or proximal policy optimisation, as stable-baselines3 sets them up."""

    def __init__(self, directory: Path, training: str, config: Config, stop: Any) -> None:
        self.directory, self.name, self.config, self.stop = directory, training, config, stop
        self.algorithm = getattr(stable_baselines([training]), MODEL_FREE[training])

    def train(self, before: Stage | None, until: int) -> Stage:
        config, done = self.config, before.env_frames if before else 0
        torch.set_num_threads(resolve_threads(config, config.device))
        model = self._model(before)
        # Seeded by seed and frames: a stage is a function of the file it starts from.
        entropy = np.random.SeedSequence([config.seed, 2, done])
        model.set_random_seed(int(entropy.generate_state(1)[0]))
        title = f"{config.env.task} from {config.env.obs}, {self.name}"
        with Progress(config.train.frames, title=title) as progress:
            progress.update(env_frames=done, phase="learning")

            def step(variables: dict[str, Any], _: dict[str, Any]) -> bool:
                nonlocal done
                info = variables["infos"][0]
                done += info["env_frames"]
                if "episode" in info:
                    progress.update(env_frames=done, last_return=float(info["episode"]["r"]))
                return not self.stop.asked

            start = time.monotonic()
            while done < until:
                decisions = -(-(until - done) // config.env.action_repeat)
                model.learn(decisions, step, log_interval=None, reset_num_timesteps=False)
                if self.stop.asked:
                    raise Stopped
            seconds = time.monotonic() - start + (before.seconds if before else 0.0)
        model.get_env().close()
        return Stage(done, seconds, self._save(model, done), _machine())

    def policies(self, stage: Stage, method: str) -> Callable[[int], Act]:
        model = self.algorithm.load(self.directory / stage.file, device=self.config.device)
        return lambda seed: lambda obs: model.predict(obs["state"], deterministic=True)[0]

    def _model(self, before: Stage | None) -> Any:
        from fastdreamer.envs.gymnasium import GymnasiumEnv

        env, device = GymnasiumEnv(config_env(self.config)), self.config.device
        if before is not None:
            model = self.algorithm.load(self.directory / before.file, env, device=device)
            if self.name == "sac":
                model.load_replay_buffer(self._replay(before.env_frames))
            return model
        options = {}
        if self.name == "sac":  # room for the whole run, and no more
            options["buffer_size"] = -(-self.config.train.frames // self.config.env.action_repeat)
        return self.algorithm("MlpPolicy", env, seed=self.config.seed, device=device, **options)

    def _save(self, model: Any, env_frames: int) -> str:
        """Write model and replay of a stage; older replays can go only when the stage counts."""
        name = f"stage-{env_frames:09d}.zip"
        with replacing(self.directory / name) as temporary:
            model.save(temporary)
        if self.name == "sac":
            newest = {stage["file"] for stage in read_json(self.directory / "stages.json", [])[-1:]}
            for old in self.directory.glob("replay-*.pkl"):
                if f"stage-{old.stem.partition('-')[2]}.zip" not in newest:
                    old.unlink()
            with replacing(self._replay(env_frames)) as temporary:
                model.save_replay_buffer(temporary)
        return name

    def _replay(self, env_frames: int) -> Path:
        return self.directory / f"replay-{env_frames:09d}.pkl"


def stable_baselines(methods: Sequence[str]) -> Any:
    """The package that trains these methods; ConfigError where it cannot be imported."""
    try:
        import stable_baselines3
    except ImportError as error:
        raise ConfigError(
            f"{' and '.join(methods)}: stable-baselines3 cannot be imported ({error}); it comes "
            f"with the extra `compare`: pip install 'fastdreamer[compare]'"
        ) from error
    return stable_baselines3


def _machine() -> str:
    """What a stage was trained on, in a line."""
    threads = torch.get_num_threads()
    parts = [f"{cpu_model()}, {os.cpu_count()} cores, {threads} thread{'s'[: threads > 1]}"]
    parts += [f"python {platform.python_version()}", f"fastdreamer {__version__}"]
    for package in ("torch", "mujoco", "dm_control", "stable-baselines3"):
        with contextlib.suppress(ModuleNotFoundError):
            parts.append(f"{package} {version(package)}")
    return "; ".join(parts)
