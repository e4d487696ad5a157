"""The ``fastdreamer`` command: train, eval, dream, report, plot, compare, bench, doctor.

Arguments come from typed dataclasses through tyro: the configuration is one already, so every
field is an option with its help text and type, and nothing is declared twice.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.logging import RichHandler

from fastdreamer import viz
from fastdreamer._version import __version__
from fastdreamer.agent import Dreamer, NonFiniteLoss, load
from fastdreamer.checkpoint import CheckpointError, list_checkpoints, load_meta
from fastdreamer.collector import (
    CollectorError,
    Recorder,
    config_env,
    episode_seed,
    evaluate,
    on_cpu,
    run_backend,
)
from fastdreamer.config import (
    PRESETS,
    Config,
    ConfigError,
    PlanConfig,
    SafetyConfig,
    from_dict,
    preset,
)
from fastdreamer.envs import canonical_task
from fastdreamer.envs.gl import GLError
from fastdreamer.exploration import calibrate_episodes
from fastdreamer.ops.backend import BackendError, check_backend, use_backend
from fastdreamer.planning import PlanningError
from fastdreamer.replay import EpisodeError
from fastdreamer.report import dream_and_live, write_report
from fastdreamer.safety import Violations, load_signal, safety_rates
from fastdreamer.trainer import RunError, Stopped, Trainer, create_run, read_config, write_config

_CONTROLLERS = {
    "actor": "deterministic actor",
    "mpc": "MPC ranked by λ-return",
    "planet": "MPC ranked by reward",
}
_RATES = {
    "violations": "violations",
    "shield_changed": "actions replaced by the shield",
    "shield_failed": "of them, no candidate kept the condition",
}
Positional = tyro.conf.Positional
Backend = Literal["run", "auto", "eager", "native", "triton"]
_EXPECTED = (
    BackendError,
    CheckpointError,
    CollectorError,
    ConfigError,
    EpisodeError,
    GLError,
    PlanningError,
    RunError,
)
"""Errors whose message is all that a user needs."""


@dataclass
class Train:
    """Train an agent, from nothing or from where a run was stopped.

    For example: fastdreamer train walker

    A run directory receives config.json, metrics.jsonl, tensorboard/, episodes/, checkpoints/ and
    videos/. Ctrl-C finishes the update, saves, and prints how to go on.
    """

    task: Annotated[Positional[str], tyro.conf.arg(metavar="TASK")] = ""
    """DeepMind Control task, domain-task: walker-walk, cheetah-run, ...; walker is walker-walk."""
    preset: Annotated[str, tyro.conf.arg(metavar="|".join(PRESETS))] = "walker"
    """Where the settings start from; the options below change single ones."""
    run: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Run directory to make; default: runs/TASK-DATE-TIME."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Go on with this run; options given here replace its settings, except task and sizes."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass
class Eval:
    """Evaluate a trained agent: mean and standard deviation of the return over episodes."""

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run directory (its newest checkpoint) or one checkpoint or snapshot file."""
    controller: Literal["auto", "actor", "mpc", "planet"] = "auto"
    """The actor, a plan ranked by λ-return (mpc) or by reward (planet); auto: the agent's own."""
    episodes: int = 10
    """Episodes, without exploration noise."""
    seed: int = 0
    """Seeds the episodes."""
    video: Annotated[Path | None, tyro.conf.arg(metavar="MP4")] = None
    """Also write a video of the first episode."""
    shield: bool = False
    """Let the shield of a run trained with --safety filter the actions."""
    calibration: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Of a run trained with --explore ucb: also write calibration.csv and calibration.png."""
    backend: Backend = "run"
    """Who computes the recurrent loops; run: who did in training, collection included."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)


