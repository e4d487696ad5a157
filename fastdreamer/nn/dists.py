"""Diagonal Normal distributions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdreamer.ops.params import Normal


def kl_divergence(p: Normal, q: Normal) -> Tensor:
    """KL(p ‖ q) in nats, summed over the last dimension: [..., S] -> [...].

    Σ log(σ_q/σ_p) + (σ_p² + (μ_p − μ_q)²) / (2σ_q²) − ½.
    """
    ratio = p.std / q.std
    distance = (p.mean - q.mean) / q.std
    return (0.5 * (ratio.square() + distance.square() - 1) - ratio.log()).sum(-1)


def detach(p: Normal) -> Normal:
    """The same distribution, receiving no gradient."""
    return Normal(p.mean.detach(), p.std.detach())


def symexp(x: Tensor) -> Tensor:
    """The inverse of ``ops.params.symlog``."""
    return torch.sign(x) * torch.expm1(x.abs())
