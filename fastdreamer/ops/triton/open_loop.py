"""Triton body of :mod:`fastdreamer.ops.open_loop`: a rollout by given actions."""

from __future__ import annotations

from torch import Tensor

from fastdreamer.ops.params import RSSMParams, State
from fastdreamer.ops.triton.rollout import Call, start_of, states_of


def open_loop(params: RSSMParams, start: State, action: Tensor, noise: Tensor) -> State:
    """See ``fastdreamer.ops.open_loop``."""
    call = Call("open_loop", params)
    return states_of(call(**start_of(start), state_noise=noise, action=action))