@dataclass
class Dream:
    """Draw the report's Figure 4: what the agent imagines over what then really happens.

    The agent watches some decisions, then imagines its next actions and images blindly; the same
    actions are applied to the simulator.
    """

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run directory (its newest checkpoint) or one checkpoint file; trained from pixels."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where dream.png and dream.mp4 go; default: the run's videos/ directory."""
    context: int = 50
    """Decisions watched before the dream starts."""
    decisions: int = 50
    """Decisions dreamed."""
    seed: int = 0
    """Seeds the episode."""
    backend: Backend = "run"
    """Who computes the recurrent loops; run: who did in training, collection included."""


@dataclass
class Report:
    """Draw the report's Figures 3, 4 and 5 from a run's snapshots; what is done is not done again.

    The same episodes are played by the actor and by MPC at points along the run.
    """

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run directory; its snapshots are evaluated (its checkpoints where it has none)."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("report")
    """Where figures, curves and episodes.csv go; episodes found there are not played again."""
    controllers: tuple[Literal["actor", "mpc", "planet"], ...] = ()
    """Who plays; default: actor and mpc, or planet for a PlaNet agent."""
    episodes: int = 10
    """Episodes a snapshot and controller, without exploration noise."""
    points: int = 0
    """Snapshots used at most, spread evenly over the run; 0: all."""
    seed: int = 0
    """Seeds the episodes."""
    backend: Backend = "run"
    """Who computes the recurrent loops; run: who did in training, collection included."""
    plan: PlanConfig = field(default_factory=PlanConfig)


@dataclass
class Plot:
    """Draw the report's Figure 3: return against env frames, published curves dashed."""

    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN")]
    """Run directories, or CSV curves that --csv wrote."""
    out: Annotated[Path, tyro.conf.arg(metavar="PNG")] = Path("curves.png")
    """The picture (.png, .svg or .pdf)."""
    published: bool = True
    """Draw published Walker curves where the task has some."""
    csv: Annotated[Path | None, tyro.conf.arg(metavar="CSV")] = None
    """Also write the curve of the (only) run as CSV."""


@dataclass
class Bench:
    """Check the fast rollout over your own world model: errors against float64, and its speed.

    For example: fastdreamer bench --module mypkg.mymodel:make, where make() returns a Rollout or
    a model that fastdreamer.adapters knows. Exits with 1 where a value or gradient disagrees.
    """

    module: Annotated[str, tyro.conf.arg(metavar="PACKAGE.MODULE:FUNCTION")]
    """Function without arguments, found from the current directory."""
    repeats: int = 20
    """Timings of each loop, whose median is printed."""
    seed: int = 0
    """Seeds the inputs, 20 steps of 8 rows."""


@dataclass
class Compare:
    """Compare methods on one task: the same environment, evaluation, seeds and env frames.

    For example: fastdreamer compare walker-stand --methods dreamer,sac,ppo --frames 100000

    Writes a CSV, a plot and a table: return at env frames and after hours of training. The same
    command goes on with what is missing; more methods and seeds can be added to a directory.
    """

    task: Annotated[Positional[str], tyro.conf.arg(metavar="TASK")]
    """DeepMind Control task, domain-task; walker is walker-walk."""
    methods: Annotated[str, tyro.conf.arg(metavar="NAME,NAME,...")] = "dreamer,sac,ppo"
    """Among dreamer, dreamer-mpc (the same runs, planning), planet, sac, ppo; the last two need the
    extra `compare` (stable-baselines3)."""
    obs: Literal["state", "pixels"] = "state"
    """What every method sees; sac and ppo learn from state only."""
    frames: int = 100_000
    """Env frames of every run."""
    seeds: int = 3
    """Runs of every method, with seeds 0, 1, ..."""
    eval_every: int = 10_000
    """Env frames between evaluations."""
    eval_episodes: int = 5
    """Greedy episodes of an evaluation, the same ones for every method."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="|".join(PRESETS))] = None
    """Dreamer's settings and everyone's environment; default: state or, from pixels, walker."""
    threads: int = 0
    """CPU threads of every learner; 0 is torch's own choice."""
    device: str = "cpu"
    """Where every learner computes: cpu, cuda or cuda:N."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory of the comparison; default: runs/compare-TASK-OBS."""


