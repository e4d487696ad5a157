"""Programs: loops of Triton kernel launches as plain data.

A compiled loop (imagination, its backward sweep, the iterations of CEM) is a :class:`Program`:
named tensors and nested loops of launches, whose pointers move by affine functions of the loops'
indices. Building one needs no GPU; :mod:`fastdreamer.ops.triton.run` runs it. ::

    deter = Slot("deter", (H, B, D), torch.float32, "output")
    t = index("t")
    body = [Loop("t", H, [Launch(step, (rows,), {"out": deter.at(t * B * D), "rows": B})])]
    program = Program("imagine", [deter, ...], body)

A backward sweep runs from H-1 down by the index ``H - 1 - t``; a double buffer is at
``t % 2 * B * D``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; kernels may be told that a pointer is a multiple of it
POINTER_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
"""How Triton writes a pointer to a dtype; no other dtype can be a slot's."""


class Term(NamedTuple):
    """stride · (start + step·i), or stride · ((start + step·i) mod modulo) where modulo > 0."""

    loop: str
    stride: int = 1
    start: int = 0
    step: int = 1
    modulo: int = 0

    def value(self, i: int) -> int:
        at = self.start + self.step * i
        return self.stride * (at % self.modulo if self.modulo else at)


class Affine(NamedTuple):
    """base + Σ terms, an integer that depends on the indices of the loops around."""

    base: int = 0
    terms: tuple[Term, ...] = ()

    def value(self, indices: Mapping[str, int]) -> int:
        return self.base + sum(term.value(indices[term.loop]) for term in self.terms)

    def __add__(self, other: Affine | int) -> Affine:  # type: ignore[override]
        other = affine(other)
        return Affine(self.base + other.base, self.terms + other.terms)

    __radd__ = __add__

    def __sub__(self, other: Affine | int) -> Affine:
        return self + affine(other) * -1

    def __rsub__(self, other: int) -> Affine:
        return self * -1 + other

    def __mul__(self, factor: int) -> Affine:  # type: ignore[override]
        terms = tuple(term._replace(stride=term.stride * factor) for term in self.terms)
        return Affine(self.base * factor, terms)

    __rmul__ = __mul__

    def __mod__(self, modulo: int) -> Affine:
        """Only of base ± i with one loop's index i, as ``(t + 1) % 2`` is."""
        if len(self.terms) != 1 or self.terms[0].modulo or modulo < 1:
            raise ValueError(f"only one loop's index can be taken modulo, got {self} % {modulo}")
        (term,) = self.terms
        start, step = self.base + term.stride * term.start, term.stride * term.step
        return Affine(0, (Term(term.loop, 1, start, step, modulo),))


def affine(value: Affine | int) -> Affine:
    """Return an integer as the constant that it is."""
    return value if isinstance(value, Affine) else Affine(value)


def index(loop: str) -> Affine:
    """Return the index of the loop of that name: 0, 1, ... count - 1."""
    return Affine(0, (Term(loop),))


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor of a program, contiguous.

    Args:
        name: what the caller gives or gets it by.
        shape, dtype: of the whole tensor.
        kind: "input" is given by the caller and only read; "output" is new in every call; "scratch"
            belongs to the executor, and holds nothing when the program starts.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Literal["input", "output", "scratch"] = "input"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def at(self, offset: Affine | int) -> Arg:
        """A pointer ``offset`` elements behind the first."""
        return Arg(self, affine(offset))


class Arg(NamedTuple):
    """A pointer into a slot; the offset is in elements."""

    slot: Slot
    offset: Affine = Affine()

    @property
    def aligned(self) -> bool:
        """Whether it is always a multiple of ALIGNMENT if the slot's first byte is."""
        size = self.slot.dtype.itemsize
        parts = [self.offset.base]
        for term in self.offset.terms:
            parts += [term.stride] if term.modulo else [term.stride * term.start, term.stride]
        return all(part * size % ALIGNMENT == 0 for part in parts)


Value = Arg | int | float | bool | Affine


