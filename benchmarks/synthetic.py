"""Walker-sized data without a simulator: the time of an update does not depend on what is seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastdreamer.training.episodes import episode_fields, write_episode
from fastdreamer.training.replay import Replay

OBS_SHAPES = {"pixels": (64, 64, 3)}
ACTION_DIM = 6
DECISIONS = 500  # of one Walker episode at action repeat 2


def write_episodes(directory: Path, count: int) -> None:
    """Write that many full-length Walker episodes of noise, numbered from 0 (6.2 MB each)."""
    rng = np.random.default_rng(0)
    steps = DECISIONS + 1
    for index in range(count):
        action = rng.uniform(-1, 1, (steps, ACTION_DIM)).astype(np.float32)
        reward = rng.uniform(0, 2, steps).astype(np.float32)
        action[0] = reward[0] = 0
        arrays = {
            "pixels": rng.integers(0, 256, (steps, *OBS_SHAPES["pixels"]), np.uint8),
            "action": action,
            "reward": reward,
            "terminated": np.zeros(steps, bool),
        }
        write_episode(directory, index, arrays, {"env_frames": 2 * DECISIONS, "task": "noise"})


def open_replay(directory: Path) -> Replay:
    """Return an empty replay over a directory of such episodes; ``add`` or ``load`` fills it."""
    fields = episode_fields(OBS_SHAPES, ACTION_DIM)
    return Replay(directory, capacity=1_000_000, fields=fields)
