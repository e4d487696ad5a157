"""sheeprl's ``RSSM`` of Dreamer V1, and why those of V2 and V3 have no fast loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdreamer.ops.params import State, StdTransform
from fastdreamer.rollout.adapters.heads import bare, layers_of
from fastdreamer.rollout.adapters.loop import Loop
from fastdreamer.rollout.layers import MisfitError
from fastdreamer.rollout.rollout import Rollout


class DynamicLoop(Loop):
    """In the place of the loop over ``dynamic``, over all steps; its arguments and what it returns.

    Since 0.8.4 ``dynamic`` takes ``is_first`` and zeroes action and state there: so does the loop.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        bypassed: list = []
        layers = {
            name: layers_of(name, bare(name, getattr(model, name), bypassed), bypassed)
            for name in ("transition_model", "representation_model")
        }
        given = {
            "inp": model.recurrent_model.mlp,
            "gru": model.recurrent_model.rnn,
            "prior": layers["transition_model"],
            "post": layers["representation_model"],
            "stoch_first": True,
        }
        if hasattr(model, "discrete"):
            raise MisfitError(_why_not(given, int(model.discrete)))
        given["std"] = StdTransform(min=float(model.min_std))
        super().__init__(model, given, options, "recurrent_model")
        self.rollout.watched += bypassed
        self.resets = "is_first" in inspect.signature(model.dynamic).parameters

    def forward(
        self,
        posterior: Tensor,
        recurrent_state: Tensor,
        action: Tensor,
        embedded_obs: Tensor,
        is_first: Tensor | None = None,
        *,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """What ``dynamic`` returns, stacked: action [T, B, A], states [1, B, ...]."""
        if (is_first is not None) != self.resets:
            raise TypeError(
                "dynamic of this sheeprl takes is_first" if self.resets
                else "dynamic of this sheeprl takes no is_first"
            )  # fmt: skip
        first = None if is_first is None else is_first.reshape(action.shape[:2]) != 0
        start = State(recurrent_state[0], posterior[0])
        seen = self.rollout.observe(embedded_obs, action, first, start, noise)
        prior = seen.prior.sample(torch.randn_like(seen.prior.mean))
        return seen.state.deter, seen.state.stoch, prior, tuple(seen.post), tuple(seen.prior)

    def own(self, posterior: Tensor, recurrent_state: Tensor, *sequences: Tensor) -> Any:
        steps, state = [], (posterior, recurrent_state)
        for t in range(len(sequences[0])):
            steps.append(self.model.dynamic(*state, *(x[t : t + 1] for x in sequences)))
            state = steps[-1][1], steps[-1][0]
        h, z, prior, *dists = zip(*steps, strict=True)
        joined = (tuple(map(torch.cat, zip(*dist, strict=True))) for dist in dists)
        return *map(torch.cat, (h, z, prior)), *joined

    def example(self, draw: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Tensor]:
        first = torch.zeros_like(draw(3, 2, 1))
        first[0, 1] = first[1, 0] = 1
        sequences = [draw(3, 2, "A").tanh(), draw(3, 2, "E"), *([first] if self.resets else [])]
        return (draw(1, 2, "S"), draw(1, 2, "D").tanh(), *sequences), draw(3, 2, "S")


def _why_not(given: dict[str, Any], classes: int) -> str:
    """All that keeps a model of V2 or V3 from the loop."""
    reasons = [f"representation_model: categorical latents of {classes} classes have no fast loop"]
    try:
        Rollout.from_modules(**given)
    except MisfitError as misfit:
        reasons.append(str(misfit))
    return "\n".join(reasons)
