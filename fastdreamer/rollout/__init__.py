"""The fast rollout in other people's Dreamer code: :class:`Rollout`, and :func:`adapt` for peers.

Needs torch and numpy alone.
"""

from fastdreamer.ops.params import Categorical, StdTransform
from fastdreamer.rollout.adapters import adapt
from fastdreamer.rollout.layers import MisfitError
from fastdreamer.rollout.rollout import Rollout
from fastdreamer.rollout.verify import Verification

__all__ = ["Categorical", "MisfitError", "Rollout", "StdTransform", "Verification", "adapt"]
