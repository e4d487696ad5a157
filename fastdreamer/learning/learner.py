"""What the learners have in common: one a loss family, over the networks of one agent."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fastdreamer.acting.policy import Policy
from fastdreamer.learning.ranks import Ranks


class Losses(NamedTuple):
    """What a learner makes of a batch or of a dream."""

    named: dict[str, Tensor]
    """Each by the optimiser whose parameters it reaches, and no other's: one backward pass serves
    all."""
    metrics: dict[str, Tensor]
    """What is logged of them, losses included."""
    parts: dict[str, Tensor] = {}
    """Terms of a loss, by which one that is not finite is told."""

    def beside(self, other: Losses) -> Losses:
        """Both; losses that reach the same parameters are added."""
        named = dict(self.named)
        for name, loss in other.named.items():
            named[name] = named[name] + loss if name in named else loss
        return Losses(named, self.metrics | other.metrics, self.parts | other.parts)


class Learner:
    """Teaches some networks of an agent.

    Args:
        agent: whose networks, and settings.
        ranks: who learns each a part of a batch.
    """

    def __init__(self, agent: Policy, ranks: Ranks) -> None:
        self.agent, self.ranks = agent, ranks

    def optimized(self) -> dict[str, tuple[nn.Module | None, float]]:
        """Networks, one an optimiser, by its name, and their learning rates; None: without."""
        raise NotImplementedError
