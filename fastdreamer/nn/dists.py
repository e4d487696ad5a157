"""The latents' distributions, and what to take of a Normal that a tanh squashes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdreamer.config.sections import Greedy
from fastdreamer.ops.params import Latent, Normal, OneHot

_NEWTON_STEPS = 16  # fewer than 8 do, but for means near 0 with a variance near ½


def entropy(p: Latent) -> Tensor:
    """Entropy in nats, of Normals the differential one, summed over the latents: [...]."""
    if isinstance(p, OneHot):
        return -(p.probs * p.log_probs).sum((-2, -1))
    return (p.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def squashed_entropy(p: Normal, noise: Tensor) -> Tensor:
    """That of tanh(x), x ~ p, estimated at the samples x of some standard normal noise.

    Unbiased: the entropy of x plus E Σ log(1 − tanh²(x)). A uniform action's is S·log 2.
    """
    x = p.sample(noise)
    return entropy(p) + 2 * (math.log(2) - x - F.softplus(-2 * x)).sum(-1)


def greedy_action(p: Normal, rule: Greedy) -> Tensor:
    """The action of tanh(x), x ~ p, without chance: [..., A] in [-1, 1].

    ``median``: tanh(mean). ``mode``: where the density of a = tanh(x), N(x; μ, σ²) / (1 − a²), is
    greatest. Its logarithm is −(x − μ)²/2σ² + 2 log cosh x up to a constant, so that there
    x = μ + 2σ²·tanh(x); of the solutions the greatest density has the one farthest from 0 on μ's
    side. (The mean E[tanh(x)] lies nearer to 0 than the median.) The mode passes no gradient.
    """
    if rule == "median":
        return torch.tanh(p.mean)
    with torch.no_grad():
        distance, pull = p.mean.abs(), 2 * p.std.square()
        # x − |μ| − 2σ²·tanh(x) is convex from 0 on and not negative at |μ| + 2σ²: from there
        # Newton's method comes down to the root and never past it.
        x = distance + pull
        for _ in range(_NEWTON_STEPS):
            squashed = torch.tanh(x)
            slope = 1 - pull * (1 - squashed.square())
            down = x - (x - distance - pull * squashed) / slope
            down = torch.where(slope > 0, down, x).minimum(x)  # rounding may say otherwise
            if torch.equal(down, x):
                break
            x = down
        return torch.copysign(torch.tanh(x), p.mean)


def kl_divergence(p: Latent, q: Latent) -> Tensor:
    """KL(p ‖ q) in nats, summed over the latents: [...].

    Of Normals Σ log(σ_q/σ_p) + (σ_p² + (μ_p − μ_q)²) / (2σ_q²) − ½, of categoricals
    Σ p·(log p − log q) over all classes.
    """
    if isinstance(p, OneHot):
        return (p.probs * (p.log_probs - q.log_probs)).sum((-2, -1))
    ratio = p.std / q.std
    distance = (p.mean - q.mean) / q.std
    return (0.5 * (ratio.square() + distance.square() - 1) - ratio.log()).sum(-1)


def detach(p: Latent) -> Latent:
    """The same distribution, receiving no gradient."""
    if isinstance(p, OneHot):
        return p._replace(logits=p.logits.detach())
    return Normal(p.mean.detach(), p.std.detach())
