"""Ranks: the processes that learn together, each from its part of every batch.

They hold the same weights, draw the same noise and take their own columns of it. What follows from
the whole batch they agree on: gradients, the means that a loss bends, the range of the returns. So
they learn what one process would, up to the rounding of sums.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdreamer.errors import FastdreamerError


class RankError(FastdreamerError, RuntimeError):
    """An exchange with the other ranks failed; most often one of them is gone."""


_GONE = re.compile(
    r"connection|by peer|remote (peer|process|server)|socket|broken pipe|timed out|timeout|"
    r"ncclRemoteError|ncclSystemError",
    re.IGNORECASE,
)
"""What torch.distributed says of a process that it hears no more from: it has no type for it."""


class Ranks:
    """One of ``size`` processes of torch.distributed's default group.

    Every method is called by all of them, in the same order; of one alone it is what its name says
    of a tensor. Raises RankError where an exchange fails.

    Args:
        rank: 0..size − 1; 0 has replay, collector, logs and checkpoints.
        size: how many, each with as many sequences of a batch.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.apart = False  # others may be at another exchange, and can be told nothing

    def mean(self, x: Tensor) -> Tensor:
        """The mean over everybody's elements, []. Its gradient is that of the own ones' mean, since
        gradients are averaged over ranks in turn."""
        return x.mean() if self.size == 1 else _AgreedMean.apply(x.mean(), self)

    def gather(self, x: Tensor) -> Tensor:
        """Everybody's [n, ...] one behind the other, [size·n, ...]; no gradient."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with together():
            dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def exchange(
        self, params: Iterable[nn.Parameter], *tables: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], ...]:
        """Put the means over ranks into the gradients of parameters.

        Args:
            tables: scalars by name, in the same exchange.

        Returns:
            The tables' means; no gradient, but where one process is all.
        """
        if self.size == 1:
            return tables
        learned = [p for p in params if p.grad is not None]
        values = [value.detach().float().reshape(1) for table in tables for value in table.values()]
        # Copied as it lies, and put back so: an optimiser's kernels ask for a parameter's strides.
        assert all(_is_dense(p.grad) for p in learned)
        memory = [p.grad.as_strided((p.numel(),), (1,)) for p in learned]
        flat = torch.cat(memory + values)
        with together():
            dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([x.numel() for x in memory + values])
        for p, part in zip(learned, parts, strict=False):
            p.grad = part.as_strided(p.grad.shape, p.grad.stride())
        means = iter(parts[len(learned) :])
        return tuple({name: next(means)[0] for name in table} for table in tables)

    def own(self, noise: Tensor, sequences: int) -> Tensor:
        """This rank's rows of what was drawn for all.

        Args:
            noise: [..., T·size·sequences, n], T of 1 included: for every step the first rank's
                sequences, then the second's, and so on.

        Returns:
            [..., T·sequences, n]
        """
        if self.size == 1:
            return noise
        by_rank = noise.unflatten(-2, (-1, self.size, sequences))
        return by_rank[..., self.rank, :, :].flatten(-3, -2).contiguous()  # native asks for it


ALONE = Ranks()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around an exchange: what torch.distributed says of it becomes a RankError.

    Gloo raises RuntimeError itself, the rest a DistError. What else is one, memory that does not
    suffice among it, is this process's own and passes.
    """
    try:
        yield
    except RuntimeError as error:
        if type(error) is not RuntimeError and not isinstance(error, dist.DistError):
            raise
        what = "an exchange with the other processes of the learner failed"
        if _GONE.search(str(error)):
            what = "another process of the learner is gone"
        raise RankError(f"{what} ({error})") from error


def _is_dense(x: Tensor) -> bool:
    """Whether its elements lie in its memory without gaps, in whatever order."""
    return 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) == x.numel()


class _AgreedMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, ranks: Ranks) -> Tensor:
        value = value.clone()
        with together():
            dist.all_reduce(value)
        return value / ranks.size

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
