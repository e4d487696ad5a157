"""The learner of a training run without the run: no collector, log or checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks import subpixel
from benchmarks.captured import capture
from benchmarks.synthetic import ACTION_DIM, OBS_SHAPES
from benchmarks.variants import OURS, VARIANTS, Entries, Variant, check_complete
from fastdreamer.config import preset
from fastdreamer.learning.dreamer import Dreamer, NonFiniteLoss
from fastdreamer.ops.backend import OPS, use_backend
from fastdreamer.training.ranks import Lead, current
from fastdreamer.training.replay import Replay
from fastdreamer.training.trainer import Trainer

NATIVE = ("encode", "observe", "decode_error", "imagine")
"""The ops of an update."""
MODES = {"compiled": None, "reduced": "reduce-overhead"}
"""Of ``torch.compile``, by the backend of a variant."""


def variants(allow_missing: bool = False) -> list[str]:
    """Names of the variants that a table of updates has: eager and native.

    Raises:
        MissingVariant: native cannot run and may not be missing.
    """
    eager, native = ["eager fp32", "eager bf16"], ["native fp32", "native bf16"]
    reasons = [reason for op in NATIVE if (reason := OPS[op].why_not("native", "cpu"))]
    left_out = dict.fromkeys(native if reasons else [], "; ".join(dict.fromkeys(reasons)))
    check_complete(Entries({}, left_out, tuple(left_out)), allow_missing)
    return [name for name in eager + native if name not in left_out]


class Learner(Trainer):
    """A trainer that only learns: ``step()`` is one update by ``Trainer``'s own code.

    On a GPU every noise is drawn there, for all variants alike; ``fastdreamer train`` draws it on
    the CPU.

    Args:
        variant: a key of ``variants``; compiled: heads and ops.
        replay: to sample from.
        preset_name: of the configuration.
        threads: of it, what other ranks learn on.
    """

    def __init__(
        self,
        variant: str,
        replay: Replay,
        preset_name: str,
        variants: Mapping[str, Variant] = VARIANTS,
        threads: int = 0,
    ) -> None:
        self.variant = variants[variant]
        config = preset(preset_name)
        config = dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, log_every=10**9),  # one update like another
            backend=self.variant.backend if self.variant.backend in OURS else "eager",
            device=self.variant.device,
            precision="bf16" if self.variant.bf16 else "fp32",
            threads=threads,
        )
        self.config = config
        self._lead = Lead(current())
        self.agent = Dreamer(config, OBS_SHAPES, ACTION_DIM, ranks=self._lead.ranks)
        if self.variant.backend in MODES:
            for module in (self.agent.model.reward, self.agent.critic):
                module.compile(dynamic=False, mode=MODES[self.variant.backend])
        if self.variant.graph:
            self.agent.update = CapturedUpdate(self.agent)
        self.optimizers = self.agent.make_optimizers()
        self.generator = torch.Generator(self.variant.device).manual_seed(config.seed)
        self.sample_rng = np.random.default_rng(config.seed)
        self.replay = replay
        self.update = 0
        self._lead.start(self.agent, self.optimizers, self.generator)

    def step(self) -> dict[str, float]:
        """Sample a batch and learn from it; return the losses.

        Raises:
            BackendError: an op of the update has no native body.
        """
        with use_backend(self.config.backend), _stand_ins(self.variant):
            metrics = self._update()
        self.update += 1
        return metrics


class CapturedUpdate:
    """``agent.update`` of a new agent as one torch CUDA graph, captured in the first call.

    A graph can't ask for numbers: the losses are read behind it, and one that is not finite is
    noticed after its step. The batch is copied to where the graph reads it.
    """

    def __init__(self, agent: Dreamer) -> None:
        self._agent, self._update = agent, agent.update
        self._replay: Callable[[], None] | None = None

    def __call__(
        self,
        batch: dict[str, Tensor],
        optimizers: dict[str, torch.optim.Optimizer],
        generator: torch.Generator,
        *,
        health: bool = False,
    ) -> dict[str, float]:
        assert not health, "a graph does one and the same work; nothing is logged here"
        if self._replay is None:
            self._capture(batch, optimizers, generator)
        for name, tensor in self._batch.items():
            tensor.copy_(batch[name])
        self._replay()
        numbers = torch.stack(list(self._metrics.values())).tolist()
        metrics = dict(zip(self._metrics, numbers, strict=True))
        for name, number in metrics.items():
            if not math.isfinite(number):
                raise NonFiniteLoss(name, number)
        return metrics

    def _capture(
        self,
        batch: dict[str, Tensor],
        optimizers: dict[str, torch.optim.Optimizer],
        generator: torch.Generator,
    ) -> None:
        """Capture an update on a batch like this; nothing is learned from it."""
        self._batch = {name: tensor.clone() for name, tensor in batch.items()}
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["capturable"] = True
        weights, noise = self._agent.state_dict(), generator.get_state()
        before = {name: tensor.clone() for name, tensor in weights.items()}
        self._replay, self._metrics = capture(
            lambda: self._update(self._batch, optimizers, generator), generator=generator
        )
        # What the runs before the capture left goes back to the beginning, in place.
        for name, tensor in weights.items():
            tensor.copy_(before[name])
        for optimizer in optimizers.values():
            for moments in optimizer.state.values():
                for tensor in moments.values():
                    tensor.zero_()
        generator.set_state(noise)


@contextlib.contextmanager
def _stand_ins(variant: Variant) -> Iterator[None]:
    """The variant's matrix products, and what runs where the eager bodies would: compiled ones, and
    on a CPU in any case the fastest decoder that PyTorch has."""
    with contextlib.ExitStack() as stack:
        # Precision alone: the agent enters autocast by itself, where its losses allow it.
        stack.enter_context(variant._replace(bf16=False).context())
        if variant.backend in MODES:
            from benchmarks import compiled  # the compiler is large, and memory.py measures us

            stack.enter_context(compiled.mode(MODES[variant.backend]))
            if variant.backend == "reduced":  # the last step's outputs may be overwritten
                torch.compiler.cudagraph_mark_step_begin()
            bodies = {name: getattr(compiled, name) for name in NATIVE}
        elif variant.device == "cpu":
            bodies = {"decode_error": subpixel.decode_error}
            loaded = OPS["decode_error"]._loaded  # PyTorch's among Triton's loops, too
            stack.enter_context(mock.patch.dict(loaded, triton=subpixel.decode_error))
        else:
            bodies = {}
        for name, body in bodies.items():
            stack.enter_context(mock.patch.object(OPS[name], "eager", body))
        yield
