"""The optimist: reward heads that disagree where they know little, and who seeks that out.

The networks and the bound are :mod:`fastdreamer.acting.exploration`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdreamer.acting.exploration import Explorer, spread, upper_bound
from fastdreamer.learning import losses
from fastdreamer.learning.behavior import Dream, entropy_bonus, state_weights
from fastdreamer.learning.learner import Learner, Losses
from fastdreamer.machine import nvtx
from fastdreamer.ops.imagine import imagine, predicted_discount
from fastdreamer.ops.layers import MLPParams
from fastdreamer.ops.params import ActorParams, Readout, RSSMParams, State, scalar


class ExplorerLearner(Learner):
    """Optimisers ``rewards`` and, as far as the explorer has them, ``explorer`` and ``critics``."""

    def optimized(self) -> dict[str, tuple[nn.Module | None, float]]:
        explorer, optim = self.agent.explorer, self.agent.config.optim
        return {
            "rewards": (explorer.rewards, optim.model_lr),
            "explorer": (explorer.actor, optim.actor_lr),
            "critics": (explorer.critics, optim.critic_lr),
        }

    def losses(
        self,
        feat: Tensor,
        reward: Tensor,
        dream: Dream | None,
        generator: torch.Generator,
    ) -> Losses:
        """Of the reward heads on the batch, each with a weighting of its own; of actor and critics
        in imagination, from where the greedy actor learned.

        Args:
            feat: [T, B, F], states of the batch. reward: [T, B].
            dream: of the greedy actor; None where there is none (PlaNet).
            generator: draws the weights of the sequences.
        """
        agent, explorer = self.agent, self.agent.explorer
        each = torch.empty(explorer.rewards.members, 1, feat.shape[1], device=generator.device)
        each = each.exponential_(generator=generator).to(agent.device)
        metrics = {"explore_beta": torch.tensor(explorer.beta, device=agent.device)}
        with agent.autocast(), nvtx.annotate("explore"):
            named = {"rewards": reward_loss(explorer, feat, reward, each)}
            # Without actor and critics its reward heads suffice.
            if explorer.actor is not None or explorer.critics is not None:
                # Critics of a planner that is the optimist learn from the greedy actor's dreams.
                before, returns, discount = imagine_members(
                    explorer,
                    agent.model.rssm.params().detach(),
                    (explorer.actor or agent.actor).params(),
                    dream.start,
                    dream.noise,
                    (agent.target_critic or agent.critic).params().detach(),
                    agent.discount_params(),
                    agent.critic.readout,
                )
                # How far its own actions let it come, not the greedy actor's.
                behavior = agent.config.behavior
                weights = state_weights(behavior, returns[0], discount, dream.ended)
                metrics["explore_return"] = returns.mean()
                metrics["explore_spread"] = spread(returns.detach()).mean()
            if explorer.critics is not None:
                loss = critic_loss(explorer, before, returns, weights)
                named["critics"] = agent.config.behavior.value_scale * loss
        if explorer.actor is not None:
            bound = upper_bound(returns, explorer.beta)
            bonus = None
            if agent.config.behavior.entropy:
                bonus = entropy_bonus(agent, explorer.actor, before, dream.noise[1])
            named["explorer"] = losses.actor_loss(bound, weights, dream.scale, bonus)
        metrics |= {f"{name}_loss": loss for name, loss in named.items()}
        return Losses(named, metrics)

    def update_target(self) -> None:
        """Copy the critics to their targets."""
        explorer = self.agent.explorer
        if explorer.target_critics is not None:
            explorer.target_critics.load_state_dict(explorer.critics.state_dict())


def reward_loss(explorer: Explorer, feat: Tensor, reward: Tensor, weights: Tensor) -> Tensor:
    """Sum over the heads of their weighted mean squared errors.

    Args:
        feat: [T, B, F]; no gradient flows into it.
        reward: [T, B], received on arriving there.
        weights: [M, 1, B] of mean 1, drawn anew for every batch, so that each head has noise
            of its own: one weight a head and sequence.
    """
    predicted = explorer.rewards(feat.detach()).squeeze(-1).to(reward.dtype)  # [M, T, B]
    return (weights * (predicted - reward).square()).flatten(1).mean(1).sum()


def critic_loss(explorer: Explorer, feat: Tensor, returns: Tensor, weights: Tensor) -> Tensor:
    """Sum over the critics of their weighted mean squared errors to their own returns.

    Args:
        feat: [H, B, F] of states 0..H−1, returns: [M, H, B]; no gradient flows into either.
        weights: [H, 1] or [H, B].
    """
    value = explorer.critics(feat.detach()).squeeze(-1).to(feat.dtype)  # [M, H, B]
    return (weights * (value - returns.detach()).square()).flatten(1).mean(1).sum()


def imagine_members(
    explorer: Explorer,
    rssm: RSSMParams,
    actor: ActorParams,
    start: State,
    noise: tuple[Tensor, Tensor],
    critic: MLPParams,
    discount: MLPParams | None = None,
    value_as: Readout = Readout(),  # noqa: B008 (immutable)
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Imagine an actor's trajectories and value them as every member would.

    Args:
        rssm: frozen dynamics. actor: whose imagination; gradients reach it alone.
        start: [B, ...]. noise: of the states [H, B, S or C] and actions [H, B, A].
        critic: whose value the members share where there is no ensemble of critics.
        discount: the continuation head, frozen, or None.
        value_as: how the critic's outputs say its value.

    Returns:
        Features of states 0..H−1, [H, B, F], returns G_0..G_{H−1}, [M, H, B], and γ·P(the episode
        goes on) in states 1..H, [H, B], or None without a head for it.
    """
    dream = imagine(rssm, actor, start, *noise)
    ahead = State(dream.deter, dream.stoch).feat
    value = None
    if explorer.values is None:
        value = scalar(critic, value_as, ahead)
    going = predicted_discount(discount, explorer.behavior.gamma, ahead)
    before = torch.cat([start.feat[None], ahead[:-1]])
    return before, explorer.member_returns(ahead, value, going), going
