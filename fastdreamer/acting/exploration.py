"""Exploration by optimism: the upper confidence bound of the λ-return (report, future work 1).

M reward heads are M guesses at the reward. Where experience is dense they agree; elsewhere each
keeps what its own initial weights and its own batches made of it. Every member m gives a trajectory
its own λ-return G_m, from its own rewards all along (and, with an ensemble of critics, its own
values), and an optimist maximises

    UCB = mean_m G_m + β · std_m G_m.

The heads look at features that they do not shape, so the world model, the actor and the critic
learn from a batch exactly what they would learn without them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from fastdreamer.config import Config, ExploreConfig
from fastdreamer.nn import Actor, Ensemble, ScalarHead
from fastdreamer.ops.imagine import predicted_discount
from fastdreamer.ops.lambda_return import lambda_return
from fastdreamer.ops.layers import MLPParams


def spread(samples: Tensor) -> Tensor:
    """Standard deviation over the members, [M, ...] -> [...], M at least 2.

    √(Σ (x − mean)² / (M − 1)); its gradient is 0, not NaN, where all members agree.
    """
    apart = samples - samples.mean(0)
    return torch.linalg.vector_norm(apart, dim=0) / math.sqrt(len(samples) - 1)


def upper_bound(samples: Tensor, beta: float) -> Tensor:
    """mean + β·std over the members, [M, ...] -> [...]; β = 0 is the mean itself."""
    mean = samples.mean(0)
    return mean + beta * spread(samples) if beta else mean


def beta_at(config: ExploreConfig, rounds: int) -> float:
    """The β of round t = ``rounds`` + 1, where ``rounds`` episodes were collected by optimism.

    ``constant``: β. ``gp-ucb``: β·√(2·ln(t²π²/(6δ))), which grows as √(4 ln t), the rate of
    GP-UCB (Srinivas, Krause, Kakade, Seeger 2010, theorem 1), without the theorem's constant for
    the size of a finite set of decisions, which a trajectory does not have.
    """
    if config.schedule == "constant":
        return config.beta
    t = rounds + 1
    return config.beta * math.sqrt(2 * math.log(t**2 * math.pi**2 / (6 * config.delta)))


class Explorer(nn.Module):
    """The optimist: reward heads, critics if asked for, and the actor that collects.

    Args:
        config: of the agent, with ``explore.method`` "ucb".
        feat_size: F.
        action_dim: A.

    Attributes:
        rewards: ensemble of reward heads, feat -> 1.
        critics, target_critics: ensembles feat -> 1, or None; the target moves as the agent's.
        actor: the policy that maximises the bound in imagination; None where a planner does.
        rounds: episodes collected by optimism, which the schedule of β counts.
    """

    def __init__(self, config: Config, feat_size: int, action_dim: int) -> None:
        super().__init__()
        self.config, self.behavior = config.explore, config.behavior
        model, behavior = config.model, config.behavior
        units = config.explore.units or model.units
        head = lambda layers: Ensemble(  # noqa: E731
            config.explore.heads, [feat_size, *[units] * layers, 1], model.activation
        )
        self.rewards = head(model.reward_layers)
        self.critics = head(behavior.critic_layers) if config.explore.critics else None
        self.target_critics = None
        if self.critics is not None and behavior.target_every:
            self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.actor = None
        if config.explore.at == "actor":
            self.actor = Actor.from_config(model, behavior, feat_size, action_dim)
        self.register_buffer("rounds", torch.zeros((), dtype=torch.int64))

    @property
    def beta(self) -> float:
        """The weight of the spread now, by the schedule."""
        return beta_at(self.config, int(self.rounds))

    @property
    def values(self) -> Ensemble | None:
        """The critics whose values end its returns; None: the members share the agent's."""
        return self.target_critics or self.critics

    def member_returns(
        self, feat: Tensor, next_value: Tensor | None, discount: Tensor | None = None
    ) -> Tensor:
        """The λ-returns G_0..G_{H−1} of every member, [M, H, B], with gradient to feat and discount
        alone.

        Args:
            feat: [H, B, F] of states 1..H.
            next_value: [H, B], the values of these states that all members share; not needed
                where there is an ensemble of critics.
            discount: [H, B], γ·P(the episode goes on) in these states, or None: γ alone.
        """
        M, (H, B) = self.rewards.members, feat.shape[:2]
        reward = self.rewards(feat, frozen=True).squeeze(-1).to(feat.dtype)  # [M, H, B]
        if (values := self.values) is not None:
            value = values(feat, frozen=True).squeeze(-1).to(feat.dtype)
        else:
            value = next_value.expand(M, H, B)
        # λ-returns run along H and know one batch: lay the members side by side.
        wide = lambda x: x.transpose(0, 1).reshape(H, M * B)  # noqa: E731
        if discount is None:
            discount = torch.full_like(reward[0], self.behavior.gamma)
        factor = discount.expand(M, H, B)
        total = lambda_return(wide(reward), wide(value), wide(factor), self.behavior.lam)
        return total.view(H, M, B).transpose(0, 1)

    def score(
        self,
        critic: ScalarHead | None,
        by: Literal["lambda_return", "reward"],
        discount: MLPParams | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """A score for ``ops.cem``: feat [H, B, F] of trajectories -> their upper bounds [B].

        Args:
            critic: whose value the members share where there is no ensemble of critics.
            by: the bound of the λ-return G_0, or of the sum of the H rewards.
            discount: the continuation head, frozen, or None: γ alone.
        """
        beta = self.beta

        def score(feat: Tensor) -> Tensor:
            if by == "reward":
                total = self.rewards(feat).squeeze(-1).to(feat.dtype).sum(1)  # [M, B]
            else:
                value = critic.number(feat) if self.values is None else None
                going = predicted_discount(discount, self.behavior.gamma, feat)
                total = self.member_returns(feat, value, going)[:, 0]
            return upper_bound(total, beta)

        return score
