"""Imagination: the actor inside the dynamics, from every start state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdreamer.ops.backend import Op
from fastdreamer.ops.checks import check_bins, check_tensor
from fastdreamer.ops.lambda_return import OP as LAMBDA_RETURN
from fastdreamer.ops.layers import MLPParams, deepest, mlp
from fastdreamer.ops.params import ActorParams, ReturnParams, RSSMParams, State, act, scalar
from fastdreamer.ops.rssm_step import eager as step
from fastdreamer.ops.vocabulary import lacking


class Imagination(NamedTuple):
    """An imagined trajectory; action[t] leads from state t to state t + 1 = (deter, stoch)[t].

    The others are None unless returns were asked for, and ``discount`` unless there is a head for
    it. Their gradients are Dreamer's: that of ``returns``, ``reward`` and ``discount`` reaches the
    actor, the dynamics, the start and the heads of reward and discount, never the critic or target;
    that of ``value`` the critic's parameters alone.
    """

    deter: Tensor  # [H, B, D]
    stoch: Tensor  # [H, B, S]
    action: Tensor  # [H, B, A]
    reward: Tensor | None = None  # [H, B] predicted in states 1..H; departure: 0..H-1
    value: Tensor | None = None  # [H, B] the critic's of states 0..H-1
    returns: Tensor | None = None  # [H, B] λ-returns G_0..G_{H-1}
    discount: Tensor | None = None  # [H, B] γ·P(the episode goes on) in states 1..H


def imagine(
    params: RSSMParams,
    actor: ActorParams,
    start: State,
    state_noise: Tensor,
    action_noise: Tensor,
    *,
    returns: ReturnParams | None = None,
    backend: str | None = None,
) -> Imagination:
    """Imagine H decisions of the actor from each start state.

    One reparameterised action sample a step, a = tanh(mean + std·ε), or as the actor's parameters
    say. The actor's input is
    detached: gradients reach the actor through its actions, not through the features it looked
    at (as in the original Dreamer), unless ``actor.through_feat``.

    Args:
        params: the RSSM's tensors, of one floating dtype and device, as is all below;
            ``params.detach()`` for frozen dynamics.
        actor: the policy's tensors.
        start: state 0, deter [B, D] and stoch [B, S].
        state_noise: [H, B, S] standard normal; where the latents are categorical [H, B, C] uniform
            in [0, 1), or with Gumbel-softmax samples [H, B, S] standard Gumbel.
        action_noise: [H, B, A] standard normal; one uniform number in [0, 1) a one-hot action.
        returns: heads to evaluate on the way, critic included; its target, where given,
            bootstraps in the critic's place. A discount head is asked in the states 1..H, those
            of the bootstrap values.
        backend: see ``fastdreamer.ops.backend``.

    Returns:
        States 1..H and the actions that led to them; with ``returns`` the predicted rewards, the
        critic's values and the λ-returns, too. All in the parameters' dtype.

    Raises:
        TypeError: not a tensor. ValueError: a shape, dtype or device does not fit, ``returns`` has
        no critic or its λ is not in [0, 1]. BackendError: an explicitly chosen backend cannot run.

    Source: report section 3, equation 3.1 and Algorithm 1, behaviour learning.
    """
    dims, like = params.dims(), params.like
    check_tensor("imagine", "start.deter", start.deter, ("B", "D"), dims, like=like)
    check_tensor("imagine", "start.stoch", start.stoch, ("B", "S"), dims, like=like)
    check_tensor("imagine", "state_noise", state_noise, ("H", "B", params.noise), dims, like=like)
    each = actor.noise(dims["A"])
    check_tensor("imagine", "action_noise", action_noise, ("H", "B", each), dims, like=like)
    if not len(state_noise):
        raise ValueError(f"imagine: state_noise is empty, {list(state_noise.shape)}")
    if returns is not None and returns.critic is None:
        raise ValueError("imagine: returns.critic is None, but the λ-return needs a critic")
    if returns is not None and not 0.0 <= returns.lam <= 1.0:
        raise ValueError(f"imagine: returns.lam must be in [0, 1], got {returns.lam}")
    if returns is not None:
        check_bins("imagine", returns)
    depth = deepest(
        *params.to_deter, params.prior, actor.mlp, *(returns.heads() if returns else ())
    )
    noise = (state_noise, action_noise)
    missing = lacking(params, actor, returns)
    body = OP.select(
        backend, start.deter, start.stoch, constant=noise, depth=depth, lacking=missing
    )
    return Imagination(*body(params, actor, start, state_noise, action_noise, returns))


def eager(
    params: RSSMParams,
    actor: ActorParams,
    start: State,
    state_noise: Tensor,
    action_noise: Tensor,
    returns: ReturnParams | None,
) -> tuple[Tensor, ...]:
    steps, state = [], start
    for state_noise_t, action_noise_t in zip(state_noise, action_noise, strict=True):
        feat = state.concat(actor.stoch_first)
        feat = feat if actor.through_feat else feat.detach()
        action = act(actor, feat, action_noise_t)
        state, _ = step(params, state, action, state_noise_t)
        steps.append((*state, action))
    deter, stoch, action = (torch.stack(parts) for parts in zip(*steps, strict=True))
    if returns is None:
        return deter, stoch, action
    feat = State(deter, stoch).concat(returns.stoch_first)  # [H, B, F], states 1..H
    before = torch.cat([start.concat(returns.stoch_first)[None], feat[:-1]])  # 0..H-1
    reward = scalar(returns.reward, returns.reward_as, before if returns.departure else feat)
    next_value = scalar((returns.target or returns.critic).detach(), returns.value_as, feat)
    value = scalar(returns.critic, returns.value_as, before.detach())
    discount = predicted_discount(returns.discount, returns.gamma, feat, returns.hard_discount)
    factor = torch.full_like(reward, returns.gamma) if discount is None else discount
    total = LAMBDA_RETURN.eager(reward, next_value, factor, returns.lam)
    return deter, stoch, action, reward, value, total, discount


def predicted_discount(
    head: MLPParams | None, gamma: float, feat: Tensor, hard: bool = False
) -> Tensor | None:
    """γ·sigmoid(head(feat)), [..., F] -> [...], or γ and 0 by its sign; None without a head."""
    if head is None:
        return None
    logit = mlp(head, feat)[..., 0].to(feat.dtype)
    return gamma * ((logit > 0).to(logit) if hard else torch.sigmoid(logit))


def _load_native() -> Callable:
    from fastdreamer.ops.native.imagine import imagine

    return imagine


def _load_triton() -> Callable:
    from fastdreamer.ops.triton.imagine import imagine

    return imagine


OP = Op("imagine", eager=eager, native=_load_native, triton=_load_triton)
