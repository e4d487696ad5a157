"""The learner of a training run without the run: no collector, log or checkpoint."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from benchmarks.synthetic import ACTION_DIM, OBS_SHAPES
from fastdreamer.agent import Dreamer
from fastdreamer.config import preset
from fastdreamer.ops.backend import use_backend
from fastdreamer.replay import Replay
from fastdreamer.trainer import Trainer

VARIANTS = {
    "eager fp32": ("eager", "fp32"),
    "eager bf16": ("eager", "bf16"),
    "native fp32": ("native", "fp32"),
    "native bf16": ("native", "bf16"),
}
"""Name → backend and precision (bf16: autocast, float32 weights). The first is the reference."""


class Learner(Trainer):
    """A trainer that only learns: ``step()`` is one update by ``Trainer``'s own code.

    Args:
        variant: a key of ``VARIANTS``.
        replay: to sample from.
        preset_name: of the configuration.
    """

    def __init__(self, variant: str, replay: Replay, preset_name: str) -> None:
        backend, precision = VARIANTS[variant]
        config = dataclasses.replace(preset(preset_name), backend=backend, precision=precision)
        self.config = config
        self.agent = Dreamer(config, OBS_SHAPES, ACTION_DIM)
        self.optimizers = self.agent.make_optimizers()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.sample_rng = np.random.default_rng(config.seed)
        self.replay = replay
        self.update = 0

    def step(self) -> dict[str, float]:
        """Sample a batch and learn from it; return the losses."""
        with use_backend(self.config.backend):
            metrics = self._update()
        self.update += 1
        return metrics
