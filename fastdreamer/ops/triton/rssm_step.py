"""Triton body of :mod:`fastdreamer.ops.rssm_step`: a rollout of one step."""

from __future__ import annotations

from torch import Tensor

from fastdreamer.ops.params import Normal, RSSMParams, State
from fastdreamer.ops.triton.rollout import Call, start_of, states_of


def rssm_step(
    params: RSSMParams, state: State, action: Tensor, noise: Tensor
) -> tuple[State, Normal]:
    """See ``fastdreamer.ops.rssm_step``: a rollout of one step."""
    call = Call("rssm_step", params, prior=True)
    found = call(**start_of(state), state_noise=noise[None], action=action[None])
    deter, stoch = states_of(found)
    return State(deter[0], stoch[0]), Normal(found["mean"][0], found["std"][0])
