"""Imagination: the actor inside the dynamics, from every start state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdreamer.ops.backend import Op
from fastdreamer.ops.checks import check_tensor
from fastdreamer.ops.params import ActorParams, RSSMParams, State, actor_dist
from fastdreamer.ops.rssm_step import eager as step


class Imagination(NamedTuple):
    """An imagined trajectory; action[t] leads from state t to state t + 1 = (deter, stoch)[t]."""

    deter: Tensor  # [H, B, D]
    stoch: Tensor  # [H, B, S]
    action: Tensor  # [H, B, A]


def imagine(
    params: RSSMParams,
    actor: ActorParams,
    start: State,
    state_noise: Tensor,
    action_noise: Tensor,
    *,
    backend: str | None = None,
) -> Imagination:
    """Imagine H decisions of the actor from each start state.

    One reparameterised action sample a step, a = tanh(mean + std·ε). The actor's input is
    detached: gradients reach the actor through its actions, not through the features it looked
    at (as in the original Dreamer).

    Args:
        params: the RSSM's tensors; ``params.detach()`` for frozen dynamics.
        actor: the policy's tensors.
        start: state 0, deter [B, D] and stoch [B, S].
        state_noise: [H, B, S] standard normal.
        action_noise: [H, B, A] standard normal.
        backend: see ``fastdreamer.ops.backend``.

    Returns:
        States 1..H and the actions that led to them.

    Raises:
        ValueError: a shape or dtype does not fit. BackendError: the backend cannot run.

    Source: report section 3 and Algorithm 1, behaviour learning.
    """
    dims, like = params.dims(), params.gru.weight_hh
    check_tensor("imagine", "start.deter", start.deter, ("B", "D"), dims, like=like)
    check_tensor("imagine", "start.stoch", start.stoch, ("B", "S"), dims, like=like)
    check_tensor("imagine", "state_noise", state_noise, ("H", "B", "S"), dims, like=like)
    check_tensor("imagine", "action_noise", action_noise, ("H", "B", "A"), dims, like=like)
    if not len(state_noise):
        raise ValueError(f"imagine: state_noise is empty, {list(state_noise.shape)}")
    body = OP.select(backend, start.deter, start.stoch, state_noise, action_noise)
    return body(params, actor, start, state_noise, action_noise)


def eager(
    params: RSSMParams, actor: ActorParams, start: State, state_noise: Tensor, action_noise: Tensor
) -> Imagination:
    steps, state = [], start
    for state_noise_t, action_noise_t in zip(state_noise, action_noise, strict=True):
        action = torch.tanh(actor_dist(actor, state.feat.detach()).sample(action_noise_t))
        state, _ = step(params, state, action, state_noise_t)
        steps.append((*state, action))
    return Imagination(*(torch.stack(parts) for parts in zip(*steps, strict=True)))


OP = Op("imagine", eager=eager)
