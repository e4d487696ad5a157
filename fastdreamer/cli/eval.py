"""``fastdreamer eval``: returns of episodes without exploration noise."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from tyro.conf import Positional

from fastdreamer.acting.play import (
    Recorder,
    at_once,
    episode_seed,
    evaluate_together,
    more_envs,
)
from fastdreamer.acting.shield import safety_rates
from fastdreamer.acting.signals import Violations, load_signal
from fastdreamer.analysis.calibration import calibrate_episodes
from fastdreamer.analysis.viz.calibration import calibration_figure, write_calibration
from fastdreamer.cli.run import Backend, allow_task, config_of
from fastdreamer.config import ConfigError, PlanConfig, SafetyConfig
from fastdreamer.files import make_directory
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.named import names_code
from fastdreamer.training.pretrained import load

_CONTROLLERS = {
    "actor": "deterministic actor",
    "mpc": "MPC ranked by λ-return",
    "planet": "MPC ranked by reward",
}
_RATES = {
    "violations": "violations",
    "shield_changed": "actions replaced by the shield",
    "shield_failed": "no candidate kept the condition",
}


@dataclass
class Eval:
    """Evaluate a trained agent: mean and standard deviation of the return over episodes.

    Planner and safety start from the run's own settings, not from the defaults below.
    """

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run directory (its newest checkpoint), checkpoint or snapshot file; or the name of an agent
    that comes with the package: walker-walk."""
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
    task: str = ""
    """Of a run whose task is a function of yours: module:function again, to have it imported."""
    backend: Backend = "run"
    """Who computes the recurrent loops; run: who did in training, collection included."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)


def run_eval(command: Eval, say: Callable[[str], None]) -> None:
    if command.episodes < 1:
        raise ConfigError(f"--episodes must be at least 1, got {command.episodes}")
    agent = load(command.run, plan=command.plan, safety=command.safety)
    allow_task(agent.config, command.run, command.task)
    controller = agent.controller(command.controller)
    shield = agent.make_shield() if command.shield else None
    violations, recorders = None, []
    own = config_of(command.run).safety
    if names_code(own.signal) and command.safety.signal == "none":
        say(
            f"{command.run} names {own.signal} as its safety signal: with --safety {own.signal} it "
            "is imported, and violations are counted"
        )
    if command.safety.signal != "none":
        violations = Violations(load_signal(agent.config, agent.obs_shapes["state"][0]))
    if command.calibration:
        if agent.explorer is None:
            raise ConfigError(f"{command.run} has no reward heads; train some with --explore ucb")
        make_directory(command.calibration)  # before an hour of episodes that it is for
        recorders = [Recorder() for _ in range(command.episodes)]

    def look(i: int, *step: Any) -> None:
        if violations is not None:
            violations(*step)
        if recorders:
            recorders[i](*step)

    envs = more_envs([], agent.config, at_once(agent.config, controller, command.episodes))
    returns = evaluate_together(
        agent,
        envs,
        [episode_seed(command.seed, "evaluate", i) for i in range(command.episodes)],
        command.video,
        controller,
        shield=shield,
        watches=[partial(look, i) for i in range(command.episodes)],
    )
    for i, value in enumerate(returns):
        say(f"episode {i + 1}: return {value:.1f}")
    several = len(returns) > 1
    spread = f" ± {statistics.pstdev(returns):.1f}" if several else ""
    frames = envs[0].max_decisions * envs[0].action_repeat
    say(
        f"{agent.config.env.task}: return {statistics.fmean(returns):.1f}{spread} "
        f"({len(returns)} episode{'s' * several} of up to {frames} env frames, "
        f"{_CONTROLLERS[controller]}"
        f"{', shielded' if shield else ''})"
    )
    for name, rate in safety_rates(violations, shield).items():
        say(f"{_RATES[name]}: {rate:.1f} per 1000 decisions")
    if recorders:
        _calibrate(agent, [r.episodes()[0] for r in recorders], command, say)
    if command.video:
        say(f"video: {command.video}")


def _calibrate(
    agent: Dreamer,
    episodes: list[dict[str, np.ndarray]],
    command: Eval,
    say: Callable[[str], None],
) -> None:
    """Compare true rewards of the episodes played with what the reward heads predicted."""
    generator = torch.Generator().manual_seed(episode_seed(command.seed, "evaluate", 0))
    ahead = sorted({0, 1, 5, agent.config.behavior.imag_horizon})
    rows = calibrate_episodes(agent.model, agent.explorer.rewards, episodes, ahead, generator)
    table = write_calibration(rows, command.calibration / "calibration.csv")
    picture = calibration_figure(table, command.calibration / "calibration.png")
    for row in rows:
        inside = ", ".join(f"{100 * share:.0f} % of {100 * level:g} %" for level, share in
                           row.coverage.items())  # fmt: skip
        say(
            f"rewards {row.ahead} decisions ahead: error {row.rmse:.3f}, spread {row.spread:.3f}, "
            f"inside the interval {inside}"
        )
    for missing in sorted({*ahead} - {row.ahead for row in rows}):
        say(f"rewards {missing} decisions ahead: no episode had so many")
    say(f"table: {table}\npicture: {picture}")
