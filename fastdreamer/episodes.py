"""Where ``read_episode`` is imported from, too; see :mod:`fastdreamer.training.episodes`."""

from fastdreamer.training.episodes import read_episode

__all__ = ["read_episode"]
