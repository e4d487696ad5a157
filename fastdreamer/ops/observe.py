"""The posterior filter: one pass over a sequence of observations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastdreamer.ops.backend import Op
from fastdreamer.ops.checks import check_tensor
from fastdreamer.ops.layers import deepest, mlp
from fastdreamer.ops.params import Latent, RSSMParams, State, latent_dist, stack
from fastdreamer.ops.rssm_step import deter_step
from fastdreamer.ops.vocabulary import lacking

RESETS = {
    "all": (True, True, True),
    "state": (True, True, False),
    "stoch": (False, True, False),
    "deter": (True, False, False),
}
"""Which of deter, stoch and action the beginning of an episode zeroes, by name."""


class Observation(NamedTuple):
    """A filtered sequence."""

    state: State  # deter [T, B, D], stoch [T, B, S] drawn from the posterior
    post: Latent  # mean and std, [T, B, S], or logits, [T, B, C, K]
    prior: Latent  # likewise


def observe(
    params: RSSMParams,
    start: State,
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    noise: Tensor,
    *,
    reset: Literal["all", "state", "stoch", "deter"] = "all",
    backend: str | None = None,
) -> Observation:
    """Filter a sequence of embedded observations.

    Args:
        params: the RSSM's tensors, ``post`` included, of one floating dtype and device; so is all
            below unless it says otherwise.
        start: the state before the sequence, deter [B, D] and stoch [B, S].
        embed: [T, B, E] of the observations, in any floating dtype: under autocast the encoder
            hands over bfloat16, which every backend takes.
        action: [T, B, A]; action[t] is the one that led to observation t.
        is_first: [T, B] bool; where true an episode begins.
        noise: [T, B, S] standard normal; where the latents are categorical [T, B, C] uniform in
            [0, 1), or with Gumbel-softmax samples [T, B, S] standard Gumbel.
        reset: what is zeroed there before the step: ``"all"``, both halves of the state and the
            action; ``"state"``, both halves; ``"stoch"`` or ``"deter"``, that half. With
            ``params.begin`` the state's halves become that one's.
        backend: see ``fastdreamer.ops.backend``.

    Returns:
        The posterior states, and the posterior and prior distributions, in the parameters' dtype.

    Raises:
        TypeError: not a tensor. ValueError: a shape, dtype or device does not fit, there is no
        posterior, or no such ``reset``. BackendError: an explicitly chosen backend cannot run.

    Source: report section 2, q(s_t | h_t, o_t).
    """
    if params.post is None:
        raise ValueError("observe: params.post is None, but a posterior is needed")
    dims, like = params.dims(), params.like
    check_tensor("observe", "start.deter", start.deter, ("B", "D"), dims, like=like)
    check_tensor("observe", "start.stoch", start.stoch, ("B", "S"), dims, like=like)
    check_tensor("observe", "embed", embed, ("T", "B", "E"), dims)
    check_tensor("observe", "action", action, ("T", "B", "A"), dims, like=like)
    check_tensor("observe", "is_first", is_first, ("T", "B"), dims, dtype=torch.bool)
    check_tensor("observe", "noise", noise, ("T", "B", params.noise), dims, like=like)
    if reset not in RESETS:
        raise ValueError(f"observe: reset must be one of {', '.join(RESETS)}, got {reset!r}")
    if not len(embed):
        raise ValueError(f"observe: embed is empty, {list(embed.shape)}")
    # every body takes a bfloat16 embedding as it is: by its bits it is of no dtype to refuse
    bits = embed.view(torch.int16) if embed.dtype == torch.bfloat16 else embed
    given = (start.deter, start.stoch, bits, action, is_first)
    depth = deepest(*params.to_deter, params.prior, params.post)
    body = OP.select(backend, *given, constant=(noise,), depth=depth, lacking=lacking(params))
    return Observation(*body(params, start, embed, action, is_first, noise, RESETS[reset]))


def eager(
    params: RSSMParams,
    start: State,
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    noise: Tensor,
    resets: tuple[bool, bool, bool],
) -> tuple[State, Latent, Latent]:
    first = is_first.unsqueeze(-1)  # [T, B, 1]
    *halves, of_action = resets
    action = action.masked_fill(first, 0) if of_action else action
    begin = (start.deter.new_zeros(1), start.stoch.new_zeros(1))
    begin = begin if params.begin is None else params.begin.state(params)
    states, posts, state = [], [], start
    for t in range(len(embed)):
        parts = zip(state, begin, halves, strict=True)
        state = State(
            *(torch.where(first[t], new, part) if reset else part for part, new, reset in parts)
        )
        state, post = obs_step(params, state, action[t], embed[t], noise[t])
        states.append(state)
        posts.append(post)
    states = State(*(torch.stack(parts) for parts in zip(*states, strict=True)))
    # No step waits for its prior, so all of them are one matrix product.
    prior = latent_dist(mlp(params.prior, states.deter), params.latent, noise.dtype)
    return states, stack(posts), prior


def obs_step(
    params: RSSMParams, state: State, action: Tensor, embed: Tensor, noise: Tensor
) -> tuple[State, Latent]:
    """The state after one observation [B, E] and the posterior it was drawn from."""
    deter = deter_step(params, state, action)
    seen = embed.to(deter.dtype)
    parts = (seen, deter) if params.embed_first else (deter, seen)
    post = latent_dist(mlp(params.post, torch.cat(parts, -1)), params.latent, noise.dtype)
    return State(deter, post.sample(noise)), post


def _load_native() -> Callable:
    from fastdreamer.ops.native.observe import observe

    return observe


def _load_triton() -> Callable:
    from fastdreamer.ops.triton.observe import observe

    return observe


OP = Op("observe", eager=eager, native=_load_native, triton=_load_triton)
