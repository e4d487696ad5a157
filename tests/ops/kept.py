"""Eager's results, kept from one program to the next: they depend on no instruction set."""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fastdreamer import testing
from fastdreamer.testing import Exact


def keep_eager(folder: Path) -> None:
    """From here on ``testing.evaluate`` computes what is eager once a folder."""
    testing.evaluate = functools.partial(_evaluate, folder, testing.evaluate)


def _evaluate(
    folder: Path, evaluate: Callable, op: Callable, inputs: Mapping[str, Any], **options: Any
) -> dict[str, Tensor]:
    compute = functools.partial(evaluate, op, inputs, **options)
    if options["backend"] != "eager" or not op.__module__.startswith("fastdreamer.ops."):
        return compute()
    path = folder / _key(op, inputs, options)
    if options["dtype"] != torch.float64:
        return _kept(path, compute)
    return _KeptExact(path, compute)


class _KeptExact(Exact):
    """Results in float64 that are computed, and their spread, where no file has them."""

    def __init__(self, path: Path, compute: Callable[[], Exact]) -> None:
        dict.__init__(self, _kept(path, lambda: dict(compute())))
        self._path, self._compute = path, compute

    @functools.cached_property
    def spread(self) -> dict[str, float]:
        return _kept(self._path.with_suffix(".spread"), lambda: self._compute().spread)


def _kept(path: Path, compute: Callable[[], dict]) -> dict:
    if not path.exists():
        unfinished = path.with_suffix(".unfinished")
        torch.save(compute(), unfinished)
        os.replace(unfinished, path)
    return torch.load(path)


def _key(op: Callable, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """A name for all that the results depend on."""
    leaves, spec = tree_flatten(dict(inputs))
    about = op.__module__, op.__name__, str(spec), sorted(options.items()), torch.get_num_threads()
    digest = hashlib.sha256(repr(about).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(repr((leaf.dtype, leaf.shape, leaf.stride())).encode())
            leaf = leaf.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            digest.update(leaf)
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
