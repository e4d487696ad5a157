"""The ways in which one and the same work is done, to be compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Variant(NamedTuple):
    """How the work is done."""

    # "native", "triton", "eager"; "compiled": torch.compile of the eager body; "graph": eager in a
    # torch CUDA graph; "reduced": compiled with mode="reduce-overhead"
    backend: str
    bf16: bool = False  # under autocast to bfloat16; parameters stay float32
    medium: bool = False  # under torch.set_float32_matmul_precision("medium")
    device: str = "cpu"

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Matrix products inside are as precise as the variant says."""
        before = torch.get_float32_matmul_precision()
        if self.medium:
            torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
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

GPU = {
    f"{name} {precision}": Variant(backend, precision == "bf16", device="cuda")
    for name, backend in (
        ("triton", "triton"),
        ("eager", "eager"),
        ("eager, CUDA graph", "graph"),
        ("reduce-overhead", "reduced"),
    )
    for precision in ("fp32", "bf16")
}
"""The same on a GPU."""

OURS = ("native", "triton")
"""Backends that have to be right; the others are baselines."""
