"""Native body of :mod:`fastdreamer.ops.cem`: all iterations in one call."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastdreamer import _native
from fastdreamer.ops.native.packs import (
    arrays,
    autocast_bf16,
    given_readouts,
    pack_mlp,
    pack_rssm,
)
from fastdreamer.ops.params import ReturnParams, RSSMParams, State


def cem(
    params: RSSMParams,
    returns: ReturnParams,
    start: State,
    mean: Tensor,
    std: Tensor,
    action_noise: Tensor,
    state_noise: Tensor,
    num_elites: int,
    min_std: float,
    clip: float,
    score: str,
    proposals: Tensor | None,
    sample_std: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``fastdreamer.ops.cem``: mean, std, scores."""
    pack = {"bf16": autocast_bf16(), "gradients": False}
    bootstrap = (returns.target or returns.critic) if score == "lambda_return" else None
    discount = returns.discount if bootstrap else None
    pack_head = functools.partial(
        pack_mlp, rotate=params.dims()["S"] if returns.stoch_first else 0, **pack
    )
    heads = (
        pack_head(returns.reward),
        bootstrap and pack_head(bootstrap),
        discount and pack_head(discount),
        *((returns.gamma, returns.lam, returns.departure) if bootstrap else (1.0, 1.0, False)),
        *given_readouts(returns),
    )
    iterations, _, batch, samples, _ = action_noise.shape
    mean, std = mean.clone(), std.clone()  # the extension refits them in place
    scores = mean.new_empty(iterations, batch, samples)
    _native.cem(
        *(pack_rssm(params, **pack), heads),
        *arrays(*start, mean, std, action_noise, state_noise, scores, proposals),
        *(num_elites, min_std, sample_std, clip, params.bound_action, torch.get_num_threads()),
    )
    return mean, std, scores
