"""The ways in which one and the same work is done, to be compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from fastdreamer.ops.backend import chosen_backend


class Variant(NamedTuple):
    """How the work is done."""

    # "native", "triton", "eager"; "compiled": torch.compile of the eager body; "reduced": compiled
    # with mode="reduce-overhead"
    backend: str
    bf16: bool = False  # under autocast to bfloat16; parameters stay float32
    medium: bool = False  # under torch.set_float32_matmul_precision("medium")
    device: str = "cpu"
    graph: bool = False  # all of it in one torch CUDA graph

    @property
    def by_torch(self) -> bool:
        """Whether torch makes something of the work first, and may find that it cannot."""
        return self.graph or self.backend in ("compiled", "reduced")

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Matrix products inside are as precise as the variant says."""
        before = torch.get_float32_matmul_precision()
        # None where it does nothing: it would keep the bfloat16 weights of regions inside it.
        autocast = torch.autocast(self.device, torch.bfloat16) if self.bf16 else None
        if self.medium:
            torch.set_float32_matmul_precision("medium")
        try:
            with autocast or contextlib.nullcontext():
                yield
        finally:
            if self.medium:
                torch.set_float32_matmul_precision(before)


VARIANTS = {
    "native fp32": Variant("native"),
    "native bf16": Variant("native", bf16=True),
    "eager fp32": Variant("eager"),
    "eager bf16": Variant("eager", bf16=True),
    "compiled fp32": Variant("compiled"),
    "compiled bf16": Variant("compiled", bf16=True),
    "eager medium": Variant("eager", medium=True),
}
"""Name → variant, in the order of every table. "medium": fp32 tensors, bf16 matrix products."""

_GPU = {
    "triton": Variant("triton"),
    "triton, torch's graph": Variant("triton", graph=True),
    "eager": Variant("eager"),
    "eager, torch's graph": Variant("eager", graph=True),
    "reduce-overhead": Variant("reduced"),
}


def gpu_variants(device: str = "cuda") -> dict[str, Variant]:
    """The same on a GPU. "triton" replays graphs of its own, one a pass of an op."""
    return {
        f"{name} {precision}": variant._replace(bf16=precision == "bf16", device=device)
        for name, variant in _GPU.items()
        for precision in ("fp32", "bf16")
    }


OURS = ("native", "triton")
"""Backends that have to be right; the others are baselines."""


class Entries(NamedTuple):
    """What runs in a race, by variant."""

    run: dict[str, Callable[[], object]]
    left_out: dict[str, str]  # why a variant does not run
    missing: tuple[str, ...] = ()  # those of them that should: what a machine or a build lacks


class MissingVariant(RuntimeError):
    """A variant does not run that should: without it a table would flatter."""


def check_native() -> None:
    """Raise MissingVariant where ``auto``, to which a measurement leaves it, takes no native."""
    if (taken := chosen_backend("cpu")) != "native":
        raise MissingVariant(f"auto takes {taken}; the table is one of the native core")


def check_complete(entries: Entries, allow_missing: bool) -> None:
    """Raise MissingVariant, with every reason, where a variant is missing and may not be."""
    if entries.missing and not allow_missing:
        reasons = (f"{name}: {entries.left_out[name]}" for name in entries.missing)
        raise MissingVariant("; ".join([*reasons, "--allow-missing goes on without"]))
