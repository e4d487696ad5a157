"""The batch-first ``RSSM`` of ``mlp_img1``, ``gru``, ``mlp_img2`` and ``mlp_obs1`` (burchim)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdreamer.ops.params import Categorical, State, StdTransform
from fastdreamer.rollout.adapters.loop import Loop, latent_loop
from fastdreamer.rollout.layers import MisfitError


class MlpsLoop(Loop):
    """In the place of ``observe``; states as dictionaries of stoch, deter and logits.

    Unlike the model's own, it leaves the actions as they are: those out of bounds, and those where
    an episode begins.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        clip = float(model.action_clip)
        if clip not in (0.0, 1.0):
            raise MisfitError(f"RSSM: action_clip = {clip}; 1.0, or 0.0 for no bound, fits")
        parts = ("mlp_img1", "mlp_img2", "mlp_obs1")
        given = {
            "inp": model.mlp_img1.layers,
            "gru": model.gru,
            "prior": model.mlp_img2.layers,
            "post": model.mlp_obs1.layers,
            "embed_first": True,
            "stoch_first": True,
            "batch_first": True,
            "bound_action": clip == 1.0,
        }
        if model.discrete:
            given["latent"] = Categorical(int(model.discrete), float(model.uniform_mix))
        else:
            given["std"] = StdTransform("sigmoid", 2, 0.5, min=float(model.min_std))
        if model.learn_initial:
            given["begin"] = model, "weight_init"
        super().__init__(model, given, options, *parts)

    def forward(
        self,
        embed: Tensor,
        prev_actions: Tensor,
        is_firsts: Tensor,
        prev_state: dict[str, Tensor] | None = None,
        *,
        noise: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Posteriors and priors, [B, T, ...]."""
        first, rows = is_firsts != 0, len(embed)
        if prev_state is None:
            start = self.rollout.initial(rows)
            first = torch.cat([torch.ones_like(first[:, :1]), first[:, 1:]], 1)
        else:
            start = State(prev_state["deter"], prev_state["stoch"].reshape(rows, -1))
        seen = self.rollout.observe(embed, prev_actions, first, start, noise)
        return latent_loop(self.rollout, seen, "logits")

    def observe(self, *args: Any, **kwargs: Any) -> Any:
        """The same by its name."""
        return self(*args, **kwargs)

    def own(self, embed: Tensor, action: Tensor, first: Tensor, state: Any) -> Any:
        # the model's own changes actions and state
        return self.model.observe(embed, action.clone(), first, dict(state))

    def example(self, draw: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Tensor]:
        first = torch.zeros_like(draw(2, 4))
        first[1, 0] = first[0, 2] = 1
        state = {"deter": draw(2, "D").tanh()}
        if self.model.discrete:
            size = (2, "C", int(self.model.discrete))
            state |= {"logits": draw(*size), "stoch": draw(*size)}
        else:
            state |= {"mean": draw(2, "S"), "std": draw(2, "S"), "stoch": draw(2, "S")}
        return (draw(2, 4, "E"), 1.5 * draw(2, 4, "A"), first, state), self.noise(draw, 4)
