"""Whether there is a GPU that the Triton kernels and their CUDA graphs can run on, or why not;
and what else has to be known of it before a kernel is loaded."""

from __future__ import annotations

import functools
import os

import torch

OLDEST = (8, 0)
"""Compute capability from which the kernels can run: it brought bfloat16 matrix instructions."""
OLDEST_TRITON = (3, 6)
"""The oldest that the kernels were tried with; older ones come with PyTorch 2.9 and before."""


def why_no_cuda() -> str | None:
    """Return why there is no CUDA device here, None where there is one."""
    if torch.cuda.is_available():
        return None
    built = "" if torch.version.cuda else "this PyTorch is built without CUDA; "
    return f"no usable NVIDIA GPU: {built}{driver_state()}"


def why_no_kernels(ordinal: int | None = None) -> str | None:
    """Return why Triton's kernels cannot run on a GPU, None where they can.

    Args:
        ordinal: of the CUDA device; None is the current one.
    """
    if reason := why_no_cuda():
        return reason
    if torch.version.hip:
        return f"this PyTorch is built for ROCm {torch.version.hip}, triton needs NVIDIA's CUDA"
    if ordinal is None:
        ordinal = torch.cuda.current_device()
    return _why_no_kernels(ordinal, os.environ.get("FASTDREAMER_GRAPH") != "0")


@functools.lru_cache
def _why_no_kernels(ordinal: int, graphs: bool) -> str | None:
    capability = torch.cuda.get_device_capability(ordinal)
    if capability < OLDEST:
        name = torch.cuda.get_device_name(ordinal)
        return (
            f"{name} is of compute capability {_dotted(capability)}, triton needs {_dotted(OLDEST)}"
        )
    if reason := _why_not_triton():
        return reason
    if not graphs:  # launched one by one, by Triton's own launcher
        return None
    try:
        from fastdreamer import _native
    except ImportError as error:
        return f"extension not built, it replays the CUDA graphs: {error}"
    try:
        _native.cuda_driver()
    except _native.DriverError as error:
        return str(error)
    return None


def _why_not_triton() -> str | None:
    try:
        from fastdreamer.ops.triton.tiles import triton_version

        version = triton_version()
    except ImportError:  # what is missing an op says itself, and how to install it
        return None
    if version >= OLDEST_TRITON:
        return None
    return f"Triton is {_dotted(version)}, the kernels need {_dotted(OLDEST_TRITON)} or newer"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def driver_state() -> str:
    """Return what there is of NVIDIA's driver in one line, or why it cannot be used."""
    try:
        from fastdreamer import _native
    except ImportError as error:
        return f"not known, the extension is missing: {error}"
    try:
        found = _native.cuda_driver()
    except _native.DriverError as error:
        return str(error)
    major, minor = found["version"]
    devices = "1 device" if found["devices"] == 1 else f"{found['devices']} devices"
    return f"{found['path']}, CUDA {major}.{minor}, {devices}"


def capturing(device: torch.device) -> bool:
    """Whether torch captures a CUDA graph on its current stream, so that nothing can be read."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
