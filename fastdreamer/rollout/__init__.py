"""The fast rollout in other people's Dreamer code: :class:`Rollout`, and :func:`adapt` for peers.

Needs torch and numpy alone.
"""

from fastdreamer.ops.params import Categorical, Readout, StdTransform, two_hot
from fastdreamer.rollout.adapters import adapt
from fastdreamer.rollout.layers import Joined, MisfitError
from fastdreamer.rollout.rollout import Rollout
from fastdreamer.rollout.verify import Verification

__all__ = [
    "Categorical",
    "Joined",
    "MisfitError",
    "Readout",
    "Rollout",
    "StdTransform",
    "Verification",
    "adapt",
    "two_hot",
]
