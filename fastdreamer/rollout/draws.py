"""Noise of our choice in somebody else's random draws, so that two loops can be compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_STANDARD = {_aten.randn, _aten.randn_like}
_SCALED = {_aten.normal, _aten.normal_, _aten.normal_functional}
_UNIFORM = {_aten.rand, _aten.rand_like, _aten.uniform_}
_EXPONENTIAL = {_aten.exponential_, _aten.exponential}

Result = TypeVar("Result")
Kind = tuple[str, int]

_depth: ContextVar[int] = ContextVar("depth", default=0)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Within, what is drawn is no part of the function that :func:`with_noise` is calling."""
    told = _depth.set(_depth.get() + 1)
    try:
        yield
    finally:
        _depth.reset(told)


def with_noise(
    function: Callable[[], Result],
    *normal: Tensor,
    uniform: Sequence[Tensor] = (),
    gumbel: Sequence[Tensor] = (),
) -> Result:
    """Call a function with given noise in the place of what it draws.

    A draw's last size n says which normal noise [T, B, n] it belongs to; uniform numbers and
    Gumbels are told by how many are drawn. One of B·n numbers is a step's (with k such draws a step
    each gets that step's numbers), one of T·B·n is the whole ([B, T, n], too). Noises of one n take
    turns within a step, in the order given. The function is called twice, the first time to count
    its draws, and must draw alike. The generators' states are as before.

    Args:
        function: without arguments. ``torch.randn``, ``randn_like``, ``normal`` and ``normal_`` are
            served, in scripts and in ``torch.distributions``, too; means and standard deviations
            are applied.
        normal: [T, B, n] standard normal each.
        uniform: [T, B, n] in [0, 1) each, for ``torch.rand``, ``rand_like``, ``uniform_`` and the
            classes that ``torch.multinomial`` (and ``torch.distributions`` by it) draws one of a
            row.
        gumbel: [T, B, n] standard Gumbel each, for the exponential numbers e that become Gumbels
            −log e, as in ``torch.nn.functional.gumbel_softmax``.

    Returns:
        What its second call returned.

    Raises:
        ValueError: it draws something else, or in a number that does not fit T steps.
    """
    noises: dict[Kind, list[Tensor]] = {}
    for noise in normal:
        noises.setdefault(("normal", noise.shape[-1]), []).append(noise)
    for name, given in (("uniform", uniform), ("gumbel", gumbel)):
        for noise in given:
            noises.setdefault((name, noise[0].numel()), []).append(noise)
    device = next(iter(noises.values()))[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
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
    """Counts the draws of single steps by kind, or serves them where their number is known."""

    def __init__(
        self, noises: dict[Kind, list[Tensor]], total: dict[Kind, int] | None = None
    ) -> None:
        super().__init__()
        self.noises, self.total, self.made = noises, total, {}
        self.depth = _depth.get()
        for kind, count in (total or {}).items():
            name, n = kind
            wanted = sum(map(len, self.noises[kind]))
            if count % wanted:
                what = f"{n} numbers a row" if name == "normal" else f"{name} noise"
                raise ValueError(f"it drew {count} times {what}, no multiple of {wanted}")

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        drawn = op(*args, **kwargs)
        if _depth.get() > self.depth:
            return drawn
        if torch.Tag.nondeterministic_seeded not in op.tags:
            return drawn
        packet, served = op.overloadpacket, {name for name, _ in self.noises}
        if packet is _aten.multinomial and drawn.shape[-1] == 1 and "uniform" in served:
            cumulative = (args[0] / args[0].sum(-1, keepdim=True)).cumsum(-1)
            below = (cumulative <= self._of(drawn.to(cumulative.dtype), "uniform")).sum(
                -1, keepdim=True
            )
            return below.clamp(max=cumulative.shape[-1] - 1)
        if packet in _UNIFORM and "uniform" in served:
            return drawn.copy_(self._of(drawn, "uniform"))
        if packet in _EXPONENTIAL and "gumbel" in served:
            return drawn.copy_(self._of(drawn, "gumbel").neg().exp())
        if packet not in _STANDARD | _SCALED:
            raise ValueError(f"it drew by {packet}, which has no noise here")
        noise = self._of(drawn, "normal")
        if packet in _SCALED:
            names = [argument.name for argument in op._schema.arguments]
            given = {"mean": 0.0, "std": 1.0} | dict(zip(names, args, strict=False)) | kwargs
            noise = given["mean"] + given["std"] * noise
        return drawn.copy_(noise)

    def _of(self, drawn: Tensor, name: str) -> Tensor:
        """The noise of a draw of this kind, in its shape."""
        kinds = [kind for kind in self.noises if kind[0] == name]
        if name == "normal":
            kinds = [kind for kind in kinds if drawn.ndim and kind[1] == drawn.shape[-1]]
        for kind in kinds:
            for noise in self.noises[kind]:
                if noise.numel() == drawn.numel() and len(noise) > 1:  # all steps
                    batch_first = noise.transpose(0, 1)
                    fits = batch_first if drawn.shape[:2] == batch_first.shape[:2] else noise
                    return fits.reshape(drawn.shape)
        kinds = [kind for kind in kinds if self.noises[kind][0][0].numel() == drawn.numel()]
        if not kinds:
            sizes = " or ".join(str(list(x.shape)) for parts in self.noises.values() for x in parts)
            raise ValueError(f"it drew {list(drawn.shape)} numbers, but has noise for {sizes}")
        kind = kinds[0]
        noises, index = self.noises[kind], self.made.get(kind, 0)
        self.made[kind] = index + 1
        if self.total is None:
            return torch.zeros_like(drawn)
        alike = self.total[kind] // (len(noises) * len(noises[0]))
        step, place = divmod(index // alike, len(noises))
        return noises[place][step].reshape(drawn.shape)