class Kernel:
    """A Triton function with its compile-time choices.

    Args:
        fn: what ``triton.jit`` returned.
        constants: its ``tl.constexpr`` arguments, and None for pointers that it does not use.
        num_warps, num_stages, maxnreg: as in Triton.
        enable_fp_fusion: whether a · b + c may be rounded once.
    """

    def __init__(
        self,
        fn: Any,
        constants: Mapping[str, Any] | None = None,
        *,
        num_warps: int = 4,
        num_stages: int = 3,
        maxnreg: int | None = None,
        enable_fp_fusion: bool = True,
    ) -> None:
        self.fn = fn
        self.constants = dict(constants or {})
        self.options = {
            "num_warps": num_warps,
            "num_stages": num_stages,
            "maxnreg": maxnreg,
            "enable_fp_fusion": enable_fp_fusion,
        }
        if unknown := self.constants.keys() - set(fn.arg_names):
            raise ValueError(f"{self.name} has no arguments {sorted(unknown)}")
        self.arguments = tuple(name for name in fn.arg_names if name not in self.constants)

    @property
    def name(self) -> str:
        return getattr(self.fn, "__name__", None) or self.fn.fn.__name__

    def __repr__(self) -> str:
        return f"Kernel({self.name}, {self.constants}, {self.options})"


class Spec(NamedTuple):
    """What has to be compiled for a launch; equal ones share their kernel."""

    fn: Any
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]
    types: tuple[tuple[str, str], ...]  # of the run-time arguments in order, as Triton writes them
    aligned: frozenset[str]  # pointers that are always multiples of ALIGNMENT


class Compiled(NamedTuple):
    """A kernel as the driver loads it, and how it takes its parameters."""

    name: str
    image: bytes
    kinds: tuple[str, ...]  # "pointer", "i32", "i64", "f32" or "u8"
    hidden: int  # pointers after them, to be null
    threads: int  # of a block
    shared_bytes: int  # of a block


class Launch:
    """One kernel over a grid of up to three dimensions, every run-time argument by name.

    An integer is 32 bits wide, unless its value does not fit; a float is float32.
    """

    def __init__(self, kernel: Kernel, grid: Sequence[int], args: Mapping[str, Value | Slot]):
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        if not 1 <= len(grid) <= 3 or min(self.grid) < 1:
            raise ValueError(f"{kernel.name}: grid must be 1 to 3 positive sizes, got {grid}")
        if args.keys() != set(kernel.arguments):
            missing, unknown = set(kernel.arguments) - args.keys(), args.keys() - kernel.arguments
            raise ValueError(
                f"{kernel.name}: arguments missing {sorted(missing)}, unknown {sorted(unknown)}"
            )
        given = {name: args[name] for name in kernel.arguments}
        self.args: dict[str, Value] = {
            name: Arg(value) if isinstance(value, Slot) else value for name, value in given.items()
        }
        for name, value in self.args.items():
            if not isinstance(value, Value):
                raise TypeError(f"{kernel.name}: {name} is a {type(value).__name__}")

    def spec(self, counts: Mapping[str, int], misaligned: Collection[str] = ()) -> Spec:
        """What to compile.

        Args:
            counts: of the loops around, by name.
            misaligned: slots whose first byte is at no multiple of ALIGNMENT.
        """
        types, aligned = {}, set()
        for name, value in self.args.items():
            if isinstance(value, Arg):
                types[name] = POINTER_TYPES[value.slot.dtype]
                if value.aligned and value.slot.name not in misaligned:
                    aligned.add(name)
            elif isinstance(value, bool):
                types[name] = "i1"
            elif isinstance(value, float):
                types[name] = "fp32"
            else:
                low, high = _range(affine(value), counts, name)
                types[name] = "i32" if low >= -(2**31) and high < 2**31 else "i64"
        kernel = self.kernel
        parts = (kernel.constants.items(), kernel.options.items(), types.items())
        return Spec(kernel.fn, *map(tuple, parts), frozenset(aligned))


class Loop:
    """``count`` runs of ``body``; its index is ``index(name)``."""

    def __init__(self, name: str, count: int, body: Sequence[Launch | Loop]) -> None:
        if count < 0:
            raise ValueError(f"loop {name}: count must not be negative, got {count}")
        self.name = name
        self.count = count
        self.body = tuple(body)


