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
_UNIFORM = {_aten.rand, _aten.rand_like}

Result = TypeVar("Result")


def with_noise(
    function: Callable[[], Result], *noises: Tensor, uniform: Tensor | None = None
) -> Result:
    """Call a function with given noise in the place of what it draws.

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
        uniform: [T, B, C] in [0, 1) for ``torch.rand``, ``rand_like`` and the classes that
            ``torch.multinomial`` (and ``torch.distributions`` by it) draws one of a row.

    Returns:
        What its second call returned.

    Raises:
        ValueError: it draws something else, or in a number that does not fit T steps.
    """
    drawn = (*noises, *(() if uniform is None else (uniform,)))
    with torch.random.fork_rng([drawn[0].device] if drawn[0].is_cuda else []):
        with torch.no_grad(), _Draws(noises, uniform) as counted:
            function()
        with _Draws(noises, uniform, counted.made):
            return function()


def relative_difference(got: Tensor, want: Tensor) -> float:
    """The norm of the difference, by the norm of what is wanted."""
    return float((got - want).norm()) / max(float(want.norm()), 1e-30)


def tolerance(like: Tensor) -> float:
    """What two loops of a few steps may differ by: rounding, not a constant read wrong."""
    return 200 * torch.finfo(like.dtype).eps


class _Draws(TorchDispatchMode):
    """Counts the draws of single steps by kind, or serves them where their number is known.

    A kind is n of normal noise, 0 of uniform noise.
    """

    def __init__(
        self,
        noises: tuple[Tensor, ...],
        uniform: Tensor | None,
        total: dict[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.total, self.made = total, {}
        self.noises: dict[int, list[Tensor]] = {} if uniform is None else {0: [uniform]}
        for noise in noises:
            self.noises.setdefault(noise.shape[-1], []).append(noise)
        for n, count in (total or {}).items():
            wanted = sum(map(len, self.noises[n]))
            if count % wanted:
                what = f"{n} numbers a row" if n else "uniform noise"
                raise ValueError(f"it drew {count} times {what}, no multiple of {wanted}")

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        drawn = op(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded not in op.tags:
            return drawn
        packet = op.overloadpacket
        if packet is _aten.multinomial and drawn.shape[-1] == 1 and 0 in self.noises:
            cumulative = (args[0] / args[0].sum(-1, keepdim=True)).cumsum(-1)
            below = (cumulative <= self._of(drawn.to(cumulative.dtype), 0)).sum(-1, keepdim=True)
            return below.clamp(max=cumulative.shape[-1] - 1)
        if packet in _UNIFORM and 0 in self.noises:
            return drawn.copy_(self._of(drawn, 0))
        if packet not in _STANDARD | _SCALED:
            raise ValueError(f"it drew by {packet}, which has no noise here")
        noise = self._of(drawn, drawn.shape[-1] if drawn.ndim else 0)
        if packet in _SCALED:
            names = [argument.name for argument in op._schema.arguments]
            given = {"mean": 0.0, "std": 1.0} | dict(zip(names, args, strict=False)) | kwargs
            noise = given["mean"] + given["std"] * noise
        return drawn.copy_(noise)

    def _of(self, drawn: Tensor, n: int) -> Tensor:
        """The noise of a draw of this kind, in its shape."""
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
