"""``fastdreamer tasks``: what there is to train on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastdreamer.envs import list_tasks

_OTHERS = """
Others by the same commands (docs/tasks.md):
  gym:ID           an environment registered with gymnasium, as gym:Pendulum-v1
  module:function  the gymnasium.Env that a function of yours returns"""


@dataclass
class Tasks:
    """List the tasks of the DeepMind Control suite, and say how to name others."""


def run_tasks(command: Tasks, say: Callable[[str], None]) -> None:
    for name in list_tasks():
        say(name)
    say(_OTHERS)
