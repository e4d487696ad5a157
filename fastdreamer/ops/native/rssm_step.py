"""Native body of :mod:`fastdreamer.ops.rssm_step`: a rollout of one step."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdreamer import _native
from fastdreamer.ops.native.packs import arrays, autocast_bf16, latent_of, new_latent, pack_rssm
from fastdreamer.ops.native.rollout import Call
from fastdreamer.ops.params import Latent, RSSMParams, State


def rssm_step(
    params: RSSMParams, state: State, action: Tensor, noise: Tensor
) -> tuple[State, Latent]:
    """See ``fastdreamer.ops.rssm_step``: a rollout of one step."""
    action = params.taken(action)
    if not torch.is_grad_enabled():  # the latency of acting: nothing that is not needed
        model = pack_rssm(params, bf16=autocast_bf16(), gradients=False)
        new = torch.empty_like
        deter, stoch, prior = new(state.deter), new(state.stoch), new_latent(params, state.stoch)
        outputs = tuple(arrays(deter, stoch, *prior))
        inputs = arrays(*state, action, noise)
        _native.rssm_step(model, *inputs, outputs, torch.get_num_threads())
        return State(deter, stoch), latent_of(params, *prior)
    call = Call("rssm_step", params, prior=True)
    deter, stoch, _, mean, std, *_ = call(*state, noise[None], None, action[None])
    prior = latent_of(params, mean[0], None if std is None else std[0])
    return State(deter[0], stoch[0]), prior
