"""The three losses: world model, actor, critic. Pure functions of tensors."""

from __future__ import annotations

from torch import Tensor

from fastdreamer.config import LossConfig
from fastdreamer.nn.dists import detach, kl_divergence
from fastdreamer.ops.params import Normal


def reward_loss(mean: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the predicted reward, both [T, B]."""
    return (mean - target).square().mean()


def kl_loss(
    post: Normal, prior: Normal, *, free_nats: float, balance: float | None
) -> tuple[Tensor, Tensor]:
    """The KL term of the evidence lower bound (report equation 2.1), with free nats.

    Without balancing max(mean KL(post ‖ prior), free_nats). With a balance α (DreamerV2)
    α·max(mean KL(sg(post) ‖ prior), free) + (1 − α)·max(mean KL(post ‖ sg(prior)), free).

    Args:
        post, prior: mean and std, [T, B, S].
        free_nats: the mean is not pushed below this.
        balance: α, or None.

    Returns:
        The loss, and the plain mean KL in nats (no gradient).
    """
    if balance is None:
        kl = kl_divergence(post, prior).mean()
        return kl.clamp(min=free_nats), kl.detach()
    to_prior = kl_divergence(detach(post), prior).mean()
    to_post = kl_divergence(post, detach(prior)).mean()
    loss = balance * to_prior.clamp(min=free_nats) + (1 - balance) * to_post.clamp(min=free_nats)
    return loss, to_prior.detach()


def model_loss(config: LossConfig, parts: dict[str, Tensor]) -> Tensor:
    """Σ scale · part over the parts present: image, state, reward, kl."""
    scales = {
        "image": config.image_scale,
        "state": config.state_scale,
        "reward": config.reward_scale,
        "kl": config.kl_scale,
    }
    return sum(scales[name] * part for name, part in parts.items())


def actor_loss(returns: Tensor, weights: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """−mean of the weighted λ-returns (report equation 3.1, left).

    Args:
        returns: G_0 .. G_{H−1}, [H, B], with gradient to the actor.
        weights: [H, 1], no gradient.
        scale: the returns are divided by it (return normalisation).
    """
    return -(weights * returns / scale).mean()


def critic_loss(value: Tensor, returns: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean squared error to the λ-returns (report equation 3.1, right).

    Args:
        value: v of states 0 .. H−1, [H, B].
        returns: G_0 .. G_{H−1}, [H, B]; no gradient flows into them.
        weights: [H, 1], no gradient.
    """
    return (weights * (value - returns.detach()).square()).mean()
