"""The learner of a training run without the run: no collector, log or checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from unittest import mock

import numpy as np
import torch

from benchmarks.synthetic import ACTION_DIM, OBS_SHAPES
from benchmarks.variants import OURS, VARIANTS, Variant
from fastdreamer.agent import Dreamer
from fastdreamer.config import preset
from fastdreamer.ops.backend import OPS, use_backend
from fastdreamer.replay import Replay
from fastdreamer.trainer import Trainer

LOOPS = ("observe", "imagine")
"""The ops of an update."""


def variants() -> list[str]:
    """Names of the variants that a table of updates has: eager, and native where it is built."""
    names = ["eager fp32", "eager bf16"]
    if all(OPS[op].why_not("native", "cpu") is None for op in LOOPS):
        names += ["native fp32", "native bf16"]
    return names


class Learner(Trainer):
    """A trainer that only learns: ``step()`` is one update by ``Trainer``'s own code.

    Args:
        variant: a key of ``variants``; compiled: encoder, decoder, heads and loops.
        replay: to sample from.
        preset_name: of the configuration.
    """

    def __init__(
        self,
        variant: str,
        replay: Replay,
        preset_name: str,
        variants: Mapping[str, Variant] = VARIANTS,
    ) -> None:
        self.variant = variants[variant]
        config = dataclasses.replace(
            preset(preset_name),
            backend=self.variant.backend if self.variant.backend in OURS else "eager",
            device=self.variant.device,
            precision="bf16" if self.variant.bf16 else "fp32",
        )
        self.config = config
        self.agent = Dreamer(config, OBS_SHAPES, ACTION_DIM)
        if self.variant.backend == "compiled":
            model = self.agent.model
            for module in (model.encoder, model.decoder, model.reward, self.agent.critic):
                module.compile(dynamic=False)
        self.optimizers = self.agent.make_optimizers()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.sample_rng = np.random.default_rng(config.seed)
        self.replay = replay
        self.update = 0

    def step(self) -> dict[str, float]:
        """Sample a batch and learn from it; return the losses.

        Raises:
            BackendError: an op of the update has no native body.
        """
        with use_backend(self.config.backend), _stand_ins(self.variant):
            metrics = self._update()
        self.update += 1
        return metrics


@contextlib.contextmanager
def _stand_ins(variant: Variant) -> Iterator[None]:
    """The variant's matrix products; compiled loops where the eager bodies would run."""
    with contextlib.ExitStack() as stack:
        # Precision alone: the agent enters autocast by itself, where its losses allow it.
        stack.enter_context(variant._replace(bf16=False).context())
        if variant.backend == "compiled":
            from benchmarks import compiled  # the compiler is large, and memory.py measures us

            for name, body in zip(LOOPS, (compiled.observe, compiled.imagine), strict=True):
                stack.enter_context(mock.patch.object(OPS[name], "eager", body))
        yield