@dataclass
class Doctor:
    """Say what this machine offers and which backend each op would take, and why not the others."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (0 done, 1 failed, 2 misused, 130 stopped)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    console = Console()
    errors = Console(stderr=True)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=errors, show_time=False, show_path=False)],
    )
    if argv in (["--version"], ["-V"]):
        console.print(f"fastdreamer {__version__}")
        return 0
    try:
        command = _parse(argv)
        if hasattr(command, "plan"):  # again: its options start from what the run says
            command = _parse(argv, _config_of(command.run))
        with _backend(command):
            return _COMMANDS[type(command)](command, argv, console) or 0
    except _EXPECTED as error:
        return _fail(errors, str(error))
    except ValueError as error:  # an argument that only its user could judge, such as a task
        return _fail(errors, str(error), status=2)


def _fail(errors: Console, text: str, status: int = 1) -> int:
    errors.print(f"fastdreamer: {text}", markup=False, highlight=False, soft_wrap=True)
    return status


def _parse(argv: list[str], config: Config | None = None) -> Any:
    subcommand, config = tyro.conf.subcommand, config or Config()
    planned = {"run": tyro.MISSING, "plan": config.plan}
    commands = (
        Annotated[Train, subcommand("train", default=_train_default(argv))]
        | Annotated[Eval, subcommand("eval", default=Eval(**planned, safety=config.safety))]
        | Annotated[Dream, subcommand("dream")]
        | Annotated[Report, subcommand("report", default=Report(**planned))]
        | Annotated[Plot, subcommand("plot")]
        | Annotated[Bench, subcommand("bench")]
        | Annotated[Compare, subcommand("compare")]
        | Annotated[Doctor, subcommand("doctor")]
    )
    return tyro.cli(
        commands,
        prog="fastdreamer",
        description="Dreamer with every recurrent loop compiled: train, evaluate, watch.",
        args=argv,
    )


def _train_default(argv: list[str]) -> Train:
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


def _config_of(path: Path) -> Config:
    """The settings of a run or checkpoint; the default ones where ``load`` will refuse it."""
    if (path / "config.json").is_file():
        return read_config(path)
    if path.is_file():
        return from_dict(load_meta(path)["config"])
    return Config()


def _backend(command: Any) -> contextlib.AbstractContextManager[None]:
    """The backend for playing with a trained agent, which is on the CPU."""
    if not isinstance(command, Eval | Dream | Report):
        return contextlib.nullcontext()
    if command.backend == "run":
        return run_backend(on_cpu(_config_of(command.run)))
    check_backend(command.backend, "cpu")
    return use_backend(command.backend)


def _train(command: Train, argv: list[str], console: Console) -> int:
    run_dir = _resumed_run(command) if command.resume else _new_run(command)
    console.print(f"run directory: {run_dir}", highlight=False, soft_wrap=True)
    again = f"fastdreamer train --resume {shlex.quote(str(run_dir))}"
    try:
        Trainer(run_dir).train()
    except Stopped:
        console.print(
            f"stopped, nothing is lost; go on with: {again}", highlight=False, soft_wrap=True
        )
        return 130
    except NonFiniteLoss as error:
        kept = list_checkpoints(run_dir / "checkpoints")
        where = f"The last good checkpoint is {kept[-1]}." if kept else "No checkpoint was due yet."
        console.print(
            f"stopped: the {error}. {where}\nGo on from there with other settings, for example: "
            f"{again} --precision fp32 --optim.model-lr 3e-4",
            highlight=False,
            soft_wrap=True,
        )
        return 1
    console.print(
        f"done; try: fastdreamer eval {run_dir}, fastdreamer plot {run_dir}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _new_run(command: Train) -> Path:
    if not command.task:
        raise ConfigError("train needs a TASK (for example: fastdreamer train walker) or --resume")
    task = canonical_task(command.task)
    config = command.config
    config = dataclasses.replace(config, env=dataclasses.replace(config.env, task=task)).validate()
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run_dir = command.run or Path("runs") / f"{task}-{stamp}"
    create_run(run_dir, config)
    return run_dir


def _resumed_run(command: Train) -> Path:
    """Take new settings into a run; refuse those that its weights or episodes don't fit."""
    run_dir = command.resume
    if command.run is not None:
        raise ConfigError("--run makes a new run and --resume goes on with one: give one of them")
    old, new = read_config(run_dir), command.config.validate()
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


