"""Noise of our choice in somebody else's random draws, so that two loops can be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_STANDARD = {_aten.randn, _aten.randn_like}
_SCALED = {_aten.normal, _aten.normal_, _aten.normal_functional}

Result = TypeVar("Result")


def with_noise(function: Callable[[], Result], *noises: Tensor) -> Result:
    """Call a function with given noise in the place of what it draws from Normals.

    A draw's last size n says which noise [T, B, n] it belongs to. One of B·n numbers is a step's
    (with k such draws a step each gets that step's numbers), one of T·B·n is the whole
    ([B, T, n], too). Noises of one n take turns within a step, in the order given. The function is
    called twice, the first time to count its draws, and must draw alike. The generators' states are
    as before.

    Args:
        function: without arguments. ``torch.randn``, ``randn_like``, ``normal`` and ``normal_`` are
            served, in scripts and in ``torch.distributions``, too; means and standard deviations
            are applied.
        noises: [T, B, n] standard normal each.

    Returns:
        What its second call returned.

    Raises:
        ValueError: it draws something else, or in a number that does not fit T steps.
    """
    cuda = [noises[0].device] if noises[0].is_cuda else []
    with torch.random.fork_rng(cuda):
        with torch.no_grad(), _Draws(noises) as counted:
            function()
        with _Draws(noises, counted.made):
            return function()


def relative_difference(got: Tensor, want: Tensor) -> float:
    """The norm of the difference, by the norm of what is wanted."""
    return float((got - want).norm()) / max(float(want.norm()), 1e-30)


def tolerance(like: Tensor) -> float:
    """What two loops of a few steps may differ by: rounding, not a constant read wrong."""
    return 200 * torch.finfo(like.dtype).eps


class _Draws(TorchDispatchMode):
    """Counts the draws of single steps by n, or serves them where their number is known."""

    def __init__(self, noises: tuple[Tensor, ...], total: dict[int, int] | None = None) -> None:
        super().__init__()
        self.total, self.made = total, {}
        self.noises: dict[int, list[Tensor]] = {}
        for noise in noises:
            self.noises.setdefault(noise.shape[-1], []).append(noise)
        for n, count in (total or {}).items():
            wanted = sum(map(len, self.noises[n]))
            if count % wanted:
                raise ValueError(
                    f"it drew {count} times {n} numbers a row, no multiple of {wanted}"
                )

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        drawn = op(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded not in op.tags:
            return drawn
        packet = op.overloadpacket
        if packet not in _STANDARD | _SCALED:
            raise ValueError(f"it drew by {packet}, which gives no normal noise")
        noise = self._of(drawn)
        if packet in _SCALED:
            names = [argument.name for argument in op._schema.arguments]
            given = {"mean": 0.0, "std": 1.0} | dict(zip(names, args, strict=False)) | kwargs
            noise = given["mean"] + given["std"] * noise
        return drawn.copy_(noise)

    def _of(self, drawn: Tensor) -> Tensor:
        """The noise of a draw, in its shape."""
        n = drawn.shape[-1] if drawn.ndim else 0
        noises = self.noises.get(n, [])
        whole = [noise for noise in noises if noise.numel() == drawn.numel() and len(noise) > 1]
        if whole:
            batch_first = whole[0].transpose(0, 1)
            fits = batch_first if drawn.shape == batch_first.shape else whole[0]
            return fits.reshape(drawn.shape)
        if not noises or noises[0][0].numel() != drawn.numel():
            sizes = " or ".join(str(list(x.shape)) for parts in self.noises.values() for x in parts)
            raise ValueError(f"it drew {list(drawn.shape)} numbers, but has noise for {sizes}")
        index = self.made.get(n, 0)
        self.made[n] = index + 1
        if self.total is None:
            return torch.zeros_like(drawn)
        alike = self.total[n] // (len(noises) * len(noises[0]))
        step, place = divmod(index // alike, len(noises))
        return noises[place][step].reshape(drawn.shape)
