"""Model-predictive control: plan action sequences in latent space, take the first action.

Algorithm 2 of the report (``mpc``: candidates ranked by their λ-return, the search starts around
what the actor would do) and PlaNet (``planet``: ranked by the sum of predicted rewards, neither
actor nor critic; Hafner et al. 2019) are one planner with two scores. The search itself, rollouts
and refits included, is :mod:`fastdreamer.ops.cem`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdreamer.acting.noise import Source, latent, normal, one_by_one
from fastdreamer.config import PlanConfig
from fastdreamer.config.sections import Greedy
from fastdreamer.errors import FastdreamerError
from fastdreamer.nn.dists import greedy_action
from fastdreamer.ops.cem import Score, cem
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.params import ActorParams, ReturnParams, RSSMParams, State, actor_dist
from fastdreamer.ops.rssm_step import rssm_step

PLANNERS = frozenset({"mpc", "planet"})
"""The controllers that plan."""


class PlanningError(FastdreamerError, RuntimeError):
    """No candidate of some environment has a score: the world model's predictions are NaN."""


class PlanInfo(NamedTuple):
    """How an action was found."""

    mean: Tensor  # [H, B, A], the plan; mean[0] is the action
    std: Tensor  # [H, B, A]
    scores: Tensor  # [I, B, N] of every candidate, iteration by iteration
    seconds: float  # of wall-clock time

    @property
    def iterations(self) -> int:
        """Iterations made: all that were asked for, or as many as fitted in the time."""
        return len(self.scores)

    @classmethod
    def beside(cls, each: Sequence[PlanInfo]) -> PlanInfo:
        """Of several batches, planned one after the other, as of one."""
        *parts, seconds = zip(*each, strict=True)
        return cls(*(torch.cat(part, 1) for part in parts), sum(seconds))


