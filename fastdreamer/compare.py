"""Methods side by side: the same task, the same frames, the same evaluation.

A run is one training method under one seed. It goes in stages, from one evaluation to the next; a
stage starts from the file that the one before left and ends with a file of its own. So a stopped
comparison loses at most the stage under way (Dreamer's even goes on inside it), and its numbers are
those of an uninterrupted one. Evaluation happens between stages, outside the clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastdreamer._version import __version__
from fastdreamer.agent import load
from fastdreamer.checkpoint import list_checkpoints
from fastdreamer.collector import agent_policy, config_env, episode_seed, rollout_episode
from fastdreamer.config import Config, ConfigError, preset
from fastdreamer.device import resolve_config, resolve_device
from fastdreamer.doctor import cpu_model
from fastdreamer.files import replacing, write_csv
from fastdreamer.logger import Progress, format_seconds, read_metrics
from fastdreamer.trainer import RunError, Stopped, Trainer, create_run, lock_run, stop_signals
from fastdreamer.viz.comparison import comparison_figure, mean_and_std, read_comparison

Policy = Callable[[dict[str, np.ndarray]], np.ndarray]


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
        return _targets(self.frames, self.eval_every)


@dataclass(frozen=True)
class Stage:
    """How far a run has come."""

    env_frames: int
    seconds: float  # wall clock of training up to here, without start-up and evaluation
    file: str  # in the run's directory, holds the policy
    machine: str  # that trained it


def compare(
    out: Path, settings: Settings, methods: Sequence[str], seeds: int, *, console: Console
) -> list[Path]:
    """Train and evaluate what is missing under ``out``, then write the results.

    Args:
        out: directory of the comparison; what is done there is kept.
        settings: must equal those that ``out`` was started with.
        methods: names among ``METHODS``.
        seeds: seeds 0 .. seeds - 1 of every method.
        console: for progress.

    Returns:
        The CSV, the plot and the table.

    Raises:
        ConfigError: an unknown method, a setting that cannot run or differs from the first
            command's, or a missing extra. BackendError: the device cannot run here.
        RunError: another process is at one of the runs, or a file is damaged.
        Stopped: a signal asked to stop; the same call goes on.
    """
    settings = dataclasses.replace(settings, device=resolve_device(settings.device))
    _check(settings, methods, seeds)
    _start(out, settings)
    runs = [(method, seed) for seed in range(seeds) for method in methods]
    try:
        with stop_signals() as stop:
            for i, (method, seed) in enumerate(runs, 1):
                console.rule(f"{method}, seed {seed} ({i} of {len(runs)})")
                _run(out, settings, method, seed, stop, console)
                results = write_results(out)
    except Stopped:
        with contextlib.suppress(RunError):  # nothing was evaluated yet
            write_results(out)
        raise
    return results


def _targets(frames: int, eval_every: int) -> list[int]:
    return sorted({*range(eval_every, frames + 1, eval_every), frames})


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
        _stable_baselines(free)


def _stable_baselines(methods: Sequence[str]) -> Any:
    try:
        import stable_baselines3
    except ImportError as error:
        raise ConfigError(
            f"{' and '.join(methods)}: stable-baselines3 cannot be imported ({error}); it comes "
            f"with the extra `compare`: pip install 'fastdreamer[compare]'"
        ) from error
    return stable_baselines3


def _start(out: Path, settings: Settings) -> None:
    """Claim a directory, or check that it was started with the same settings."""
    path = out / "compare.json"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        _write_json(path, asdict(settings))
        return
    old = _read_json(path)
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
    directory.mkdir(exist_ok=True)
    learner_type = _ModelFree if training in MODEL_FREE else _WorldModel
    learner = learner_type(directory, training, settings.config(seed), stop)
    with lock_run(directory):
        stages = [Stage(**stage) for stage in _read_json(directory / "stages.json", [])]
        evaluations = _read_json(directory / f"{method}.json", [])
        for target in settings.targets():
            # A stage may end behind its target: PPO learns from whole rollouts.
            reached = [stage for stage in stages if stage.env_frames >= target]
            if not reached:
                stages.append(learner.train(stages[-1] if stages else None, target))
                _write_json(directory / "stages.json", [asdict(stage) for stage in stages])
                reached = stages[-1:]
            stage = reached[0]
            if any(done["env_frames"] == stage.env_frames for done in evaluations):
                continue
            returns = _evaluate(learner, stage, method, settings, seed, stop)
            evaluations.append(
                {"env_frames": stage.env_frames, "seconds": stage.seconds, "returns": returns}
            )
            _write_json(directory / f"{method}.json", evaluations)
            console.print(
                f"{method}, seed {seed}: return {np.mean(returns):.1f} ± {np.std(returns):.1f} "
                f"({len(returns)} episodes) after {stage.env_frames:,} of {settings.frames:,} env "
                f"frames and {format_seconds(stage.seconds)} of training",
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
        for _, _, reward, _, _ in rollout_episode(env, make_policy(start), start):
            total += reward
            if stop.asked:
                raise Stopped
        returns.append(total)
    env.close()
    return returns


class _WorldModel:
    """A run of ``fastdreamer train``, stopped and gone on with at every evaluation."""

    def __init__(self, directory: Path, training: str, config: Config, stop: Any) -> None:
        self.directory, self.run_dir = directory, directory / "run"
        self.config = dataclasses.replace(config, agent=training).validate()

    def train(self, before: Stage | None, until: int) -> Stage:
        if not (self.run_dir / "config.json").exists():
            create_run(self.run_dir, self.config)
        trainer = Trainer(self.run_dir)
        trainer.train(until=until)
        newest = list_checkpoints(self.run_dir / "checkpoints")[-1]
        name = f"stage-{trainer.env_frames:09d}{newest.suffix}"
        with replacing(self.directory / name) as temporary:
            shutil.copyfile(newest, temporary)
        seconds = max(record["seconds"] for record in read_metrics(self.run_dir))
        return Stage(trainer.env_frames, seconds, name, _machine())

    def policies(self, stage: Stage, method: str) -> Callable[[int], Policy]:
        agent = load(self.directory / stage.file)
        return lambda seed: agent_policy(agent, seed, 0.0, METHODS[method].controller)


class _ModelFree:
    """Soft actor-critic or proximal policy optimisation, as stable-baselines3 sets them up."""

    def __init__(self, directory: Path, training: str, config: Config, stop: Any) -> None:
        self.directory, self.name, self.config, self.stop = directory, training, config, stop
        self.algorithm = getattr(_stable_baselines([training]), MODEL_FREE[training])

    def train(self, before: Stage | None, until: int) -> Stage:
        config, done = self.config, before.env_frames if before else 0
        if config.threads:
            torch.set_num_threads(config.threads)
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

    def policies(self, stage: Stage, method: str) -> Callable[[int], Policy]:
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
            newest = {
                stage["file"] for stage in _read_json(self.directory / "stages.json", [])[-1:]
            }
            for old in self.directory.glob("replay-*.pkl"):
                if f"stage-{old.stem.partition('-')[2]}.zip" not in newest:
                    old.unlink()
            with replacing(self._replay(env_frames)) as temporary:
                model.save_replay_buffer(temporary)
        return name

    def _replay(self, env_frames: int) -> Path:
        return self.directory / f"replay-{env_frames:09d}.pkl"


# -------------------------------------------------------------------------------- results


def write_results(out: Path) -> list[Path]:
    """Write compare.csv, compare.png and compare.md of everything evaluated under ``out``.

    Returns the three paths. Raises RunError where nothing was evaluated yet.
    """
    settings = _read_json(out / "compare.json", {})
    rows, machines = [], {}
    for method, kind in METHODS.items():
        for directory in sorted(out.glob(f"{kind.training}-seed*"), key=_seed_of):
            evaluations = _read_json(directory / f"{method}.json", [])
            for done in evaluations:
                rows.append({
                    "method": method,
                    "seed": _seed_of(directory),
                    "env_frames": done["env_frames"],
                    "seconds": round(done["seconds"], 3),
                    "return_mean": float(np.mean(done["returns"])),
                    "return_std": float(np.std(done["returns"])),
                    "episodes": len(done["returns"]),
                })  # fmt: skip
            if evaluations:
                stages = _read_json(directory / "stages.json")
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
    targets = _targets(about["frames"], about["eval_every"])
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


def _seed_of(directory: Path) -> int:
    return int(directory.name.rpartition("-seed")[2])


def _machine() -> str:
    """What a stage was trained on, in a line."""
    threads = torch.get_num_threads()
    parts = [f"{cpu_model()}, {os.cpu_count()} cores, {threads} thread{'s'[: threads > 1]}"]
    parts += [f"python {platform.python_version()}", f"fastdreamer {__version__}"]
    for package in ("torch", "mujoco", "dm_control", "stable-baselines3"):
        with contextlib.suppress(ModuleNotFoundError):
            parts.append(f"{package} {version(package)}")
    return "; ".join(parts)


def _read_json(path: Path, default: Any = None) -> Any:
    if default is not None and not path.exists():
        return default
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: damaged ({error})") from error


def _write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