def _eval(command: Eval, argv: list[str], console: Console) -> None:
    if command.episodes < 1:
        raise ConfigError(f"--episodes must be at least 1, got {command.episodes}")
    agent = load(command.run, plan=command.plan, safety=command.safety)
    controller = agent.controller(command.controller)
    shield = agent.make_shield() if command.shield else None
    watches, violations = [], None
    if command.safety.signal != "none":
        violations = Violations(load_signal(agent.config, agent.obs_shapes["state"][0]))
        watches.append(violations)
    recorder = None
    if command.calibration:
        if agent.explorer is None:
            raise ConfigError(f"{command.run} has no reward heads; train some with --explore ucb")
        recorder = Recorder()
        watches.append(recorder)
    watch = lambda *step: [look(*step) for look in watches]  # noqa: E731
    env = config_env(agent.config)
    returns = []
    for i in range(command.episodes):
        video = command.video if i == 0 else None
        seed = episode_seed(command.seed, "evaluate", i)
        returns.append(evaluate(agent, env, seed, video, controller, shield=shield, watch=watch))
        console.print(f"episode {i + 1}: return {returns[-1]:.1f}", highlight=False)
    mean = sum(returns) / len(returns)
    std = (sum((r - mean) ** 2 for r in returns) / len(returns)) ** 0.5
    frames = env.max_decisions * env.action_repeat
    console.print(
        f"{agent.config.env.task}: return {mean:.1f} ± {std:.1f} "
        f"({len(returns)} episodes of up to {frames} env frames, {_CONTROLLERS[controller]}"
        f"{', shielded' if shield else ''})",
        highlight=False,
        soft_wrap=True,
    )
    for name, rate in safety_rates(violations, shield).items():
        console.print(f"{_RATES[name]}: {rate:.1f} per 1000 decisions", highlight=False)
    if recorder is not None:
        _calibrate(agent, recorder, command, console)
    if command.video:
        console.print(f"video: {command.video}", highlight=False, soft_wrap=True)


