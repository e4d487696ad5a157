"""Named ranges for NVIDIA's profilers, by what a PyTorch built for CUDA brings for them."""

from __future__ import annotations

import contextlib

import torch


def annotate(name: str) -> contextlib.AbstractContextManager[None]:
    """A range of that name around what is inside; nothing with a PyTorch that has no CUDA."""
    return torch.cuda.nvtx.range(name) if torch.version.cuda else contextlib.nullcontext()
