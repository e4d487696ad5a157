"""Triton body of :mod:`fastdreamer.ops.imagine`: a rollout, and the heads along it."""

from __future__ import annotations

from torch import Tensor

from fastdreamer.ops.params import ActorParams, ReturnParams, RSSMParams, State
from fastdreamer.ops.triton.rollout import Call, start_of, states_of


def imagine(
    params: RSSMParams,
    actor: ActorParams,
    start: State,
    state_noise: Tensor,
    action_noise: Tensor,
    returns: ReturnParams | None,
) -> tuple[Tensor | None, ...]:
    """See ``fastdreamer.ops.imagine``: deter, stoch, action, reward, value, returns, discount."""
    found = Call("imagine", params, actor, returns)(
        **start_of(start), state_noise=state_noise, action_noise=action_noise
    )
    states = states_of(found)
    others = ("action", "reward", "value", "returns", "discount")
    return *states, *(found.get(name) for name in others)
