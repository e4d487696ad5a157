"""Checkpoints: one safetensors file each, written atomically, self-contained, never unpickled.

A checkpoint holds what a run needs to go on, a snapshot the agent's weights alone. A file holds
named tensors and, in its metadata, one JSON document (configuration, counters, random generators).
It appears under its name only when it is complete and on the disk.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdreamer.errors import FastdreamerError
from fastdreamer.files import make_directory, replacing

FORMAT = "fastdreamer-checkpoint-1"
_NAME = re.compile(r"checkpoint-(\d{9})\.safetensors")
_SNAPSHOT = re.compile(r"snapshot-(\d{9})\.safetensors")
_log = logging.getLogger("fastdreamer")


class CheckpointError(FastdreamerError, RuntimeError):
    """A checkpoint is missing, damaged or foreign; the message names the file."""


def runs_in(folder: Path) -> list[Path]:
    """The run directories that are straight in a folder."""
    return sorted(config.parent for config in folder.glob("*/config.json"))


def runs_within(folder: Path) -> str:
    """What to add where a run is asked for and a folder of several is given; else nothing."""
    runs = ", ".join(map(str, runs_in(folder)))
    return f"; it is a folder of runs, name one of them: {runs}" if runs else ""


def checkpoint_path(directory: Path, update: int) -> Path:
    """The name of the checkpoint after so many updates."""
    return directory / f"checkpoint-{update:09d}.safetensors"


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints in a directory, oldest first; unfinished files are not among them."""
    if not directory.is_dir():
        return []
    return sorted(p for p in directory.iterdir() if _NAME.fullmatch(p.name))


def snapshot_path(directory: Path, env_frames: int) -> Path:
    """The name of the snapshot after so many env frames."""
    return directory / f"snapshot-{env_frames:09d}.safetensors"


def list_snapshots(directory: Path) -> dict[int, Path]:
    """Snapshots in a directory by their env frames, oldest first."""
    if not directory.is_dir():
        return {}
    found = [(m, p) for p in directory.iterdir() if (m := _SNAPSHOT.fullmatch(p.name))]
    return dict(sorted((int(m[1]), p) for m, p in found))


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint; see :func:`fastdreamer.files.replacing`.

    Args:
        path: final name.
        tensors: by name; copied to the CPU.
        meta: JSON values.
    """
    make_directory(path.parent)
    cpu = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    text = json.dumps(meta)
    metadata = {"format": FORMAT, "crc32": str(_crc(cpu, text)), "meta": text}
    with replacing(path) as temporary:
        save_file(cpu, temporary, metadata=metadata)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify a checkpoint.

    Returns:
        Tensors by name, on the CPU, and the JSON document.

    Raises:
        CheckpointError: missing, damaged, or not a fastdreamer checkpoint.
    """
    with _opened(path) as (file, metadata):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = metadata["meta"]
        if _crc(tensors, text) != int(metadata["crc32"]):
            raise CheckpointError(f"{path}: damaged checkpoint (checksum differs)")
        return tensors, json.loads(text)


def load_meta(path: Path) -> dict[str, Any]:
    """The JSON document of a checkpoint; damage behind the file's header goes unnoticed.

    Raises:
        CheckpointError: missing, damaged, or not a fastdreamer checkpoint.
    """
    with _opened(path) as (_, metadata):
        return json.loads(metadata["meta"])


def checksum(path: Path) -> str:
    """Of a checkpoint's tensors and document, as the file has it: another one is another file.

    Raises:
        CheckpointError: see ``load_meta``.
    """
    with _opened(path) as (_, metadata):
        return metadata["crc32"]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """An open checkpoint and its metadata; what is wrong with it becomes a CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path}: not a fastdreamer checkpoint ({FORMAT})")
            yield file, metadata
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged checkpoint ({error})") from error


def load_newest(directory: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint that can be read; damaged ones are named in the log and skipped.

    Returns:
        Path, tensors and JSON document; None where there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    paths = list_checkpoints(directory)
    for path in reversed(paths):
        try:
            return path, *load_checkpoint(path)
        except CheckpointError as error:
            _log.warning("%s; trying the one before", error)
    if paths:
        raise CheckpointError(f"{directory}: every checkpoint is damaged")
    return None


def prune(directory: Path, newest: Path, keep: int) -> list[Path]:
    """Delete unfinished files and all checkpoints but ``newest`` and the ``keep - 1`` before it.

    What claims to be newer is damaged: loading passed it over. It must not take the place of a
    good one.

    Returns:
        The checkpoints kept.
    """
    paths = list_checkpoints(directory)
    end = paths.index(newest) + 1
    kept = paths[max(0, end - keep) : end]
    for path in [*set(paths).difference(kept), *directory.glob(".tmp-*-checkpoint-*")]:
        path.unlink(missing_ok=True)
    return kept


def thin(directory: Path, every: int, keep: int) -> list[Path]:
    """Delete snapshots until at most ``keep`` are left, spread evenly over the run.

    The spacing starts at ``every`` env frames and doubles while there are too many, so it depends
    on how far the run has come and on nothing else. The newest always stays.

    Returns:
        The snapshots kept.
    """
    paths = list_snapshots(directory)
    newest = max(paths, default=0)
    kept, step = set(paths), max(every, 1)
    while len(kept) > keep:  # ends: with a step past the newest, only that one is left
        first_of = {frames // step: frames for frames in sorted(paths, reverse=True)}
        first_of.pop(0, None)  # before the first multiple
        kept = {*first_of.values(), newest}
        step *= 2
    for frames in set(paths).difference(kept):
        paths.pop(frames).unlink(missing_ok=True)
    return list(paths.values())


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An Adam's state as tensors named ``<parameter index>.<key>``."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": value for i, slot in state.items() for key, value in slot.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of ``flatten_optimizer``; learning rates stay those of the optimiser.

    A file keeps no strides. Fused kernels walk the memory of a parameter and of its moments side by
    side, so what has a parameter's shape gets its strides back (convolutions are channels_last).
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".")
        param = params[int(index)]
        if value.shape == param.shape:
            value = value.new_empty_strided(param.shape, param.stride()).copy_(value)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _crc(tensors: Mapping[str, Tensor], text: str) -> int:
    crc = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
    return crc
