"""fastdreamer: Dreamer with every recurrent loop compiled. This is the whole public surface.

Names are imported when they are first asked for, so that the command line can say how torch's
threads wait before torch is loaded.
"""

import contextlib
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastdreamer._version import __version__
from fastdreamer.errors import how_to_install

if TYPE_CHECKING:
    from fastdreamer.acting.planning import PlanningError
    from fastdreamer.acting.policy import PolicyState
    from fastdreamer.config import (
        PRESETS,
        Config,
        ConfigError,
        PlanConfig,
        SafetyConfig,
        preset,
    )
    from fastdreamer.envs import canonical_task, list_tasks, make_env
    from fastdreamer.learning.dreamer import Dreamer, NonFiniteLoss
    from fastdreamer.ops.backend import BackendError, use_backend
    from fastdreamer.ops.lambda_return import lambda_return
    from fastdreamer.training.checkpoint import CheckpointError
    from fastdreamer.training.pretrained import load
    from fastdreamer.training.replay import Replay
    from fastdreamer.training.trainer import RunError, Stopped, Trainer

_HOMES = {
    "acting.planning": ("PlanningError",),
    "acting.policy": ("PolicyState",),
    "config": ("PRESETS", "Config", "ConfigError", "PlanConfig", "SafetyConfig", "preset"),
    "envs": ("canonical_task", "list_tasks", "make_env"),
    "learning.dreamer": ("Dreamer", "NonFiniteLoss"),
    "ops.backend": ("BackendError", "use_backend"),
    "ops.lambda_return": ("lambda_return",),
    "training.checkpoint": ("CheckpointError",),
    "training.pretrained": ("load",),
    "training.replay": ("Replay",),
    "training.trainer": ("RunError", "Stopped", "Trainer"),
}

__all__ = [
    "PRESETS",
    "BackendError",
    "CheckpointError",
    "Config",
    "ConfigError",
    "Dreamer",
    "NonFiniteLoss",
    "PlanConfig",
    "PlanningError",
    "PolicyState",
    "Replay",
    "RunError",
    "SafetyConfig",
    "Stopped",
    "Trainer",
    "__version__",
    "canonical_task",
    "lambda_return",
    "list_tasks",
    "load",
    "make_env",
    "preset",
    "use_backend",
]


_forked = False
"""Whether this process was forked since it imported the package: the core, which is loaded when it
is first asked for, then uses one thread."""


def _note_fork() -> None:
    global _forked
    _forked = True


with contextlib.suppress(AttributeError):  # Windows forks nothing
    os.register_at_fork(after_in_child=_note_fork)


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            try:
                value = getattr(import_module(f"{__name__}.{home}"), name)
            except ModuleNotFoundError as error:
                if (remedy := how_to_install(error)) is None:
                    raise
                message = f"{__name__}.{name} needs a package: {remedy}"
                raise ModuleNotFoundError(message, name=error.name) from None
            globals()[name] = value  # the next time it is found without asking
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
