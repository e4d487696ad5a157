"""What runs a program: one launch of a CUDA graph, or its kernels one by one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdreamer.ops.gpu import capturing, interpreting
from fastdreamer.ops.triton.cuda_graph import GRAPHS
from fastdreamer.ops.triton.program import Affine, Arg, Program, Value


def run(program: Program, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a program on torch's current stream; return its outputs, new tensors.

    CUDA tensors take one graph launch, captured in the first call; while torch captures the stream
    itself, the launches become part of its graph. By Triton, kernel by kernel, go CPU tensors (its
    interpreter), and everything where ``FASTDREAMER_GRAPH=0`` is set, as profilers and sanitizers
    may want it.

    Raises:
        ValueError: an input is missing, unknown, or not what its slot says.
        RuntimeError: a call of the driver failed, or torch captures and a kernel is not loaded:
            make the same call once before.
    """
    first = next(iter(inputs.values()), None)  # what runs the program checks them all
    if first is None or not first.is_cuda or os.environ.get("FASTDREAMER_GRAPH") == "0":
        return run_direct(program, inputs)
    return (GRAPHS.enqueue if capturing(first.device) else GRAPHS.run)(program, inputs)


def run_direct(program: Program, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Launch a program's kernels one by one; return its outputs.

    CUDA tensors use Triton's own launcher on torch's current stream; CPU tensors need Triton's
    interpreter (``TRITON_INTERPRET=1``).
    """
    tensors = program.tensors(inputs)
    flat = {name: tensor.view(-1) for name, tensor in tensors.items()}
    with torch.cuda.device_of(next(iter(inputs.values()))):  # does nothing for CPU tensors
        for launch, indices in program.launches():
            args = {name: _resolve(value, flat, indices) for name, value in launch.args.items()}
            if interpreting():  # the interpreter of Triton 3.7 refuses a bool
                args = {n: int(v) if isinstance(v, bool) else v for n, v in args.items()}
            kernel = launch.kernel
            kernel.fn[launch.grid](**args, **kernel.constants, **kernel.options)
    return {slot.name: tensors[slot.name] for slot in program.of_kind("output")}


def _resolve(value: Value, flat: Mapping[str, Tensor], indices: Mapping[str, int]) -> Any:
    if isinstance(value, Arg):
        return flat[value.slot.name][value.offset.value(indices) :]
    return value.value(indices) if isinstance(value, Affine) else value
