"""The time-major ``TransitionModel`` of PlaNet's ports (Kaixhin, yusukeurakami, zhaoyi11)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdreamer.ops.params import State, StdTransform
from fastdreamer.rollout.adapters.heads import function_of
from fastdreamer.rollout.adapters.loop import Loop, agrees
from fastdreamer.rollout.layers import MisfitError


class TransitionLoop(Loop):
    """Lists of beliefs and states, from a model that is scripted or not.

    ``nonterminals`` (0 or 1) mask the previous state, not the belief, as the original does:
    those of step t (Kaixhin), or with a lag those of t - 1 and none at the first (zhaoyi11); which,
    the model tells when it is asked.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        act = function_of(model)
        given = {
            "inp": [model.fc_embed_state_action, act],
            "gru": model.rnn,
            "prior": [model.fc_embed_belief_prior, act, model.fc_state_prior],
            "post": [model.fc_embed_belief_posterior, act, model.fc_state_posterior],
            "std": StdTransform(min=float(model.min_std_dev)),
            "reset": "stoch",
        }
        super().__init__(model, given, options)
        listed = model.modules
        if isinstance(listed, list):  # these models keep their layers under this name
            self.__dict__["modules"] = listed
        self.lag = 0
        if not agrees(self):
            self.lag = 1

    def forward(
        self,
        prev_state: Tensor,
        actions: Tensor,
        prev_belief: Tensor,
        observations: Tensor | None = None,
        nonterminals: Tensor | None = None,
        *,
        noise: Tensor | None = None,
    ) -> list[Tensor]:
        """beliefs, prior states, means, stds; with observations the posterior's three, too."""
        start = State(prev_belief, prev_state)
        if observations is None:
            if nonterminals is not None:
                raise MisfitError("TransitionModel: nonterminals without observations are not read")
            states = self.rollout.open_loop(start, actions, noise)
            prior = self.rollout.prior(states.deter)
            return [*states, *prior]
        first = None
        if nonterminals is not None:
            first = nonterminals.reshape(actions.shape[:2]) == 0
            if self.lag:
                first = torch.cat([torch.zeros_like(first[:1]), first[:-1]])
        seen = self.rollout.observe(observations, actions, first, start, noise)
        drawn = self.rollout.draw(seen.prior)
        return [seen.state.deter, drawn, *seen.prior, seen.state.stoch, *seen.post]

    def example(self, draw: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Tensor]:
        goes_on = torch.ones_like(draw(4, 2, 1))
        goes_on[0, 1] = goes_on[1, 0] = goes_on[3, 1] = 0
        sequence = draw(4, 2, "A").tanh(), draw(2, "D").tanh(), draw(4, 2, "E"), goes_on
        return (draw(2, "S"), *sequence), draw(4, 2, "S")
