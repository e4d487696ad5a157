"""Whether an ensemble of reward heads knows how sure it is: predicted intervals against rewards."""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdreamer.acting.exploration import spread
from fastdreamer.acting.noise import latent
from fastdreamer.nn import Ensemble, WorldModel
from fastdreamer.ops.observe import observe
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.params import RSSMParams, State

LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Nominal levels of the intervals that calibration counts."""


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
        noise: [k, T − k, ...] of the latents; k = 0 predicts from the filtered state itself.

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
        ahead: numbers of decisions.
        generator: of the latent samples.

    Returns:
        One for each of these numbers that some episode has rewards for: it has one more steps, its
        reset included.
    """
    found: dict[int, list[tuple[Tensor, Tensor]]] = {k: [] for k in ahead}
    rssm = model.rssm.params()
    for episode in episodes:
        seen = {k: torch.from_numpy(v)[:, None] for k, v in episode.items()}  # [T, 1, ...]
        T = len(seen["action"])
        first = torch.arange(T)[:, None] == 0
        embed = model.encoder(seen)
        start, noise = model.rssm.initial(1), latent(rssm, generator, T, 1)
        state = observe(rssm, start, embed, seen["action"], first, noise).state
        states, action = State(*(part[:, 0] for part in state)), seen["action"][:, 0]
        for k, pairs in found.items():
            if k >= T:
                continue  # it was over before
            noise = latent(rssm, generator, k, T - k)
            samples = predict_rewards(rssm, rewards, states, action, noise)
            true = seen["reward"][k:, 0]
            if k == 0:  # step 0 is the reset: no reward was received with it
                samples, true = samples[:, 1:], true[1:]
            pairs.append((samples, true))
    return [
        calibrate(k, torch.cat([s for s, _ in pairs], 1), torch.cat([t for _, t in pairs]))
        for k, pairs in found.items()
        if pairs
    ]
