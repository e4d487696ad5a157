"""Native body of :mod:`fastdreamer.ops.open_loop`: a rollout by given actions."""

from __future__ import annotations

from torch import Tensor

from fastdreamer.ops.native.rollout import Call
from fastdreamer.ops.params import RSSMParams, State


def open_loop(params: RSSMParams, start: State, action: Tensor, noise: Tensor) -> State:
    """See ``fastdreamer.ops.open_loop``."""
    action = params.taken(action)
    return State(*Call("open_loop", params)(*start, noise, None, action)[:2])
