"""Planning by the cross-entropy method: fit a Normal over action sequences to the best of N."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastdreamer.ops.backend import Op
from fastdreamer.ops.checks import check_bins, check_tensor
from fastdreamer.ops.imagine import predicted_discount
from fastdreamer.ops.lambda_return import lambda_return
from fastdreamer.ops.layers import deepest
from fastdreamer.ops.open_loop import OP as OPEN_LOOP
from fastdreamer.ops.params import ReturnParams, RSSMParams, State, scalar
from fastdreamer.ops.vocabulary import lacking

SCORES = ("lambda_return", "reward")
Score = Literal["lambda_return", "reward"] | Callable[[Tensor], Tensor]
"""How trajectories are ranked; a function gets feat [H, B, F] of states 1..H and returns [B]."""


class Plan(NamedTuple):
    """The Normal over action sequences after the last iteration, and how it was found."""

    mean: Tensor  # [H, B, A]; mean[0] is the action to take
    std: Tensor  # [H, B, A]
    scores: Tensor  # [I, B, N] of every candidate, iteration by iteration


@torch.no_grad()
def cem(
    params: RSSMParams,
    returns: ReturnParams,
    start: State,
    mean: Tensor,
    std: Tensor,
    action_noise: Tensor,
    state_noise: Tensor,
    *,
    num_elites: int,
    min_std: float = 0.0,
    sample_std: bool = False,
    clip: float = 0.9999,
    score: Score = "lambda_return",
    proposals: Tensor | None = None,
    backend: str | None = None,
) -> Plan:
    """Plan H decisions from each start state; not differentiable, nothing returned has a gradient.

    In each of I iterations, for each start state: N candidates a = clamp(mean + std·ε, ±clip)
    are rolled through the dynamics; the K with the highest scores are the elites; mean and std
    become those of the elites (std at least ``min_std``).

    Among equal scores (0 and −0 are equal) the lower n comes first. A NaN score comes after all
    others, −∞ included, and is never an elite: with fewer than K other scores the elites are
    those, with none the row's mean and std become NaN.

    Args:
        params: the RSSM's tensors, of one floating dtype and device; so is all below.
        returns: reward head, critic, γ and λ. The target bootstraps in the critic's place where
            given. ``score="reward"`` needs the reward head alone.
        start: state 0, deter [B, D] and stoch [B, S].
        mean, std: [H, B, A], the Normal to start from.
        action_noise: [I, H, B, N, A] standard normal; with I = 0 the Normal is returned as given.
        state_noise: [I, H, B, N, S] standard normal; where the latents are categorical
            [I, H, B, N, C] uniform in [0, 1), or with Gumbel-softmax samples [I, H, B, N, S]
            standard Gumbel.
        num_elites: K in 1..N.
        min_std: the least standard deviation of a fitted Normal.
        sample_std: fit √(Σ(a − mean)²/(K − 1)), the sample's (0 of a single elite), as the report's
            code does, instead of the population's √(Σ(a − mean)²/K).
        clip: bound on the candidates' |a|, positive.
        score: ``"lambda_return"``, G_0 of the predicted rewards and values of states 1..H (with
            ``returns.departure``, rewards of 0..H-1), or ``"reward"``, the sum of the rewards of
            states 1..H; or a function of the features [H, B·N, F] of
            states 1..H, row b·N + n candidate n of b, that returns scores [B·N]. With a function
            the search itself is eager and the backend rolls the candidates out.
        proposals: [H, B, P, A], P in 0..N, action sequences that are the first P candidates of
            every iteration (clamped like the others); their action noise is not used.
        backend: see ``fastdreamer.ops.backend``.

    Returns:
        The Plan, new tensors of the parameters' dtype.

    Raises:
        TypeError: not a tensor. ValueError: a shape, dtype, device or number does not fit, or the
        score needs a critic and there is none. BackendError: an explicitly chosen backend cannot
        run.

    Source: report section 4, Algorithm 2; with ``score="reward"``, Hafner et al. 2019 (PlaNet),
    Algorithm 2.
    """
    dims, like = params.dims(), params.like
    check_tensor("cem", "start.deter", start.deter, ("B", "D"), dims, like=like)
    check_tensor("cem", "start.stoch", start.stoch, ("B", "S"), dims, like=like)
    check_tensor("cem", "mean", mean, ("H", "B", "A"), dims, like=like)
    check_tensor("cem", "std", std, ("H", "B", "A"), dims, like=like)
    check_tensor("cem", "action_noise", action_noise, ("I", "H", "B", "N", "A"), dims, like=like)
    drawn = ("I", "H", "B", "N", params.noise)
    check_tensor("cem", "state_noise", state_noise, drawn, dims, like=like)
    if proposals is not None:
        check_tensor("cem", "proposals", proposals, ("H", "B", "P", "A"), dims, like=like)
        if dims["P"] > dims["N"]:
            raise ValueError(f"cem: {dims['P']} proposals, but only N={dims['N']} candidates")
    if not mean.numel():
        raise ValueError(f"cem: mean is empty, {list(mean.shape)}")
    if not 1 <= num_elites <= dims["N"]:
        raise ValueError(f"cem: num_elites must be in 1..N={dims['N']}, got {num_elites}")
    if not min_std >= 0:
        raise ValueError(f"cem: min_std must be at least 0, got {min_std}")
    if not clip > 0:
        raise ValueError(f"cem: clip must be positive, got {clip}")
    if not callable(score) and score not in SCORES:
        raise ValueError(
            f"cem: score must be one of {', '.join(SCORES)} or a function, got {score!r}"
        )
    if score == "lambda_return":
        if returns.critic is None and returns.target is None:
            raise ValueError("cem: returns.critic is None, but the λ-return needs a critic")
        if not 0.0 <= returns.lam <= 1.0:
            raise ValueError(f"cem: returns.lam must be in [0, 1], got {returns.lam}")
    check_bins("cem", returns)
    noise = (action_noise, state_noise)
    depth = deepest(*params.to_deter, params.prior)
    given = (*start, mean, std)
    if callable(score):
        missing = lacking(params)
        roll = OPEN_LOOP.select(backend, *given, constant=noise, depth=depth, lacking=missing)
        body = partial(eager, roll=roll)
    else:
        heads = (returns.reward,) if score == "reward" else returns.heads()
        depth = max(depth, deepest(*heads))
        given += (proposals,) if proposals is not None and proposals.numel() else ()
        missing = lacking(params, None, returns)
        body = OP.select(backend, *given, constant=noise, depth=depth, lacking=missing)
    found = body(
        params, returns, start, mean, std, action_noise, state_noise,
        num_elites, float(min_std), float(clip), score, proposals, bool(sample_std),
    )  # fmt: skip
    return Plan(*found)


def eager(
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
    score: Score,
    proposals: Tensor | None,
    sample_std: bool,
    roll: Callable = OPEN_LOOP.eager,
) -> tuple[Tensor, Tensor, Tensor]:
    iterations, _, batch, samples, _ = action_noise.shape
    mean, std = mean.clone(), std.clone()
    scores = mean.new_empty(iterations, batch, samples)
    start = State(*(part.repeat_interleave(samples, 0) for part in start))  # row b·N + n
    first = start.concat(returns.stoch_first)
    for i in range(iterations):
        action = mean.unsqueeze(2) + std.unsqueeze(2) * action_noise[i]
        if proposals is not None:
            action[:, :, : proposals.shape[2]] = proposals
        action = action.clamp(-clip, clip)  # [H, B, N, A]
        states = roll(params, start, action.flatten(1, 2), state_noise[i].flatten(1, 2))
        feat = states.concat(returns.stoch_first)
        scores[i] = evaluate(returns, first, feat, score).view(batch, samples)
        best = top(scores[i], num_elites)  # [B, K]
        elites = action.take_along_dim(best[None, :, :, None], 2)  # [H, B, K, A]
        failed = scores[i].take_along_dim(best, 1).isnan()
        elites = elites.masked_fill(failed[None, :, :, None], torch.nan)  # for nanmean to leave out
        mean = elites.nanmean(2)
        variance = (elites - mean.unsqueeze(2)).square().nanmean(2)
        if sample_std:
            count = (~failed).sum(1)[:, None]  # [B, 1]
            variance = variance * count / (count - 1).clamp(min=1)
        std = variance.sqrt().clamp(min=min_std)
    return mean, std, scores


def evaluate(returns: ReturnParams, first: Tensor, feat: Tensor, score: Score) -> Tensor:
    """Score [B] of trajectories by the features [B, F] of state 0 and [H, B, F] of 1..H."""
    if callable(score):
        return score(feat)
    departs = returns.departure and score == "lambda_return"
    paid = torch.cat([first[None], feat[:-1]]) if departs else feat
    reward = scalar(returns.reward, returns.reward_as, paid)  # [H, B]
    if score == "reward":
        return reward.sum(0)
    value = scalar(returns.target or returns.critic, returns.value_as, feat)
    discount = predicted_discount(returns.discount, returns.gamma, feat, returns.hard_discount)
    if discount is None:
        discount = torch.full_like(reward, returns.gamma)
    return lambda_return(reward, value, discount, returns.lam, backend="eager")[0]


def top(scores: Tensor, k: int) -> Tensor:
    """Indices [B, k] of the highest scores [B, N], best first; see :func:`cem` for the order."""
    # Ascending puts NaN last, hence the minus; stable leaves equal scores in their order.
    return torch.sort(-scores, stable=True).indices[:, :k]


def _load_native() -> Callable:
    from fastdreamer.ops.native.cem import cem

    return cem


def _load_triton() -> Callable:
    from fastdreamer.ops.triton.cem import cem

    return cem


OP = Op("cem", eager=eager, native=_load_native, triton=_load_triton)
