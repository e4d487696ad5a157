"""The time-major RSSM with ``fc_state_action`` and ``observe_rollout`` (adityabingi)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdreamer.ops.params import State, StdTransform
from fastdreamer.rollout.adapters.heads import function_of
from fastdreamer.rollout.adapters.loop import Loop


class NontermsLoop(Loop):
    """States as dictionaries of mean, std, stoch and deter; ``nonterms`` (0 or 1) mask all of it.

    ``imagine_rollout`` stays the model's own; ``rollout.imagine`` is the fast one.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        act = function_of(model)
        given = {
            "inp": [model.fc_state_action, act],
            "gru": model.rnn,
            "prior": [model.fc_embed_prior, act, model.fc_state_prior],
            "post": [model.fc_embed_posterior, act, model.fc_state_posterior],
            "std": StdTransform(min=0.1),
            "embed_first": True,
            "stoch_first": True,
        }
        super().__init__(model, given, options)

    def forward(
        self,
        obs_embed: Tensor,
        actions: Tensor,
        nonterms: Tensor,
        prev_state: dict[str, Tensor],
        horizon: int,
        *,
        noise: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Priors and posteriors of ``horizon`` steps, [horizon, B, ...] each."""
        embed, action = obs_embed[:horizon], actions[:horizon]
        first = nonterms[:horizon].reshape(action.shape[:2]) == 0
        start = State(prev_state["deter"], prev_state["stoch"])
        seen = self.rollout.observe(embed, action, first, start, noise)
        drawn = self.rollout.draw(seen.prior)
        prior = seen.prior._asdict() | {"stoch": drawn, "deter": seen.state.deter}
        return prior, seen.post._asdict() | seen.state._asdict()

    def observe_rollout(self, *args: Any, **kwargs: Any) -> tuple[dict, dict]:
        """The same by its name."""
        return self(*args, **kwargs)

    def own(self, *inputs: Any) -> Any:
        return self.model.observe_rollout(*inputs)

    def example(self, draw: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Tensor]:
        goes_on = torch.ones_like(draw(3, 2, 1))
        goes_on[0, 1] = goes_on[1, 0] = 0
        start = {"stoch": draw(2, "S"), "deter": draw(2, "D").tanh()}
        return (draw(3, 2, "E"), draw(3, 2, "A").tanh(), goes_on, start, 3), draw(3, 2, "S")
