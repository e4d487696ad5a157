"""Every setting of a run, as frozen dataclasses; presets are values, not code paths.

``Config()`` is the report's experiment. ``PRESETS`` holds the named starting points, the command
line overrides single fields (``--model.deter 300``), and ``validate()`` refuses what cannot run.
"""

from fastdreamer.config.architecture import architecture, differences
from fastdreamer.config.config import Config, from_dict, to_dict
from fastdreamer.config.presets import PRESETS, preset
from fastdreamer.config.schema import ConfigError
from fastdreamer.config.sections import (
    BehaviorConfig,
    CollectConfig,
    EnvConfig,
    EvalConfig,
    ExploreConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    ReplayConfig,
    SafetyConfig,
    TrainConfig,
)

__all__ = [
    "PRESETS",
    "BehaviorConfig",
    "CollectConfig",
    "Config",
    "ConfigError",
    "EnvConfig",
    "EvalConfig",
    "ExploreConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "PlanConfig",
    "ReplayConfig",
    "SafetyConfig",
    "TrainConfig",
    "architecture",
    "differences",
    "from_dict",
    "preset",
    "to_dict",
]
