"""The posterior filter: one pass over a sequence of observations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdreamer.ops.backend import Op
from fastdreamer.ops.checks import check_tensor
from fastdreamer.ops.params import Normal, RSSMParams, State, latent_dist, mlp
from fastdreamer.ops.rssm_step import deter_step


class Observation(NamedTuple):
    """A filtered sequence."""

    state: State  # deter [T, B, D], stoch [T, B, S] drawn from the posterior
    post: Normal  # mean and std, [T, B, S]
    prior: Normal  # mean and std, [T, B, S]


def observe(
    params: RSSMParams,
    start: State,
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    noise: Tensor,
    *,
    backend: str | None = None,
) -> Observation:
    """Filter a sequence of embedded observations.

    Args:
        params: the RSSM's tensors, ``post`` included.
        start: the state before the sequence, deter [B, D] and stoch [B, S].
        embed: [T, B, E] of the observations.
        action: [T, B, A]; action[t] is the one that led to observation t.
        is_first: [T, B] bool; where true an episode begins: both halves of the state and the
            action are zeroed before the step.
        noise: [T, B, S] standard normal.
        backend: see ``fastdreamer.ops.backend``.

    Returns:
        The posterior states, and the posterior and prior distributions.

    Raises:
        ValueError: a shape or dtype does not fit. BackendError: the backend cannot run.

    Source: report section 2, q(s_t | h_t, o_t).
    """
    if params.post is None:
        raise ValueError("observe: params.post is None, but a posterior is needed")
    dims, like = params.dims(), params.gru.weight_hh
    check_tensor("observe", "start.deter", start.deter, ("B", "D"), dims, like=like)
    check_tensor("observe", "start.stoch", start.stoch, ("B", "S"), dims, like=like)
    # any floating dtype: under autocast the encoder hands over bfloat16
    check_tensor("observe", "embed", embed, ("T", "B", "E"), dims)
    check_tensor("observe", "action", action, ("T", "B", "A"), dims, like=like)
    check_tensor("observe", "is_first", is_first, ("T", "B"), dims, dtype=torch.bool)
    check_tensor("observe", "noise", noise, ("T", "B", "S"), dims, like=like)
    if not len(embed):
        raise ValueError(f"observe: embed is empty, {list(embed.shape)}")
    # every body takes a bfloat16 embedding as it is: by its bits it is of no dtype to refuse
    bits = embed.view(torch.int16) if embed.dtype == torch.bfloat16 else embed
    given = (start.deter, start.stoch, bits, action, is_first)
    body = OP.select(backend, *given, constant=(noise,))
    return Observation(*body(params, start, embed, action, is_first, noise))


def eager(
    params: RSSMParams,
    start: State,
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    noise: Tensor,
) -> tuple[State, Normal, Normal]:
    first = is_first.unsqueeze(-1)  # [T, B, 1]
    action = action.masked_fill(first, 0)
    states, posts, state = [], [], start
    for t in range(len(embed)):
        state = State(*(part.masked_fill(first[t], 0) for part in state))
        deter = deter_step(params, state, action[t])
        raw = mlp(params.post, torch.cat([deter, embed[t].to(deter.dtype)], -1))
        post = latent_dist(raw, params.min_std, noise.dtype)
        state = State(deter, post.sample(noise[t]))
        states.append(state)
        posts.append(post)
    states = State(*(torch.stack(parts) for parts in zip(*states, strict=True)))
    post = Normal(*(torch.stack(parts) for parts in zip(*posts, strict=True)))
    # No step waits for its prior, so all of them are one matrix product.
    prior = latent_dist(mlp(params.prior, states.deter), params.min_std, noise.dtype)
    return states, post, prior


def _load_native() -> Callable:
    from fastdreamer.ops.native.observe import observe

    return observe


def _load_triton() -> Callable:
    from fastdreamer.ops.triton.observe import observe

    return observe


OP = Op("observe", eager=eager, native=_load_native, triton=_load_triton)
