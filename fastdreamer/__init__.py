"""fastdreamer: Dreamer with every recurrent loop compiled. This is the whole public surface."""

from fastdreamer._version import __version__
from fastdreamer.agent import Dreamer, NonFiniteLoss, load
from fastdreamer.checkpoint import CheckpointError
from fastdreamer.config import PRESETS, Config, ConfigError, PlanConfig, preset
from fastdreamer.envs import canonical_task, list_tasks, make_env
from fastdreamer.ops.backend import BackendError, use_backend
from fastdreamer.ops.lambda_return import lambda_return
from fastdreamer.planning import PlanningError
from fastdreamer.policy import PolicyState

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
    "__version__",
    "canonical_task",
    "lambda_return",
    "list_tasks",
    "load",
    "make_env",
    "preset",
    "use_backend",
]