@torch.no_grad()
def plan(
    state: State,
    params: RSSMParams,
    returns: ReturnParams,
    config: PlanConfig,
    *,
    actor: ActorParams | None = None,
    greedy: Greedy = "median",
    score: Score = "lambda_return",
    last: Tensor | None = None,
    generator: Source | None = None,
    backend: str | None = None,
) -> tuple[Tensor, PlanInfo]:
    """Plan from each state of a batch.

    The search starts with standard deviation ``config.init_std`` around the actor's actions along
    one imagined trajectory (actions without noise, sampled states); around 0 where there is no
    actor; or, with ``config.warm_start``, around ``last`` one decision later, its final action
    repeated.

    Args:
        state: deter [B, D] and stoch [B, S], the present.
        params: the RSSM's tensors.
        returns: the heads that score; for ``score="reward"`` the critic may be None.
        config: horizon, samples, elites, iterations and so on.
        actor: the policy; needed for ``config.proposals``.
        greedy: what its actions without noise are; see :func:`fastdreamer.nn.dists.greedy_action`.
        score: see :func:`fastdreamer.ops.cem.cem`.
        last: [H, B, A], the ``mean`` of the plan made one decision ago; None at the beginning.
        generator: draws every noise, on the CPU, iteration by iteration; the same seed gives the
            same plan, unless a time limit decides how many iterations there are. One, or one a row
            of the batch; None is torch's own.
        backend: see ``fastdreamer.ops.backend``.

    Returns:
        The actions to take, [B, A] within ±``config.clip``, and how they were found.

    Raises:
        PlanningError: all candidates of an environment scored NaN.
        ValueError: shapes do not fit, or there are proposals to make and no actor.

    Source: report section 4, Algorithm 2.
    """
    begin = time.perf_counter()
    if config.proposals and actor is None:
        raise ValueError(f"plan: {config.proposals} proposals need an actor, got none")
    horizon, batch, samples = config.plan_horizon, len(state.deter), config.num_samples
    dims, like = params.dims(), state.deter
    warm = config.warm_start and last is not None
    iterations = config.warm_iterations if warm else config.iterations

    source = torch.default_generator if generator is None else generator

    def draw(*lead: int) -> Tensor:  # of actions
        return normal(source, *lead, dims["A"], dim=1).to(like)

    def draw_latent(*lead: int) -> Tensor:
        return latent(params, source, *lead, dim=1).to(like)

    if warm:
        shape = (horizon, batch, dims["A"])
        if last.shape != shape:
            raise ValueError(f"plan: last must be {list(shape)}, got {list(last.shape)}")
        mean = torch.cat([last[1:], last[-1:]])
    else:
        mean = like.new_zeros(horizon, batch, dims["A"])
    leads = actor is not None and not warm
    if leads and greedy != "median":
        noise = draw_latent(horizon, batch)
        alone = bool(one_by_one(source, batch))
        mean = _follow(params, actor, state, noise, greedy, backend, alone=alone)
    # The actor's rollouts, in one call: first the start, where it is one, then the proposals. The
    # median is the action of no noise.
    first = int(leads and greedy == "median")
    rollouts, proposals = first + config.proposals, None
    if rollouts:
        action_noise = draw(horizon, batch, rollouts)
        action_noise[:, :, :first] = 0
        state_noise = draw_latent(horizon, batch, rollouts)
        many = State(*(part.repeat_interleave(rollouts, 0) for part in state))
        noise = state_noise.flatten(1, 2), action_noise.flatten(1, 2)
        actions = imagine(params, actor, many, *noise, backend=backend).action
        actions = actions.view(horizon, batch, rollouts, dims["A"])
        mean = actions[:, :, 0].contiguous() if first else mean
        proposals = actions[:, :, first:].contiguous() if config.proposals else None
    std = torch.full_like(mean, config.init_std)

    def noises(count: int) -> tuple[Tensor, Tensor]:
        """action_noise and state_noise of so many iterations."""
        shape = (count, horizon, batch, samples)
        action, state = (like.new_empty(*shape, dims[n]) for n in ("A", params.noise))
        each = 1 if config.common_noise else samples
        for i in range(count):  # one at a time, so that the count does not change them
            action[i] = draw(*action.shape[1:-1])
            state[i] = draw_latent(horizon, batch, each)
        return action, state

    def search(mean: Tensor, std: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        return cem(
            params,
            returns,
            state,
            mean,
            std,
            *noises(count),
            num_elites=config.num_elites,
            min_std=config.min_std,
            sample_std=config.refit_std == "sample",
            clip=config.clip,
            score=score,
            proposals=proposals,
            backend=backend,
        )

    if config.budget_ms is None:
        mean, std, scores = search(mean, std, iterations)
    else:
        parts, longest = [like.new_empty(0, batch, samples)], 0.0
        for _ in range(iterations):
            start = time.perf_counter()
            mean, std, part = search(mean, std, 1)
            parts.append(part)
            now = time.perf_counter()
            longest = max(longest, now - start)
            if now + longest - begin > config.budget_ms / 1000:
                break
        scores = torch.cat(parts)
    lost = mean.isnan().any(-1).any(0).nonzero().flatten().tolist()
    if lost:
        raise nothing_but_nan(lost, batch)
    action = mean[0].clamp(-config.clip, config.clip)  # the actor's own may lie beyond, by a hair
    return action, PlanInfo(mean, std, scores, time.perf_counter() - begin)


def nothing_but_nan(lost: list[int], batch: int) -> PlanningError:
    """What is raised where in those rows of a batch every candidate scored NaN."""
    return PlanningError(
        f"plan: every candidate scored NaN in environments {lost} of {batch}: the world model's "
        "weights or states are not finite"
    )


def greedy_actions(actor: ActorParams, state: State, rule: Greedy, *, alone: bool) -> Tensor:
    """The actor's actions without noise in states [B, ...], [B, A]; ``alone``: computed one by one,
    see :func:`fastdreamer.acting.noise.one_by_one`."""
    feat = state.concat(actor.stoch_first)
    rows = feat.split(1) if alone else [feat]
    return torch.cat([greedy_action(actor_dist(actor, row), rule) for row in rows])


def _follow(
    params: RSSMParams,
    actor: ActorParams,
    state: State,
    state_noise: Tensor,
    greedy: Greedy,
    backend: str | None,
    *,
    alone: bool,
) -> Tensor:
    """The actor's actions without noise along an imagined trajectory, [H, B, A]."""
    actions = []
    for noise in state_noise:
        actions.append(greedy_actions(actor, state, greedy, alone=alone))
        state, _ = rssm_step(params, state, actions[-1], noise, backend=backend)
    return torch.stack(actions)
