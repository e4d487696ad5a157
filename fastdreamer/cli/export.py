"""``fastdreamer export``: a run's agent as one small file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from fastdreamer.config import ConfigError
from fastdreamer.training.pretrained import export_agent


@dataclass
class Export:
    """Write an agent's weights alone to one file, which load, eval and dream read."""

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run directory (its newest checkpoint) or one checkpoint or snapshot file."""
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The file to write, NAME.safetensors."""
    half: bool = True
    """Keep the weights as float16, half the size; --no-half: as float32."""


def run_export(command: Export, say: Callable[[str], None]) -> None:
    if command.out.suffix != ".safetensors":
        raise ConfigError(f"FILE must end in .safetensors, got {command.out}")
    path = export_agent(command.run, command.out, half=command.half)
    say(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
