"""Native body of :mod:`fastdreamer.ops.decide`: one call, whose weights are looked up as one."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdreamer import _native
from fastdreamer.ops.layers import MLPParams
from fastdreamer.ops.native.packs import arrays, autocast_bf16, pack_decider
from fastdreamer.ops.params import ActorParams, RSSMParams, State


def decide(
    params: RSSMParams,
    actor: ActorParams | None,
    state: State,
    action: Tensor,
    embed: Tensor | None,
    state_noise: Tensor,
    action_noise: Tensor | None,
    encoder: MLPParams | None,
    vector: Tensor | None,
) -> tuple[State, Tensor | None]:
    """See ``fastdreamer.ops.decide``."""
    if embed is not None and embed.dtype == torch.bfloat16:
        embed = embed.float()
    action = params.taken(action)
    new = State(*map(torch.empty_like, state))
    chosen = None if actor is None else torch.empty_like(action)
    _native.decide(
        pack_decider(params, actor, encoder, bf16=autocast_bf16()),
        *arrays(*state, action, embed, vector, state_noise, action_noise),
        tuple(arrays(*new, chosen)),
        torch.get_num_threads(),
    )
    return new, chosen
