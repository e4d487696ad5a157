"""``fastdreamer dream``: what the agent imagines over what then really happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from fastdreamer.acting.play import config_env
from fastdreamer.analysis.report import dream_and_live
from fastdreamer.analysis.viz.dreams import dream_figure, dream_video
from fastdreamer.cli.run import Backend, allow_task
from fastdreamer.config import ConfigError
from fastdreamer.training.pretrained import load


@dataclass
class Dream:
    """Draw the report's Figure 4: what the agent imagines over what then really happens.

    The agent watches some decisions, then imagines its next actions and images blindly; the same
    actions are applied to the simulator.
    """

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run directory (its newest checkpoint), one checkpoint file, or an agent that comes with the
    package (walker-walk); trained from pixels."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where dream.png and dream.mp4 go; default: the run's videos/ directory, beside the file or,
    of an agent that comes with the package, here."""
    context: int = 50
    """Decisions watched before the dream starts."""
    decisions: int = 50
    """Decisions dreamed."""
    seed: int = 0
    """Seeds the episode."""
    task: str = ""
    """Of a run whose task is a function of yours: module:function again, to have it imported."""
    backend: Backend = "run"
    """Who computes the recurrent loops; run: who did in training, collection included."""


def run_dream(command: Dream, say: Callable[[str], None]) -> None:
    agent = load(command.run)
    allow_task(agent.config, command.run, command.task)
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
    picture = dream_figure(imagined, real, out / "dream.png")
    video = dream_video(imagined, real, out / "dream.mp4", fps=1 / env.decision_seconds)
    say(f"picture: {picture}\nvideo: {video}")
