"""Triton body of :mod:`fastdreamer.ops.decide`: observe's program for one step, else PyTorch.

Encoder and policy are a few products of few rows, which the vendor's library does as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdreamer.ops.layers import MLPParams, embed_all
from fastdreamer.ops.observe import RESETS
from fastdreamer.ops.params import ActorParams, RSSMParams, State, chosen_action
from fastdreamer.ops.triton.observe import observe


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
    seen = embed_all(embed, encoder, vector)
    goes_on = torch.zeros(1, len(seen), dtype=torch.bool, device=seen.device)
    given = (state, seen[None], action[None], goes_on, state_noise[None])
    found, _, _ = observe(params._replace(begin=None), *given, RESETS["all"])
    state = State(found.deter[0], found.stoch[0])
    return state, chosen_action(actor, state, action_noise)
