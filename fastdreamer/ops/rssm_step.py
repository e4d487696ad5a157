"""One step of the dynamics: h' = GRU(act(W[s, a]), h), prior(h'), s' = mean + std·ε."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdreamer.ops.backend import Op
from fastdreamer.ops.cells import recur
from fastdreamer.ops.checks import check_tensor
from fastdreamer.ops.layers import deepest, mlp, mlp_act
from fastdreamer.ops.params import Branches, Latent, RSSMParams, State, latent_dist
from fastdreamer.ops.vocabulary import lacking


def rssm_step(
    params: RSSMParams, state: State, action: Tensor, noise: Tensor, *, backend: str | None = None
) -> tuple[State, Latent]:
    """Advance the latent state by one decision without an observation.

    Args:
        params: the RSSM's tensors, of one floating dtype and device; so is all below.
        state: deter [B, D] and stoch [B, S].
        action: [B, A] in [-1, 1].
        noise: [B, S] standard normal; where the latents are categorical [B, C] uniform in [0, 1),
            or with Gumbel-softmax samples [B, S] standard Gumbel.
        backend: see ``fastdreamer.ops.backend``.

    Returns:
        The next State and the prior that its stoch was drawn from (Normal: mean and std [B, S];
        OneHot: logits [B, C, K]), in the parameters' dtype, under autocast too.

    Raises:
        TypeError: not a tensor. ValueError: a shape, dtype or device does not fit. BackendError: an
        explicitly chosen backend cannot run.

    Source: report section 2, f and P(s_t | h_t).
    """
    dims, like = params.dims(), params.like
    check_tensor("rssm_step", "state.deter", state.deter, ("B", "D"), dims, like=like)
    check_tensor("rssm_step", "state.stoch", state.stoch, ("B", "S"), dims, like=like)
    check_tensor("rssm_step", "action", action, ("B", "A"), dims, like=like)
    check_tensor("rssm_step", "noise", noise, ("B", params.noise), dims, like=like)
    depth = deepest(*params.to_deter, params.prior)
    given = (state.deter, state.stoch, action)
    body = OP.select(backend, *given, constant=(noise,), depth=depth, lacking=lacking(params))
    return body(params, state, action, noise)


def deter_step(params: RSSMParams, state: State, action: Tensor) -> Tensor:
    """h' [B, D] of the previous state and action; the half of a step that observing shares."""
    stoch, action = state.stoch, params.taken(action)
    if isinstance(params.inp, Branches):
        stoch, action = mlp_act(params.inp.stoch, stoch), mlp_act(params.inp.action, action)
    x = torch.cat((action, stoch) if params.action_first else (stoch, action), -1)
    if not isinstance(params.inp, Branches):
        x = mlp_act(params.inp, x)
    return recur(params.gru, x, state.deter)


def eager(params: RSSMParams, state: State, action: Tensor, noise: Tensor) -> tuple[State, Latent]:
    deter = deter_step(params, state, action)
    prior = latent_dist(mlp(params.prior, deter), params.latent, noise.dtype)
    return State(deter, prior.sample(noise)), prior


def _load_native() -> Callable:
    from fastdreamer.ops.native.rssm_step import rssm_step

    return rssm_step


def _load_triton() -> Callable:
    from fastdreamer.ops.triton.rssm_step import rssm_step

    return rssm_step


OP = Op("rssm_step", eager=eager, native=_load_native, triton=_load_triton)
