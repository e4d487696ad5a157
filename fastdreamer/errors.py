"""The errors whose message is all that whoever asked needs: what is wrong, and what would work.

The command line prints them as one line; every other exception is a fault and keeps its traceback.
"""

from __future__ import annotations

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
}
"""Modules of the extras in pyproject.toml."""


class FastdreamerError(Exception):
    """Base of all of them; the rooms raise classes of their own."""


class ArgumentError(FastdreamerError, ValueError):
    """A value that only its user could judge: a task, a file's name, an environment variable."""


def how_to_install(error: ImportError) -> str | None:
    """The remedy for a missing package that an extra brings; None where it is another one."""
    for extra, modules in _EXTRAS.items():
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in modules:
            return f"{error.name} is not installed: pip install 'fastdreamer[{extra}]'"
    return None
