"""The ``RSSMRollout`` whose states are (mean, std, stoch, deter) (juliusfrost)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastdreamer.ops.params import State, StdTransform
from fastdreamer.rollout.adapters.loop import Loop
from fastdreamer.rollout.layers import MisfitError


class RepresentationLoop(Loop):
    """Prior and posterior states; the action comes before the state."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        transition, representation = model.transition_model, model.representation_model
        given = {
            "inp": _pick(transition, "_rnn_input_model", "rnn_input_model"),
            "gru": _pick(transition, "_cell", "cell"),
            "prior": _pick(transition, "_stochastic_prior_model", "stochastic_prior_model"),
            "post": _pick(
                representation, "_stochastic_posterior_model", "stochastic_posterior_model"
            ),
            "std": StdTransform(min=0.1),
            "action_first": True,
            "stoch_first": True,
        }
        super().__init__(model, given, options, "transition_model", "representation_model")

    def forward(
        self,
        steps: int,
        obs_embed: Tensor,
        action: Tensor,
        prev_state: Any,
        *,
        noise: Tensor | None = None,
    ) -> tuple[Any, Any]:
        """prior and posterior states, each of the class of ``prev_state``, [steps, B, ...]."""
        start = State(prev_state.deter, prev_state.stoch)
        seen = self.rollout.observe(obs_embed[:steps], action[:steps], None, start, noise)
        drawn = self.rollout.draw(seen.prior)
        new = type(prev_state)
        prior = new(*seen.prior, drawn, seen.state.deter)
        return prior, new(*seen.post, seen.state.stoch, seen.state.deter)

    def rollout_representation(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The same by its name."""
        return self(*args, **kwargs)

    def rollout_transition(
        self, steps: int, action: Tensor, prev_state: Any, *, noise: Tensor | None = None
    ) -> Any:
        """States under given actions."""
        start = State(prev_state.deter, prev_state.stoch)
        states = self.rollout.open_loop(start, action[:steps], noise)
        return type(prev_state)(*self.rollout.prior(states.deter), states.stoch, states.deter)

    def own(self, *inputs: Any) -> Any:
        return self.model.rollout_representation(*inputs)

    def example(self, draw: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Tensor]:
        kind = type(self.transition_model.initial_state(2))
        start = kind(*(draw(2, n) for n in "SSS"), draw(2, "D").tanh())
        return (3, draw(3, 2, "E"), draw(3, 2, "A").tanh(), start), draw(3, 2, "S")


def _pick(module: nn.Module, *names: str) -> Any:
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise MisfitError(f"RSSMRollout: {type(module).__name__} has no {' or '.join(names)}")
