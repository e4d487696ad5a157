"""Native body of :mod:`fastdreamer.ops.imagine`: a rollout, and the heads along it."""

from __future__ import annotations

from torch import Tensor

from fastdreamer.ops.native.packs import flat
from fastdreamer.ops.native.rollout import Call, Value
from fastdreamer.ops.params import ActorParams, ReturnParams, RSSMParams, State


def imagine(
    params: RSSMParams,
    actor: ActorParams,
    start: State,
    state_noise: Tensor,
    action_noise: Tensor,
    returns: ReturnParams | None,
) -> tuple[Tensor | None, ...]:
    """See ``fastdreamer.ops.imagine``: deter, stoch, action, reward, value, returns, discount."""
    call = Call("imagine", params, actor, returns)
    deter, stoch, action, _, _, reward, _, total, value, discount = call(
        *start, state_noise, action_noise, None
    )
    if call.wants_critic:
        value = Value.apply(value, call.tape, *flat(returns.critic))
    return deter, stoch, action, reward, value, total, discount