def _calibrate(agent: Dreamer, recorder: Recorder, command: Eval, console: Console) -> None:
    """Compare true rewards of the episodes played with what the reward heads predicted."""
    generator = torch.Generator().manual_seed(episode_seed(command.seed, "evaluate", 0))
    ahead = sorted({0, 1, 5, agent.config.behavior.imag_horizon})
    rows = calibrate_episodes(
        agent.model, agent.explorer.rewards, recorder.episodes(), ahead, generator
    )
    table = viz.write_calibration(rows, command.calibration / "calibration.csv")
    picture = viz.calibration_figure(table, command.calibration / "calibration.png")
    for row in rows:
        inside = ", ".join(f"{100 * share:.0f} % of {100 * level:g} %" for level, share in
                           row.coverage.items())  # fmt: skip
        console.print(
            f"rewards {row.ahead} decisions ahead: error {row.rmse:.3f}, spread {row.spread:.3f}, "
            f"inside the interval {inside}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"table: {table}\npicture: {picture}", highlight=False, soft_wrap=True)


def _dream(command: Dream, argv: list[str], console: Console) -> None:
    agent = load(command.run)
    if "pixels" not in agent.obs_shapes:
        raise ConfigError(f"{command.run} was trained from state: it imagines no images to draw")
    env = config_env(agent.config)
    room = env.max_decisions - command.context
    if command.context < 1 or not 1 <= command.decisions <= room:
        raise ConfigError(
            f"--context and --decisions must be at least 1 and fit in an episode of "
            f"{env.max_decisions} decisions, got {command.context} and {command.decisions}"
        )
    dreamed = dream_and_live(
        agent, env, context=command.context, decisions=command.decisions, seed=command.seed
    )
    imagined, real = (part["pixels"] for part in dreamed)
    out = command.out or (command.run / "videos" if command.run.is_dir() else command.run.parent)
    out.mkdir(parents=True, exist_ok=True)
    picture = viz.dream_figure(imagined, real, out / "dream.png")
    video = viz.dream_video(imagined, real, out / "dream.mp4", fps=1 / env.decision_seconds)
    console.print(f"picture: {picture}\nvideo: {video}", highlight=False, soft_wrap=True)


def _report(command: Report, argv: list[str], console: Console) -> None:
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    files = write_report(
        command.run,
        command.out,
        controllers=command.controllers,
        episodes=command.episodes,
        points=command.points,
        seed=command.seed,
        plan=command.plan,
        say=say,
    )
    for path in files:
        say(f"wrote {path}")


def _plot(command: Plot, argv: list[str], console: Console) -> None:
    if command.csv and len(command.runs) != 1:
        raise ConfigError("--csv writes the curve of one run; name one RUN")
    out = viz.plot_runs(list(command.runs), command.out, published=command.published)
    console.print(f"picture: {out}", highlight=False, soft_wrap=True)
    if command.csv:
        table = viz.export_csv(command.runs[0], command.csv)
        console.print(f"curve: {table}", highlight=False, soft_wrap=True)


def _bench(command: Bench, argv: list[str], console: Console) -> int:
    from fastdreamer.adapters import adapt
    from fastdreamer.rollout import Rollout

    name, _, function = command.module.partition(":")
    if not name or not function:
        raise ConfigError(f"--module must be PACKAGE.MODULE:FUNCTION, got {command.module!r}")
    if command.repeats < 1:
        raise ConfigError(f"--repeats must be at least 1, got {command.repeats}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        make = getattr(importlib.import_module(name), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(f"--module {command.module}: {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    made = make()
    rollout = getattr(made, "rollout", made)
    if not isinstance(rollout, Rollout):
        rollout = adapt(made).rollout
    found = rollout.verify(seed=command.seed, repeats=command.repeats)
    console.print(str(found), markup=False, highlight=False, soft_wrap=True)
    return 0 if found.ok else 1


def _compare(command: Compare, argv: list[str], console: Console) -> int:
    from fastdreamer import compare

    task = canonical_task(command.task)
    settings = compare.Settings(
        task=task,
        obs=command.obs,
        frames=command.frames,
        eval_every=command.eval_every,
        eval_episodes=command.eval_episodes,
        preset=command.preset or {"state": "state", "pixels": "walker"}[command.obs],
        threads=command.threads,
        device=command.device,
    )
    methods = [name.strip() for name in command.methods.split(",") if name.strip()]
    out = command.out or Path("runs") / f"compare-{task}-{command.obs}"
    try:
        results = compare.compare(out, settings, methods, command.seeds, console=console)
    except Stopped:
        again = shlex.join(["fastdreamer", *argv])
        console.print(f"stopped; go on with: {again}", highlight=False, soft_wrap=True)
        return 130
    except NonFiniteLoss as error:
        return _fail(Console(stderr=True), f"compare: the {error} in the run named last")
    for name, path in zip(("curves", "picture", "table"), results, strict=True):
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True)
    console.print(results[-1].read_text("utf-8"), highlight=False, soft_wrap=True)
    return 0


def _doctor(command: Doctor, argv: list[str], console: Console) -> None:
    from fastdreamer import doctor

    doctor.report(console)


_COMMANDS = {
    Train: _train,
    Eval: _eval,
    Dream: _dream,
    Report: _report,
    Plot: _plot,
    Bench: _bench,
    Compare: _compare,
    Doctor: _doctor,
}
