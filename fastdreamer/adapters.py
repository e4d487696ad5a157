"""Where ``adapt`` is imported from, too; see :mod:`fastdreamer.rollout.adapters`."""

from fastdreamer.rollout.adapters import adapt

__all__ = ["adapt"]
