"""What PyTorch keeps to itself and the ops have to ask: one function each, which falls back on what
is public where a version of PyTorch has it no more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef

_transforms = getattr(torch._C, "_are_functorch_transforms_active", None)
_storage_expired = getattr(torch.UntypedStorage, "_expired", None)


def transforms_active(tensors: Iterable[Tensor]) -> bool:
    """Whether a transform of ``torch.func`` is active; the fallback sees one by these tensors."""
    if _transforms is not None:
        return _transforms()
    return any(_wrapped(tensor) for tensor in tensors)


def _wrapped(tensor: Tensor) -> bool:
    try:
        tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a transform's tensor has no memory of its own
        return tensor.layout is torch.strided
    return False


def forward_mode() -> bool:
    """Whether a level of ``torch.autograd.forward_ad`` is open."""
    level = getattr(forward_ad, "_current_level", None)
    if level is not None:
        return level >= 0
    nothing = torch.zeros(())
    try:
        forward_ad.make_dual(nothing, nothing)
    except RuntimeError:  # which wants a level
        return False
    return True


def expired(storages: Sequence[StorageWeakRef]) -> bool:
    """Whether any of these storages is gone; called with every native op, so it is quick."""
    if _storage_expired is not None:
        return any([_storage_expired(storage.cdata) for storage in storages])
    return any([storage.expired() for storage in storages])