class Program:
    """Tensors, and loops of launches on them, in order.

    Args:
        name: for messages and graphs' keys.
        slots: every tensor; names are unique.
        body: launches and loops.

    Raises:
        ValueError: a launch uses a slot that is not listed or an index of no enclosing loop, a
            pointer leaves its slot, or two slots or nested loops share a name.
    """

    def __init__(self, name: str, slots: Sequence[Slot], body: Sequence[Launch | Loop]) -> None:
        self.name = name
        self.slots = {slot.name: slot for slot in slots}
        self.body = tuple(body)
        if len(self.slots) != len(slots):
            raise ValueError(f"{name}: two slots share a name")
        for slot in slots:
            if slot.dtype not in POINTER_TYPES:
                raise ValueError(f"{name}: slot {slot.name} cannot be {slot.dtype}")
        self._check(self.body, {})

    def of_kind(self, kind: str) -> list[Slot]:
        return [slot for slot in self.slots.values() if slot.kind == kind]

    def launches(self) -> Iterator[tuple[Launch, dict[str, int]]]:
        """Every launch in order, with the indices of the loops around it."""
        return _unrolled(self.body, {})

    def tensors(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Check the inputs; return every slot's tensor, outputs and scratch new on their device.

        Raises:
            ValueError: an input is missing, unknown, or not what its slot says.
        """
        device = self.check(inputs)
        new = [slot for slot in self.slots.values() if slot.kind != "input"]
        return {**inputs, **{slot.name: empty(slot, device) for slot in new}}

    def check(self, inputs: Mapping[str, Tensor]) -> torch.device:
        """Return the device that the inputs share; raises as :meth:`tensors` does."""
        names = {slot.name for slot in self.of_kind("input")}
        if inputs.keys() != names or not inputs:
            raise ValueError(f"{self.name}: inputs must be {sorted(names)}, got {sorted(inputs)}")
        device = next(iter(inputs.values())).device
        for name, tensor in inputs.items():
            slot = self.slots[name]
            if (
                tuple(tensor.shape) != slot.shape
                or tensor.dtype != slot.dtype
                or tensor.device != device
                or not tensor.is_contiguous()
            ):
                raise ValueError(
                    f"{self.name}: {name} must be {list(slot.shape)} {slot.dtype} contiguous on "
                    f"{device}, got {list(tensor.shape)} {tensor.dtype} with strides "
                    f"{tensor.stride()} on {tensor.device}"
                )
        return device

    def _check(self, body: Sequence[Launch | Loop], counts: dict[str, int]) -> None:
        for item in body:
            if isinstance(item, Loop):
                if item.name in counts:
                    raise ValueError(f"{self.name}: loop {item.name} is inside one of its name")
                if item.count:
                    self._check(item.body, {**counts, item.name: item.count})
                continue
            for name, value in item.args.items():
                where = f"{self.name}: {item.kernel.name}'s {name}"
                if isinstance(value, Arg):
                    if self.slots.get(value.slot.name) is not value.slot:
                        raise ValueError(f"{where} is in slot {value.slot.name}, not a slot of it")
                    low, high = _range(value.offset, counts, where)
                    if low < 0 or high >= value.slot.numel:
                        raise ValueError(
                            f"{where} goes from {low} to {high}, slot {value.slot.name} has "
                            f"{value.slot.numel} elements"
                        )
                elif isinstance(value, Affine):
                    _range(value, counts, where)


def empty(slot: Slot, device: torch.device) -> Tensor:
    """Return a new tensor for a slot."""
    return torch.empty(slot.shape, dtype=slot.dtype, device=device)


def _unrolled(
    body: Sequence[Launch | Loop], indices: dict[str, int]
) -> Iterator[tuple[Launch, dict[str, int]]]:
    for item in body:
        if isinstance(item, Launch):
            yield item, indices
        else:
            for i in range(item.count):
                yield from _unrolled(item.body, {**indices, item.name: i})


def _range(value: Affine, counts: Mapping[str, int], where: str) -> tuple[int, int]:
    """The least and greatest value."""
    terms: dict[str, list[Term]] = {}
    for term in value.terms:
        if term.loop not in counts:
            raise ValueError(f"{where} uses the index of loop {term.loop}, which is not around it")
        terms.setdefault(term.loop, []).append(term)
    low = high = value.base
    for loop, of_loop in terms.items():  # loops run independently of each other
        seen = [sum(term.value(i) for term in of_loop) for i in range(counts[loop])]
        low, high = low + min(seen), high + max(seen)
    return low, high
