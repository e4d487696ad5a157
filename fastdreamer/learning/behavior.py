"""Behaviour: actor and critic, learned in imagination (report section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdreamer.acting.policy import Policy
from fastdreamer.config import BehaviorConfig
from fastdreamer.learning import losses
from fastdreamer.learning.learner import Learner, Losses
from fastdreamer.machine import nvtx
from fastdreamer.nn import Actor
from fastdreamer.nn.dists import squashed_entropy
from fastdreamer.ops.imagine import Imagination, imagine
from fastdreamer.ops.params import Readout, State

SATURATED = 0.99
"""An action beyond ± this counts as saturated."""


class Dream(NamedTuple):
    """What was imagined from every state of a batch, B of them."""

    start: State  # [B, ...], where from; no gradient
    noise: tuple[Tensor, Tensor]  # of states [H, B, S or C] and actions [H, B, A]
    ahead: Imagination  # states 1..H, actions, rewards, values and λ-returns
    weights: Tensor  # [H, 1] or [H, B], of states 0..H−1 in the losses
    scale: Tensor | float  # the returns are divided by it for the actor
    ended: Tensor | None  # bool [B], whether a start is an end; None where ends are not predicted

    @property
    def feat(self) -> Tensor:
        """Of states 0..H, [H + 1, B, F]."""
        return torch.cat([self.start.feat[None], State(self.ahead.deter, self.ahead.stoch).feat])


class BehaviorLearner(Learner):
    """Optimisers ``actor`` and ``critic``; the dynamics are frozen."""

    def optimized(self) -> dict[str, tuple[nn.Module | None, float]]:
        agent, optim = self.agent, self.agent.config.optim
        return {"actor": (agent.actor, optim.actor_lr), "critic": (agent.critic, optim.critic_lr)}

    def imagine(
        self, states: State, batch: dict[str, Tensor], noise: tuple[Tensor, Tensor]
    ) -> Dream:
        """Imagine the actor's trajectory from each state, with rewards, values and λ-returns.

        Args:
            states: of the batch, [T, B, ...]. noise: [H, T·B, ...], of states and actions.
        """
        agent = self.agent
        start = State(*(part.detach().flatten(0, 1) for part in states))  # [T·B, ...]
        with agent.autocast(), nvtx.annotate("imagine"):
            ahead = imagine(
                agent.model.rssm.params().detach(),
                agent.actor.params(),
                start,
                *noise,
                returns=agent.return_params(),
            )
        ended = None if ahead.discount is None else batch["terminated"].flatten()  # [T·B]
        weights = state_weights(agent.config.behavior, ahead.returns, ahead.discount, ended)
        return Dream(start, noise, ahead, weights, self._scale(ahead.returns), ended)

    def losses(self, dream: Dream, *, health: bool = False) -> Losses:
        """The actor: up the returns, and to entropy where that is asked for. The critic: towards
        them, in the states 0..H−1 that the actions were chosen in.

        Args:
            health: also measure how wide the actor is and how its actions saturate.
        """
        ahead, weights, bonus = dream.ahead, dream.weights, None
        if self.agent.config.behavior.entropy:
            bonus = entropy_bonus(self.agent, self.agent.actor, dream.feat[:-1], dream.noise[1])
        actor = losses.actor_loss(ahead.returns, weights, dream.scale, bonus)
        outputs, readout = self._critic(dream)
        critic = losses.critic_loss(outputs, readout, ahead.returns, weights)
        critic = self.agent.config.behavior.value_scale * critic
        metrics = self._health(dream) if health else {}
        metrics |= {
            "actor_loss": actor,
            "critic_loss": critic,
            "imagined_reward": ahead.reward.mean(),
            "imagined_value": ahead.value.mean(),
        }
        return Losses({"actor": actor, "critic": critic}, metrics)

    def _critic(self, dream: Dream) -> tuple[Tensor, Readout]:
        """The critic's outputs in the states 0..H−1, [H, B, n], and how they say a value.

        Imagination returns values, of which the outputs are had only where they are the same.
        """
        critic = self.agent.critic
        if critic.kind == "plain":
            return dream.ahead.value.unsqueeze(-1), critic.readout
        feat = dream.feat[:-1].detach()
        with self.agent.autocast():
            return critic(feat).to(feat.dtype), critic.readout

    def _scale(self, returns: Tensor) -> Tensor | float:
        """max(1, running range of the returns), as in DreamerV3; 1 when not asked for."""
        if not self.agent.config.behavior.return_norm:
            return 1.0
        returns = self.ranks.gather(returns.detach().flatten())
        levels = torch.linspace(0.05, 0.95, 2, device=returns.device)  # made where they are used
        low, high = torch.quantile(returns, levels)
        self.agent.return_range.lerp_(high - low, 0.01)
        return self.agent.return_range.clamp(min=1.0)

    @torch.no_grad()
    def _health(self, dream: Dream) -> dict[str, Tensor]:
        """Of the actor in the states it imagines from, and of its actions."""
        with self.agent.autocast():
            dist = self.agent.actor(dream.start.feat)
        _, action_noise = dream.noise
        return {
            "actor_entropy": squashed_entropy(dist, action_noise[0]).mean(),
            "actor_std": dist.std.mean(),
            "action_saturated": (dream.ahead.action.abs() > SATURATED).float().mean(),
        }


def state_weights(
    behavior: BehaviorConfig, returns: Tensor, discount: Tensor | None, ended: Tensor | None
) -> Tensor:
    """What the states 0..H−1 of an imagination count: 1 or γ^t, and the chance to get there at all.

    Args:
        behavior: whether they are discounted, and by which γ.
        returns: [H, B], of that imagination.
        discount: γ·p of its states 1..H, [H, B], or None: ends are not predicted.
        ended: with it bool [B], whether a start is an end already.

    Returns:
        [H, 1], or with a discount [H, B]; no gradient flows into them.
    """
    H, gamma = len(returns), behavior.gamma
    weights = torch.ones(H, 1, device=returns.device)
    if behavior.discount_weights:
        t = torch.arange(H, device=returns.device, dtype=torch.float32)
        weights = gamma ** t[:, None]
    if discount is not None:
        weights = weights * losses.survival_weights(discount, ended, gamma)
    return weights


def entropy_bonus(agent: Policy, actor: Actor, feat: Tensor, noise: Tensor) -> Tensor:
    """``behavior.entropy`` times the entropy of an actor's squashed actions, [H, B].

    Args:
        actor: the agent's or its explorer's; the gradient is its alone.
        feat: [H, B, F], states that actions were chosen in. noise: [H, B, A], by what.
    """
    with agent.autocast():
        dist = actor(feat.detach())
    return agent.config.behavior.entropy * squashed_entropy(dist, noise)
