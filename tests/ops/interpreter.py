"""Triton's interpreter, with bfloat16 as a GPU computes it; for processes that set
TRITON_INTERPRET=1 before triton is imported.

As it comes, its ``dot`` multiplies the bit patterns of bfloat16 and its cast to bfloat16 cuts off
what hardware rounds to nearest even. Its minimum and maximum return NaN where PTX's ``min.f32`` and
``max.f32`` return the other number.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits of float32 numbers rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def correct_bfloat16() -> None:
    """Replace the interpreter's dot and casts of bfloat16 in this process."""
    cast, dot, convert = (
        getattr(InterpreterBuilder, name) for name in ("cast_impl", "create_dot", "create_fp_to_fp")
    )

    def new_cast(self, src, dst_type):
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(to_bfloat16(src.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(from_bfloat16(src.data), tl.float32)
        return cast(self, src, dst_type)

    def new_convert(self, src, dst_type, rounding_mode):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return new_cast(self, src, dst_type)
        return convert(self, src, dst_type, rounding_mode)

    def new_dot(self, a, b, d, *options):
        def wide(x):
            if x.dtype.scalar != tl.bfloat16:
                return x
            return TensorHandle(from_bfloat16(x.data), tl.float32)

        return dot(self, wide(a), wide(b), d, *options)

    InterpreterBuilder.cast_impl = new_cast
    InterpreterBuilder.create_fp_to_fp = new_convert
    InterpreterBuilder.create_dot = new_dot
    assert interpreter.InterpreterBuilder is InterpreterBuilder


def correct_minimum() -> None:
    """Replace the interpreter's minimum and maximum, which let a NaN through, by those of a GPU."""
    for name, function in (("create_minnumf", np.fmin), ("create_maxnumf", np.fmax)):
        assert hasattr(InterpreterBuilder, name)

        def new(self, a, b, function=function):
            return self.binary_op(a, b, function)

        setattr(InterpreterBuilder, name, new)
