"""The batch-first ``RSSM`` over a block-diagonal GRU, ``_deter_net`` (r2dreamer)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdreamer.ops.params import Categorical, State
from fastdreamer.rollout.adapters.loop import Loop


class BlocksLoop(Loop):
    """In the place of ``observe``: posterior samples, deterministic states, posterior logits.

    The prior of the states, whose logits the model's KL takes: ``loop.rollout.prior(deter)``.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        given = {
            "gru": model._deter_net,
            "prior": list(model._img_net)[:-1],  # the last of them reshapes
            "post": list(model._obs_net)[:-1],
            "latent": Categorical(int(model._discrete), float(model._unimix_ratio), gumbel=True),
            "stoch_first": True,
            "batch_first": True,
        }
        super().__init__(model, given, options, "_img_net", "_obs_net")

    def forward(
        self,
        embed: Tensor,
        action: Tensor,
        initial: tuple[Tensor, Tensor],
        reset: Tensor,
        *,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """stoch [B, T, C, K], deter [B, T, D] and logits [B, T, C, K] of the posterior."""
        stoch, deter = initial
        start, first = State(deter, stoch.flatten(-2)), reset.reshape(action.shape[:2]) != 0
        seen = self.rollout.observe(embed, action, first, start, noise)
        logits = seen.post.logits
        return seen.state.stoch.reshape(logits.shape), seen.state.deter, logits

    def observe(self, *args: Any, **kwargs: Any) -> Any:
        """The same by its name."""
        return self(*args, **kwargs)

    def own(self, *inputs: Any) -> Any:
        return self.model.observe(*inputs)

    def example(self, draw: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Tensor]:
        first = torch.zeros_like(draw(2, 3), dtype=torch.bool)
        first[1, 0] = first[0, 1] = True
        start = draw(2, "C", int(self.model._discrete)), draw(2, "D").tanh()
        sequences = draw(2, 3, "E"), 1.5 * draw(2, 3, "A")
        return (*sequences, start, first), self.noise(draw, 3)
