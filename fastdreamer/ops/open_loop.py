"""The dynamics under given actions, for planning and video prediction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdreamer.ops.backend import Op
from fastdreamer.ops.checks import check_tensor
from fastdreamer.ops.layers import deepest
from fastdreamer.ops.params import RSSMParams, State
from fastdreamer.ops.rssm_step import eager as step
from fastdreamer.ops.vocabulary import lacking


def open_loop(
    params: RSSMParams, start: State, action: Tensor, noise: Tensor, *, backend: str | None = None
) -> State:
    """Roll the dynamics forward under given actions.

    Args:
        params: the RSSM's tensors, of one floating dtype and device; so is all below.
        start: deter [B, D] and stoch [B, S].
        action: [H, B, A]; action[t] leads from state t to state t + 1 (the start is state 0).
        noise: [H, B, S] standard normal; where the latents are categorical [H, B, C] uniform in
            [0, 1), or with Gumbel-softmax samples [H, B, S] standard Gumbel.
        backend: see ``fastdreamer.ops.backend``.

    Returns:
        States 1..H: deter [H, B, D] and stoch [H, B, S], in the parameters' dtype.

    Raises:
        TypeError: not a tensor. ValueError: a shape, dtype or device does not fit. BackendError: an
        explicitly chosen backend cannot run.

    Source: report section 4, Algorithm 2.
    """
    dims, like = params.dims(), params.like
    check_tensor("open_loop", "start.deter", start.deter, ("B", "D"), dims, like=like)
    check_tensor("open_loop", "start.stoch", start.stoch, ("B", "S"), dims, like=like)
    check_tensor("open_loop", "action", action, ("H", "B", "A"), dims, like=like)
    check_tensor("open_loop", "noise", noise, ("H", "B", params.noise), dims, like=like)
    if not len(action):
        raise ValueError(f"open_loop: action is empty, {list(action.shape)}")
    depth = deepest(*params.to_deter, params.prior)
    given = (start.deter, start.stoch, action)
    body = OP.select(backend, *given, constant=(noise,), depth=depth, lacking=lacking(params))
    return body(params, start, action, noise)


def eager(params: RSSMParams, start: State, action: Tensor, noise: Tensor) -> State:
    states, state = [], start
    for action_t, noise_t in zip(action, noise, strict=True):
        state, _ = step(params, state, action_t, noise_t)
        states.append(state)
    return State(*(torch.stack(parts) for parts in zip(*states, strict=True)))


def _load_native() -> Callable:
    from fastdreamer.ops.native.open_loop import open_loop

    return open_loop


def _load_triton() -> Callable:
    from fastdreamer.ops.triton.open_loop import open_loop

    return open_loop


OP = Op("open_loop", eager=eager, native=_load_native, triton=_load_triton)
