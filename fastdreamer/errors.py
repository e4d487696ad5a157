"""The errors whose message is all that whoever asked needs: what is wrong, and what would work.

The command line prints them as one line; every other exception is a fault and keeps its traceback.
"""

from __future__ import annotations

import sys

_EXTRAS = {
    "train": (
        "PIL",
        "dm_control",
        "imageio_ffmpeg",
        "matplotlib",
        "mujoco",
        "nvtx",
        "rich",
        "safetensors",
        "tensorboard",
        "tyro",
    ),
    "gpu": ("triton",),
    "ray": ("ray",),
}
"""Modules of the extras in pyproject.toml."""


class FastdreamerError(Exception):
    """Base of all of them; the rooms raise classes of their own."""


class ArgumentError(FastdreamerError, ValueError):
    """A value that only its user could judge: a task, a file's name, an environment variable."""


def how_to_install(error: ImportError) -> str | None:
    """The remedy for a missing package that an extra brings; None where it is another one."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    module = (error.name or "").split(".")[0]
    for extra, modules in _EXTRAS.items():
        if module in modules:
            how = f"pip install 'fastdreamer[{extra}]'"
            if module == "dm_control" and sys.version_info >= (3, 13):
                # one of its needs has no wheel there, labmaze, which the suite does without
                how += " && pip install --no-deps 'dm_control>=1.0.50,<2'"
            return f"{error.name} is not installed: {how}"
    return None
