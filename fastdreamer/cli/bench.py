"""``fastdreamer bench``: the fast rollout over the user's own model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import tyro

from fastdreamer.config import ConfigError
from fastdreamer.named import named
from fastdreamer.rollout import Rollout, adapt


@dataclass
class Bench:
    """Check the fast rollout over your own world model: errors against float64, and its speed.

    For example: fastdreamer bench --module mypkg.mymodel:make, where make() returns a Rollout or
    a model that fastdreamer.rollout.adapt knows. Exits with 1 where a value or gradient disagrees.
    """

    module: Annotated[str, tyro.conf.arg(metavar="PACKAGE.MODULE:FUNCTION")]
    """Function without arguments, found from the current directory."""
    repeats: int = 20
    """Timings of each loop, whose median is printed."""
    seed: int = 0
    """Seeds the inputs, 20 steps of 8 rows."""


def run_bench(command: Bench, say: Callable[[str], None]) -> int:
    name, _, function = command.module.partition(":")
    if not name or not function:
        raise ConfigError(f"--module must be PACKAGE.MODULE:FUNCTION, got {command.module!r}")
    if command.repeats < 1:
        raise ConfigError(f"--repeats must be at least 1, got {command.repeats}")
    try:
        make = named(command.module)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(f"--module {command.module}: {error}") from error
    made = make()
    rollout = getattr(made, "rollout", made)
    if not isinstance(rollout, Rollout):
        rollout = adapt(made).rollout
    found = rollout.verify(seed=command.seed, repeats=command.repeats)
    say(str(found))
    return 0 if found.ok else 1
