"""How modules are asked what they compute: on a few numbers, and so that they notice nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from fastdreamer.rollout.draws import apart


def parts_of(module: nn.Module) -> list[nn.Module]:
    """The modules within, itself included, but for those that compute parametrized tensors."""
    parts = list(nn.Module.modules(module))  # whatever it keeps by that name
    computing = {id(part) for found in parts for part in _computing(found)}
    return [part for part in parts if id(part) not in computing]


def _computing(module: nn.Module) -> Iterator[nn.Module]:
    return module.modules() if isinstance(module, ParametrizationList) else iter(())


@contextlib.contextmanager
def still(*modules: nn.Module) -> Iterator[None]:
    """With what parametrizes their tensors as in evaluation: in training spectral_norm's estimate
    moves with every look at the weight, and two looks differ."""
    parts = {
        id(part): (part, part.training)
        for module in modules
        for found in nn.Module.modules(module)
        for part in _computing(found)
    }
    for part, _ in parts.values():
        part.training = False
    try:
        yield
    finally:
        for part, training in parts.values():
            part.training = training


@contextlib.contextmanager
def asking(like: Tensor, *modules: nn.Module) -> Iterator[None]:
    """Around calls of somebody's modules that are to leave no trace: no gradient, no number of the
    generators or of noise that is being served, no buffer changed. Outside of autocast.

    Args:
        like: a tensor of their device.
    """
    found = [part for module in modules for part in nn.Module.modules(module)]
    held = [
        (part._buffers, name, buffer, buffer.clone())
        for part in found
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    alone = torch.random.fork_rng([like.device] if like.is_cuda else [])
    plain = torch.autocast(like.device.type, enabled=False)
    with alone, apart(), torch.no_grad(), plain, still(*modules):
        try:
            yield
        finally:
            for buffers, name, buffer, before in held:
                if buffers[name] is not buffer:
                    buffers[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def normals(like: Tensor) -> Callable[..., Tensor]:
    """What draws the same standard normals of given sizes at each time, of a dtype and device."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        # the caller's default device may be another than the generator's
        given = {"generator": generator, "device": "cpu", "dtype": torch.float32}
        return torch.randn(sizes, **given).to(like)

    return draw


def is_coarse(like: Tensor) -> bool:
    """Whether rounding in its dtype would hide a constant that was read wrong."""
    return torch.finfo(like.dtype).eps > torch.finfo(torch.float32).eps
