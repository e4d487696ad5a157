"""One decision: filter one observation and let the policy act on what it makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdreamer.ops.backend import Op
from fastdreamer.ops.checks import check_tensor
from fastdreamer.ops.layers import MLPParams, deepest, embed_all
from fastdreamer.ops.observe import obs_step
from fastdreamer.ops.params import ActorParams, RSSMParams, State, chosen_action
from fastdreamer.ops.vocabulary import lacking


class Decision(NamedTuple):
    """What came of an observation."""

    state: State  # deter [B, D], stoch [B, S] drawn from the posterior
    action: Tensor | None  # [B, A] in [-1, 1]; None without an actor


@torch.no_grad()
def decide(
    params: RSSMParams,
    actor: ActorParams | None,
    state: State,
    action: Tensor,
    embed: Tensor | None,
    state_noise: Tensor,
    action_noise: Tensor | None = None,
    *,
    encoder: MLPParams | None = None,
    vector: Tensor | None = None,
    backend: str | None = None,
) -> Decision:
    """Filter one observation a row and act on it.

    What acting costs beside an encoder of images, in one call: a step of ``observe`` without its
    prior, and the policy in the state found. It has no gradient.

    Args:
        params: the RSSM's tensors, ``post`` included, of one floating dtype and device; so is all
            below unless it says otherwise.
        actor: the policy's tensors; None filters alone.
        state: of the decision before, deter [B, D] and stoch [B, S].
        action: [B, A], the one that led to this observation.
        embed: [B, E] of the observation, in any floating dtype; None where ``vector`` is all of it.
        state_noise: [B, S] standard normal; where the latents are categorical [B, C] uniform in
            [0, 1), or with Gumbel-softmax samples [B, S] standard Gumbel.
        action_noise: [B, A] standard normal, or one uniform number in [0, 1) a one-hot action;
            None takes the mode, tanh(mean).
        encoder, vector: layers, and what they embed, [B, n]: act(mlp(symlog(vector))) goes behind
            ``embed``, which has so many columns fewer.
        backend: see ``fastdreamer.ops.backend``.

    Returns:
        The posterior state and the action tanh(mean + std·ε), in the parameters' dtype. Native in
        float32 gives a row the same bits whatever other rows are in the batch.

    Raises:
        TypeError: not a tensor. ValueError: a shape, dtype or device does not fit, there is no
        posterior or no row. BackendError: an explicitly chosen backend cannot run.

    Source: report section 2, q(s_t | h_t, o_t), and section 3, the actor.
    """
    if params.post is None:
        raise ValueError("decide: params.post is None, but a posterior is needed")
    if (encoder is None) != (vector is None) or (embed is None and vector is None):
        raise ValueError("decide: needs embed, or encoder and vector, or all of them")
    dims, like = params.dims(), params.like
    check_tensor("decide", "state.deter", state.deter, ("B", "D"), dims, like=like)
    check_tensor("decide", "state.stoch", state.stoch, ("B", "S"), dims, like=like)
    check_tensor("decide", "action", action, ("B", "A"), dims, like=like)
    check_tensor("decide", "state_noise", state_noise, ("B", params.noise), dims, like=like)
    given, depth = [*state, action, state_noise], deepest(*params.to_deter, params.post, encoder)
    columns = dims["E"]
    if vector is not None:
        check_tensor("decide", "vector", vector, ("B", encoder.inputs), dims, like=like)
        given.append(vector)
        columns -= encoder.outputs
    if embed is not None:
        check_tensor("decide", "embed", embed, ("B", columns), dims)
        # a bfloat16 embedding is taken as it is: by its bits it is of no dtype to refuse
        given.append(embed.view(torch.int16) if embed.dtype == torch.bfloat16 else embed)
    elif columns:
        raise ValueError(f"decide: embed is None, but the posterior takes {columns} numbers of it")
    if action_noise is not None:
        each = "A" if actor is None else actor.noise(dims["A"])
        check_tensor("decide", "action_noise", action_noise, ("B", each), dims, like=like)
        given.append(action_noise)
    if actor is not None:
        depth = max(depth, len(actor.mlp.weights))
    if not dims["B"]:
        raise ValueError("decide: there is no row")
    body = OP.select(backend, *given, depth=depth, lacking=lacking(params, actor, None, encoder))
    noises = (state_noise, action_noise)
    return Decision(*body(params, actor, state, action, embed, *noises, encoder, vector))


def eager(
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
    seen = embed_all(embed, encoder, vector)
    state, _ = obs_step(params, state, action, seen, state_noise)
    return state, chosen_action(actor, state, action_noise)


def _load_native() -> Callable:
    from fastdreamer.ops.native.decide import decide

    return decide


def _load_triton() -> Callable:
    from fastdreamer.ops.triton.decide import decide

    return decide


OP = Op("decide", eager=eager, native=_load_native, triton=_load_triton)
