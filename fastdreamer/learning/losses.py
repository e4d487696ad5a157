"""The three losses: world model, actor, critic. Pure functions of tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdreamer.config import LossConfig
from fastdreamer.nn.dists import detach, kl_divergence
from fastdreamer.ops.params import Normal


def reward_loss(mean: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the predicted reward, both [T, B]."""
    return (mean - target).square().mean()


def discount_loss(log_odds: Tensor, terminated: Tensor) -> Tensor:
    """Mean cross-entropy of the predicted continuation, in nats.

    Args:
        log_odds: that the episode goes on behind the state, [T, B].
        terminated: bool [T, B], whether it ended there (a time limit is no end).
    """
    return F.binary_cross_entropy_with_logits(log_odds, (~terminated).to(log_odds.dtype))


def kl_loss(
    post: Normal,
    prior: Normal,
    *,
    free_nats: float,
    balance: float | None,
    mean: Callable[[Tensor], Tensor] = torch.mean,
) -> tuple[Tensor, Tensor]:
    """The KL term of the evidence lower bound (report equation 2.1), with free nats.

    Without balancing max(mean KL(post ‖ prior), free_nats). With a balance α (DreamerV2)
    α·max(mean KL(sg(post) ‖ prior), free) + (1 − α)·max(mean KL(post ‖ sg(prior)), free).

    Args:
        post, prior: mean and std, [T, B, S].
        free_nats: the mean is not pushed below this.
        balance: α, or None.
        mean: over the batch, where this is a part of one.

    Returns:
        The loss, and the plain mean KL in nats (no gradient).
    """
    if balance is None:
        kl = mean(kl_divergence(post, prior))
        return kl.clamp(min=free_nats), kl.detach()
    to_prior = mean(kl_divergence(detach(post), prior))
    to_post = mean(kl_divergence(post, detach(prior)))
    loss = balance * to_prior.clamp(min=free_nats) + (1 - balance) * to_post.clamp(min=free_nats)
    return loss, to_prior.detach()


def model_loss(config: LossConfig, parts: dict[str, Tensor]) -> Tensor:
    """Σ scale · part over the parts present: image, state, reward, discount, kl."""
    scales = {
        "image": config.image_scale,
        "state": config.state_scale,
        "reward": config.reward_scale,
        "discount": config.discount_scale,
        "kl": config.kl_scale,
    }
    return sum(scales[name] * part for name, part in parts.items())


def survival_weights(discount: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """The probability that imagination comes as far as each of its steps (DreamerV2, eq. 4 ff.).

    Args:
        discount: γ·p of states 1..H, [H, B]; no gradient flows into it.
        terminated: bool [B], whether the start state is an end already: nothing follows it.
        gamma: by which the discount is divided again; 1: the weights are discounted as well.

    Returns:
        [H, B], of the states 0..H−1 that the actions are chosen in.
    """
    alive = (~terminated).to(discount.dtype)[None]
    return torch.cat([alive, discount.detach()[:-1] / gamma]).cumprod(0)


def actor_loss(
    returns: Tensor, weights: Tensor, scale: Tensor | float = 1.0, bonus: Tensor | None = None
) -> Tensor:
    """−mean of the weighted λ-returns (report equation 3.1, left), with what else is sought.

    Args:
        returns: G_0 .. G_{H−1}, [H, B], with gradient to the actor.
        weights: [H, 1] or [H, B], no gradient.
        scale: the returns are divided by it (return normalisation).
        bonus: added to them then, [H, B]: the scaled entropy of the policy (DreamerV2, equation 6).
    """
    loss = -(weights * returns / scale).mean()
    return loss if bonus is None else loss - (weights * bonus).mean()


def critic_loss(value: Tensor, returns: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean squared error to the λ-returns (report equation 3.1, right).

    Args:
        value: v of states 0 .. H−1, [H, B].
        returns: G_0 .. G_{H−1}, [H, B]; no gradient flows into them.
        weights: [H, 1] or [H, B], no gradient.
    """
    return (weights * (value - returns.detach()).square()).mean()
