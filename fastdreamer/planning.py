"""Where ``plan`` is imported from, too; see :mod:`fastdreamer.acting.planning`."""

from fastdreamer.acting.planning import plan

__all__ = ["plan"]
