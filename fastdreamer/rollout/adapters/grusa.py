"""The batch-first RSSM with ``grusa``, ``gru``, ``prior`` and ``posterior`` (bstars)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdreamer.ops.params import StdTransform
from fastdreamer.rollout.adapters.loop import Loop


class GrusaLoop(Loop):
    """In the place of ``rollout_obs``: embed [B, T + 1, E], action [B, T, A].

    The least std is no attribute of the model: pass ``std=`` where it is not 0.1.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        given = {"inp": model.grusa, "gru": model.gru, "prior": model.prior}
        given |= {"post": model.posterior, "std": StdTransform(min=0.1), "batch_first": True}
        if isinstance(getattr(model, "reward", None), nn.Module):
            given["reward"] = model.reward
        super().__init__(model, given, options)

    def forward(
        self, e: Tensor, a: Tensor, *, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list, list]:
        """hs, states, and a list of priors and of posteriors; ``noise`` is [B, T + 1, S]."""
        # the initial state is a step, too, from zeros with a zero action
        action = torch.cat([a.new_zeros(a.shape[0], 1, a.shape[2]), a], 1)
        seen = self.rollout.observe(e, action, noise=noise)

        def split(dist: Any) -> list:
            normal = torch.distributions.Normal
            pairs = zip(dist.mean.unbind(1)[1:], dist.std.unbind(1)[1:], strict=True)
            return [torch.distributions.Independent(normal(*pair), 1) for pair in pairs]

        return seen.state.deter[:, 1:], seen.state.stoch[:, 1:], split(seen.prior), split(seen.post)

    def rollout_obs(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, list, list]:
        """The same by its name."""
        return self(*args, **kwargs)

    def own(self, *inputs: Any) -> Any:
        return self.model.rollout_obs(*inputs)

    def example(self, draw: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Tensor]:
        return (draw(2, 4, "E"), draw(2, 3, "A").tanh()), draw(4, 2, "S")
