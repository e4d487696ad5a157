"""``fastdreamer eval``: returns of episodes without exploration noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tyro.conf import Positional

from fastdreamer.agent import Dreamer, load
from fastdreamer.config import ConfigError, PlanConfig, SafetyConfig
from fastdreamer.exploration import calibrate_episodes
from fastdreamer.play import Recorder, config_env, episode_seed, evaluate
from fastdreamer.safety import Violations, load_signal, safety_rates
from fastdreamer.viz.calibration import calibration_figure, write_calibration

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
    plan: PlanConfig = field(default_factory=PlanConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)


def run_eval(command: Eval, say: Callable[[str], None]) -> None:
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
        say(f"episode {i + 1}: return {returns[-1]:.1f}")
    mean = sum(returns) / len(returns)
    std = (sum((r - mean) ** 2 for r in returns) / len(returns)) ** 0.5
    frames = env.max_decisions * env.action_repeat
    say(
        f"{agent.config.env.task}: return {mean:.1f} ± {std:.1f} "
        f"({len(returns)} episodes of up to {frames} env frames, {_CONTROLLERS[controller]}"
        f"{', shielded' if shield else ''})"
    )
    for name, rate in safety_rates(violations, shield).items():
        say(f"{_RATES[name]}: {rate:.1f} per 1000 decisions")
    if recorder is not None:
        _calibrate(agent, recorder, command, say)
    if command.video:
        say(f"video: {command.video}")


def _calibrate(
    agent: Dreamer, recorder: Recorder, command: Eval, say: Callable[[str], None]
) -> None:
    """Compare true rewards of the episodes played with what the reward heads predicted."""
    generator = torch.Generator().manual_seed(episode_seed(command.seed, "evaluate", 0))
    ahead = sorted({0, 1, 5, agent.config.behavior.imag_horizon})
    rows = calibrate_episodes(
        agent.model, agent.explorer.rewards, recorder.episodes(), ahead, generator
    )
    table = write_calibration(rows, command.calibration / "calibration.csv")
    picture = calibration_figure(table, command.calibration / "calibration.png")
    for row in rows:
        inside = ", ".join(f"{100 * share:.0f} % of {100 * level:g} %" for level, share in
                           row.coverage.items())  # fmt: skip
        say(
            f"rewards {row.ahead} decisions ahead: error {row.rmse:.3f}, spread {row.spread:.3f}, "
            f"inside the interval {inside}"
        )
    say(f"table: {table}\npicture: {picture}")
