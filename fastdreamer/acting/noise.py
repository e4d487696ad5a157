"""Where acting takes its random numbers from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdreamer.ops.params import RSSMParams, noise_of

Source = torch.Generator | Sequence[torch.Generator]
"""One generator for a whole batch, or one a row, which then draws what it would draw alone."""


def one_by_one(source: Source, rows: int) -> list[Source]:
    """The sources of single rows, where the rows have one each; none where they share one.

    Such rows are environments of their own, and libraries round a row by what is beside it: what is
    not an op is computed row by row there.

    Raises:
        ValueError: another number of generators than of rows.
    """
    if isinstance(source, torch.Generator):
        return []
    if len(source) != rows:
        raise ValueError(f"{len(source)} generators for a batch of {rows}")
    return [[generator] for generator in source]


def normal(source: Source, *shape: int, dim: int = 0) -> Tensor:
    """Standard normal numbers on the generator's device, float32.

    Args:
        source: one generator, or as many as there are rows along ``dim``.
        shape: of the result.
        dim: the batch's dimension.

    Raises:
        ValueError: another number of generators than of rows.
    """
    return _draw(torch.randn, source, shape, dim)


def latent(params: RSSMParams, source: Source, *lead: int, dim: int = 0) -> Tensor:
    """The noise of latent samples as the ops take it, [*lead, n]; else as :func:`normal`."""
    size, draw = noise_of(params.latent)
    return _draw(draw, source, (*lead, params.dims()[size]), dim)


def _draw(draw: Callable[..., Tensor], source: Source, shape: tuple[int, ...], dim: int) -> Tensor:
    each = one_by_one(source, shape[dim])
    if not each:
        return draw(shape, generator=source, device=source.device)
    row = (*shape[:dim], 1, *shape[dim + 1 :])
    return torch.cat([_draw(draw, generator, row, dim) for (generator,) in each], dim)
