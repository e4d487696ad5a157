"""Triton body of :mod:`fastdreamer.ops.rssm_step`: a rollout of one step."""

from __future__ import annotations

from torch import Tensor

from fastdreamer.ops.params import Latent, RSSMParams, State
from fastdreamer.ops.triton.rollout import Call, latent_of, start_of, states_of


def rssm_step(
    params: RSSMParams, state: State, action: Tensor, noise: Tensor
) -> tuple[State, Latent]:
    """See ``fastdreamer.ops.rssm_step``: a rollout of one step."""
    call = Call("rssm_step", params, prior=True)
    found = call(**start_of(state), state_noise=noise[None], action=action[None])
    deter, stoch = states_of(found)
    moments = (found[name][0] for name in call.step.moments)
    return State(deter[0], stoch[0]), latent_of(params, *moments)
