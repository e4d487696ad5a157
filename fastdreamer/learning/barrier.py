"""The barrier, the actor's price and the multiplier; what they are for: ``acting/shield.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdreamer.acting.shield import Guard
from fastdreamer.config import SafetyConfig
from fastdreamer.learning.behavior import Dream
from fastdreamer.learning.learner import Learner, Losses
from fastdreamer.ops.layers import mlp


class BarrierLearner(Learner):
    """Optimiser ``barrier``, and a price in the loss of ``actor``."""

    def optimized(self) -> dict[str, tuple[nn.Module | None, float]]:
        return {"barrier": (self.agent.guard.barrier, self.agent.config.safety.lr)}

    def losses(self, batch: dict[str, Tensor], feat: Tensor, dream: Dream) -> Losses:
        """See :func:`barrier_losses`.

        Args:
            batch: whose ``state`` the safety signal judges. feat: [T, B, F], its states.
        """
        guard = self.agent.guard
        margin = torch.from_numpy(guard.signal(batch["state"].cpu().numpy()))
        with self.agent.autocast():
            return barrier_losses(
                guard, self.agent.config.safety, feat, margin.to(feat), dream.feat
            )

    def update_multiplier(self, found: Losses) -> None:
        """One step of dual ascent, by what was ``found`` missing."""
        update_multiplier(
            self.agent.guard, self.agent.config.safety, found.metrics["safety_shortfall"]
        )


def shortfall(barrier: Tensor, alpha: float) -> Tensor:
    """What is missing in B(next) ≥ (1 − α)·B(now), [H + 1, B] -> [H, B], at least 0."""
    return F.relu((1 - alpha) * barrier[:-1] - barrier[1:])


def sign_loss(barrier: nn.Module, hinge: float, feat: Tensor, margin: Tensor) -> Tensor:
    """Positive on safe states, negative on unsafe ones, each by a hinge and a mean of its own.

    With b = clamp(margin, −m, m), m ``safety.hinge``: mean over safe states of max(0, b − B) +
    mean over unsafe ones of max(0, B − b). What is demanded goes to 0 at the edge, so that the
    barrier crosses it as smoothly as the signal does.

    Args:
        barrier: B, feat -> 1. hinge: m.
        feat: [..., F] of states that were observed; no gradient flows into it.
        margin: [...], the safety signal there.
    """
    value = barrier(feat.detach()).squeeze(-1).float()
    safe = margin > 0
    bound = margin.clamp(-hinge, hinge)
    miss = F.relu(torch.where(safe, bound - value, value - bound))
    mean = lambda mask: (miss * mask).sum() / mask.sum().clamp(min=1)  # noqa: E731
    return mean(safe) + mean(~safe)


def barrier_losses(
    guard: Guard, config: SafetyConfig, seen: Tensor, margin: Tensor, imagined: Tensor
) -> Losses:
    """What barrier and actor learn from one update.

    Args:
        seen: [T, B, F], states that were observed. margin: [T, B], their safety signal.
        imagined: [H + 1, N, F], states 0..H of the actor's imagination.

    Returns:
        ``barrier``, which reaches nothing but the barrier, and for ``actor`` the price ν·(mean
        shortfall), which reaches it through the states alone.
    """
    value = guard.barrier(imagined.detach()).squeeze(-1).float()
    step = shortfall(value, config.alpha).mean()
    sign = sign_loss(guard.barrier, config.hinge, seen, margin)
    loss = sign + config.step_scale * step
    frozen = mlp(guard.barrier.params().detach(), imagined).squeeze(-1).float()
    missing = shortfall(frozen, config.alpha).mean()
    # Without a step there is no price either, whatever it had come to when the run was told so.
    multiplier = guard.multiplier.clone() if config.multiplier_lr else missing.new_zeros(())
    price = multiplier * missing
    metrics = {
        "barrier_loss": loss,
        "barrier_sign_loss": sign,
        "safety_shortfall": missing,
        "safety_multiplier": multiplier,
        "unsafe_share": (margin <= 0).float().mean(),
    }
    return Losses({"actor": price, "barrier": loss}, metrics)


def update_multiplier(guard: Guard, config: SafetyConfig, missing: Tensor) -> None:
    """One step of dual ascent: ν ← clamp(ν + lr·(missing − limit), 0, max)."""
    step = config.multiplier_lr * (missing.detach() - config.limit)
    guard.multiplier.add_(step).clamp_(0, config.multiplier_max)
