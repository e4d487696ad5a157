"""``fastdreamer watch``: the newest agent acting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tyro.conf import Positional

from fastdreamer.analysis.watch import Show, serve, write
from fastdreamer.cli.run import Backend, allow_task


@dataclass
class Watch:
    """Watch the newest agent act: what happens, what it sees of that, and what it dreams.

    A page on this machine, which follows a run that trains, or with --out one episode in a file.
    The dream goes on blindly for 50 decisions, by the actions that the agent takes.
    """

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run directory (its newest checkpoint), one checkpoint or snapshot file, or an agent that
    comes with the package (walker-walk); trained from pixels."""
    port: int = 8000
    """Of the page, http://127.0.0.1:PORT, which other machines cannot reach; 0: a free one."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Instead of a page: one episode as NAME.gif or NAME.mp4."""
    seed: int = 0
    """Seeds the episodes; the first is that of eval."""
    task: str = ""
    """Of a run whose task is a function of yours: module:function again, to have it imported."""
    backend: Backend = "run"
    """Who computes the recurrent loops; run: who did in training, collection included."""


def run_watch(command: Watch, say: Callable[[str], None]) -> None:
    torch.set_num_threads(1)  # beside a run that learns
    show = Show(
        command.run,
        command.seed,
        allow=lambda config: allow_task(config, command.run, command.task),
    )
    if command.out:
        say(f"wrote {write(show, command.out)}")
    else:
        serve(show, command.port, say)
