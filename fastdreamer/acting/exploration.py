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
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastdreamer.config import Config, ExploreConfig
from fastdreamer.nn import Actor, Ensemble, WorldModel
from fastdreamer.ops.imagine import imagine, predicted_discount
from fastdreamer.ops.lambda_return import lambda_return
from fastdreamer.ops.observe import observe
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.params import ActorParams, MLPParams, RSSMParams, State, mlp

LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Nominal levels of the intervals that calibration counts."""


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
    def imagines(self) -> bool:
        """Whether it learns in imagination; without actor and critics its reward heads suffice."""
        return self.actor is not None or self.critics is not None

    def update_target(self) -> None:
        """Copy the critics to their targets."""
        if self.target_critics is not None:
            self.target_critics.load_state_dict(self.critics.state_dict())

    def reward_loss(self, feat: Tensor, reward: Tensor, weights: Tensor) -> Tensor:
        """Sum over the heads of their weighted mean squared errors.

        Args:
            feat: [T, B, F]; no gradient flows into it.
            reward: [T, B], received on arriving there.
            weights: [M, 1, B] of mean 1, drawn anew for every batch, so that each head has noise
                of its own: one weight a head and sequence.
        """
        predicted = self.rewards(feat.detach()).squeeze(-1).to(reward.dtype)  # [M, T, B]
        return (weights * (predicted - reward).square()).flatten(1).mean(1).sum()

    def imagine(
        self,
        rssm: RSSMParams,
        actor: ActorParams,
        start: State,
        noise: tuple[Tensor, Tensor],
        critic: MLPParams,
        discount: MLPParams | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Imagine an actor's trajectories and value them as every member would.

        Args:
            rssm: frozen dynamics. actor: whose imagination; gradients reach it alone.
            start: [B, ...]. noise: of the states [H, B, S] and actions [H, B, A].
            critic: whose value the members share where there is no ensemble of critics.
            discount: the continuation head, frozen, or None.

        Returns:
            Features of states 0..H−1, [H, B, F], and returns G_0..G_{H−1}, [M, H, B].
        """
        dream = imagine(rssm, actor, start, *noise)
        ahead = State(dream.deter, dream.stoch).feat
        value = None
        if self.critics is None:
            value = mlp(critic, ahead).squeeze(-1).to(ahead.dtype)
        before = torch.cat([start.feat[None], ahead[:-1]])
        return before, self.member_returns(ahead, value, discount)

    def member_returns(
        self, feat: Tensor, next_value: Tensor | None, discount: MLPParams | None = None
    ) -> Tensor:
        """The λ-returns G_0..G_{H−1} of every member, [M, H, B], with gradient to feat alone.

        Args:
            feat: [H, B, F] of states 1..H.
            next_value: [H, B], the values of these states that all members share; not needed
                where there is an ensemble of critics.
            discount: the continuation head, frozen, or None: γ alone.
        """
        M, (H, B) = self.rewards.members, feat.shape[:2]
        reward = self.rewards(feat, frozen=True).squeeze(-1).to(feat.dtype)  # [M, H, B]
        if self.critics is not None:
            critics = self.critics if self.target_critics is None else self.target_critics
            value = critics(feat, frozen=True).squeeze(-1).to(feat.dtype)
        else:
            value = next_value.expand(M, H, B)
        # λ-returns run along H and know one batch: lay the members side by side.
        wide = lambda x: x.transpose(0, 1).reshape(H, M * B)  # noqa: E731
        factor = predicted_discount(discount, self.behavior.gamma, feat)
        if factor is None:
            factor = torch.full_like(reward[0], self.behavior.gamma)
        factor = factor.expand(M, H, B)
        total = lambda_return(wide(reward), wide(value), wide(factor), self.behavior.lam)
        return total.view(H, M, B).transpose(0, 1)

    def score(
        self,
        critic: nn.Module | None,
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
                value = critic(feat).squeeze(-1).to(feat.dtype) if self.critics is None else None
                total = self.member_returns(feat, value, discount)[:, 0]
            return upper_bound(total, beta)

        return score

    def critic_loss(self, feat: Tensor, returns: Tensor, weights: Tensor) -> Tensor:
        """Sum over the critics of their weighted mean squared errors to their own returns.

        Args:
            feat: [H, B, F] of states 0..H−1, returns: [M, H, B]; no gradient flows into either.
            weights: [H, 1].
        """
        value = self.critics(feat.detach()).squeeze(-1).to(feat.dtype)  # [M, H, B]
        return (weights * (value - returns.detach()).square()).flatten(1).mean(1).sum()


# ---------------------------------------------------------------- calibration


class Calibration(NamedTuple):
    """How predicted intervals and true rewards agree."""

    ahead: int  # decisions between the filtered state and the reward; 0: filtered with it
    count: int  # rewards looked at
    rmse: float  # of the ensemble's mean
    spread: float  # mean standard deviation over the members
    coverage: dict[float, float]  # nominal level -> share of true rewards inside the interval
    scale: float  # factor on the spread that would bring 90 % of them inside the 90 % interval


def calibrate(ahead: int, samples: Tensor, true: Tensor) -> Calibration:
    """Count how often the true value lies within mean ± z·std of the members.

    Args:
        ahead: goes into the result. samples: [M, n] predictions. true: [n]; n at least 1.
    """
    samples, true = samples.double(), true.double()
    error, std = (samples.mean(0) - true).abs(), spread(samples)
    z = {level: NormalDist().inv_cdf((1 + level) / 2) for level in LEVELS}
    inside = {level: (error <= z[level] * std).double().mean().item() for level in LEVELS}
    ratio = error / std.clamp(min=torch.finfo(std.dtype).tiny)
    scale = ratio.quantile(0.9).item() / z[0.9]
    rmse = error.square().mean().sqrt().item()
    return Calibration(ahead, len(true), rmse, std.mean().item(), inside, scale)


@torch.no_grad()
def predict_rewards(
    rssm: RSSMParams, rewards: Ensemble, states: State, action: Tensor, noise: Tensor
) -> Tensor:
    """Predict the rewards of an episode k decisions ahead under the actions really taken.

    Args:
        rssm: the dynamics.
        rewards: M reward heads.
        states: of the filter, deter [T, D] and stoch [T, S].
        action: [T, A]; action[t] led to state t.
        noise: [k, T − k, S] standard normal; k = 0 predicts from the filtered state itself.

    Returns:
        [M, T − k], predictions of the rewards at steps k..T−1.

    Raises:
        ValueError: k is not below T.
    """
    k, T = len(noise), len(action)
    if k >= T:
        raise ValueError(f"predict_rewards: {k} decisions ahead in an episode of {T} steps")
    if k:
        start = State(states.deter[: T - k], states.stoch[: T - k])
        taken = torch.stack([action[1 + i : 1 + i + T - k] for i in range(k)])  # [k, T − k, A]
        ahead = open_loop(rssm, start, taken, noise)
        states = State(ahead.deter[-1], ahead.stoch[-1])
    return rewards(states.feat).squeeze(-1)


@torch.no_grad()
def calibrate_episodes(
    model: WorldModel,
    rewards: Ensemble,
    episodes: list[dict[str, np.ndarray]],
    ahead: list[int],
    generator: torch.Generator,
) -> list[Calibration]:
    """Calibrate an ensemble on held-out episodes, for each of some numbers of decisions ahead.

    Args:
        model: that filters the episodes and rolls forward the actions taken.
        rewards: M reward heads.
        episodes: arrays as in ``replay``, time first: observations, action, reward.
        ahead: numbers of decisions, each below the length of every episode.
        generator: of the latent samples.
    """
    found: dict[int, list[tuple[Tensor, Tensor]]] = {k: [] for k in ahead}
    rssm, size = model.rssm.params(), model.rssm.stoch
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    for episode in episodes:
        seen = {k: torch.from_numpy(v)[:, None] for k, v in episode.items()}  # [T, 1, ...]
        T = len(seen["action"])
        first = torch.arange(T)[:, None] == 0
        embed = model.encoder(seen)
        state = observe(
            rssm, model.rssm.initial(1), embed, seen["action"], first, draw(T, 1, size)
        ).state
        states, action = State(*(part[:, 0] for part in state)), seen["action"][:, 0]
        for k, pairs in found.items():
            samples = predict_rewards(rssm, rewards, states, action, draw(k, T - k, size))
            true = seen["reward"][k:, 0]
            if k == 0:  # step 0 is the reset: no reward was received with it
                samples, true = samples[:, 1:], true[1:]
            pairs.append((samples, true))
    return [
        calibrate(k, torch.cat([s for s, _ in pairs], 1), torch.cat([t for _, t in pairs]))
        for k, pairs in found.items()
    ]
