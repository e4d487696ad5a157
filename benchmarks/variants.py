"""The ways in which one and the same work is done, to be compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Variant(NamedTuple):
    """How the work is done."""

    backend: str  # "native", "eager", or "compiled": torch.compile of the eager body
    bf16: bool = False  # under CPU autocast to bfloat16; parameters stay float32
    medium: bool = False  # under torch.set_float32_matmul_precision("medium")

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Matrix products inside are as precise as the variant says."""
        before = torch.get_float32_matmul_precision()
        if self.medium:
            torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
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
