"""Where acting takes its random numbers from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Source = torch.Generator | Sequence[torch.Generator]
"""One generator for a whole batch, or one a row, which then draws what it would draw alone."""


def normal(source: Source, *shape: int, dim: int = 0) -> Tensor:
    """Standard normal numbers on the CPU, float32.

    Args:
        source: one generator, or as many as there are rows along ``dim``.
        shape: of the result.
        dim: the batch's dimension.

    Raises:
        ValueError: another number of generators than of rows.
    """
    if isinstance(source, torch.Generator):
        return torch.randn(shape, generator=source)
    if len(source) != shape[dim]:
        raise ValueError(f"{len(source)} generators for a batch of {shape[dim]}")
    row = (*shape[:dim], 1, *shape[dim + 1 :])
    return torch.cat([torch.randn(row, generator=generator) for generator in source], dim)
