"""The three losses: world model, actor, critic. Pure functions of tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdreamer.config import LossConfig
from fastdreamer.nn.dists import detach, kl_divergence
from fastdreamer.ops.layers import symlog
from fastdreamer.ops.params import Latent, Readout


def head_error(outputs: Tensor, readout: Readout, target: Tensor) -> Tensor:
    """What a head's outputs [..., n] are off a number [...]: [...].

    The squared error, or with bins the cross-entropy in nats of their softmax to the weights of the
    two bins around the number, whose mean it is (two-hot; MuZero, DreamerV3). A head in
    symlog space is held to the number's symlog.
    """
    target = symlog(target) if readout.squashed else target
    if readout.bins is None:
        return (outputs[..., 0] - target).square()
    bins, log_probs = readout.bins.to(outputs), F.log_softmax(outputs, -1)
    above = torch.searchsorted(bins, target.contiguous()).clamp(1, len(bins) - 1)
    below = above - 1
    weight = ((target - bins[below]) / (bins[above] - bins[below])).clamp(0, 1)
    of = lambda index: log_probs.gather(-1, index.unsqueeze(-1)).squeeze(-1)  # noqa: E731
    return -(1 - weight) * of(below) - weight * of(above)


def reward_loss(outputs: Tensor, readout: Readout, target: Tensor) -> Tensor:
    """Mean error of the predicted reward, [T, B, n] and [T, B]."""
    return head_error(outputs, readout, target).mean()


def discount_loss(log_odds: Tensor, terminated: Tensor) -> Tensor:
    """Mean cross-entropy of the predicted continuation, in nats.

    Args:
        log_odds: that the episode goes on behind the state, [T, B].
        terminated: bool [T, B], whether it ended there (a time limit is no end).
    """
    return F.binary_cross_entropy_with_logits(log_odds, (~terminated).to(log_odds.dtype))


def kl_loss(
    post: Latent,
    prior: Latent,
    *,
    free_nats: float,
    balance: float | None,
    each: bool = False,
    mean: Callable[[Tensor], Tensor] = torch.mean,
) -> tuple[Tensor, Tensor]:
    """The KL term of the evidence lower bound (report equation 2.1), with free nats.

    Without balancing max(mean KL(post ‖ prior), free_nats). With a balance α (DreamerV2)
    α·max(mean KL(sg(post) ‖ prior), free) + (1 − α)·max(mean KL(post ‖ sg(prior)), free).

    Args:
        post, prior: mean and std, [T, B, S], or logits, [T, B, C, K].
        free_nats: the mean is not pushed below this.
        balance: α, or None.
        each: nor is the KL of any single state: the mean of max(KL, free_nats) then.
        mean: over the batch, where this is a part of one.

    Returns:
        The loss, and the plain mean KL in nats (no gradient).
    """

    def held(p: Latent, q: Latent) -> tuple[Tensor, Tensor]:
        """The mean KL, with its free nats and as it is."""
        kl = kl_divergence(p, q)
        nats = mean(kl)
        return mean(kl.clamp(min=free_nats)) if each else nats.clamp(min=free_nats), nats.detach()

    if balance is None:
        return held(post, prior)
    to_prior, nats = held(detach(post), prior)
    to_post, _ = held(post, detach(prior))
    return balance * to_prior + (1 - balance) * to_post, nats


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


def critic_loss(outputs: Tensor, readout: Readout, returns: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean error to the λ-returns (report equation 3.1, right).

    Args:
        outputs: of the critic in states 0 .. H−1, [H, B, n]; v itself where that is what they say.
        readout: how they say v.
        returns: G_0 .. G_{H−1}, [H, B]; no gradient flows into them.
        weights: [H, 1] or [H, B], no gradient.
    """
    return (weights * head_error(outputs, readout, returns.detach())).mean()
