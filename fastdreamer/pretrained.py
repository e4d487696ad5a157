"""Trained agents that come with the package, by name; how a run's agent becomes such a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdreamer.checkpoint import CheckpointError, load_checkpoint, load_newest, save_checkpoint

_SHIPPED = Path(__file__).parent / "data"
_KEPT = ("version", "config", "architecture", "obs_shapes", "action_dim", "cursor")
"""Of a checkpoint's document, what is said of an agent; of its cursor, how long it has learned."""


def pretrained() -> dict[str, Path]:
    """The files of the trained agents that come with the package, by the name ``load`` takes."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.safetensors"))}


def find_agent(run_or_file: str | os.PathLike) -> Path:
    """A path as it is; the name of an agent that comes with the package, where no file has it, as
    the path of its file.

    Raises:
        CheckpointError: neither.
    """
    path, shipped = Path(run_or_file), pretrained()
    if path.exists():
        return path
    if str(run_or_file) in shipped:
        return shipped[str(run_or_file)]
    names = ", ".join(shipped) or "none"
    raise CheckpointError(
        f"{path}: no such run or checkpoint (agents that come with fastdreamer: {names})"
    )


def read_agent(
    run_or_file: str | os.PathLike,
) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The newest checkpoint of a run, a checkpoint or snapshot, or an agent of the package by name.

    Returns:
        Its file, its tensors by name and its JSON document.

    Raises:
        CheckpointError: there is none, or it is damaged or foreign.
    """
    path = find_agent(run_or_file)
    if not path.is_dir():
        return path, *load_checkpoint(path)
    found = load_newest(path / "checkpoints")
    if found is None:
        raise CheckpointError(f"{path} holds no checkpoint yet")
    return found


def export_agent(run_or_file: str | os.PathLike, out: Path, *, half: bool = True) -> Path:
    """Write an agent's weights alone, without optimisers and replay.

    Args:
        run_or_file: run directory (its newest checkpoint), checkpoint or snapshot.
        out: the file; ``load`` reads it.
        half: as float16, half the size (``load`` computes in float32 from them); else float32.

    Raises:
        CheckpointError: no checkpoint, or a weight that float16 cannot hold.
    """
    path, tensors, meta = read_agent(run_or_file)
    weights = {name: value for name, value in tensors.items() if name.startswith("agent/")}
    if half:
        for name, value in weights.items():
            weights[name] = value.half()
            if not torch.isfinite(weights[name]).all():
                raise CheckpointError(f"{path}: {name} does not fit float16; export it in float32")
    about = {name: meta[name] for name in _KEPT if name in meta}
    about["cursor"] = {name: about["cursor"][name] for name in ("update", "env_frames")}
    save_checkpoint(out, weights, about)
    return out
