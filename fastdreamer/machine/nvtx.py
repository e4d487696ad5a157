"""Named ranges for NVIDIA's profilers: ``annotate(name)``, a context manager.

Of the ``nvtx`` package, which extra ``train`` brings. A GPU machine where nothing can be installed
may lack it: there PyTorch's own ranges, the same to a profiler, stand in.
"""

from __future__ import annotations

import contextlib

import torch

try:
    from nvtx import annotate
except ImportError:

    def annotate(name: str) -> contextlib.AbstractContextManager[None]:  # type: ignore[misc]
        """A range of that name; nothing with a PyTorch that has no CUDA."""
        return torch.cuda.nvtx.range(name) if torch.version.cuda else contextlib.nullcontext()


__all__ = ["annotate"]
