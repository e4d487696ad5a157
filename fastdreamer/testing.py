"""Inputs and the measure of error that tests and benchmarks share.

The rule: the truth is the eager body in float64. The error of a backend's float32 result may be
at most twice that of eager float32 on the same inputs, plus eps times the size of the result.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdreamer.ops.backend import last_backend


class Limit(NamedTuple):
    """What an op's error may be: ``factor`` × eager's error + ``rounding`` × eps × norm."""

    factor: float
    rounding: float
    reason: str


LIMITS = {
    "lambda_return": Limit(
        2.0,
        1.0,
        "as many roundings a step as eager or, fused, fewer; with a single element eager may be "
        "exact by luck, hence one eps",
    ),
}
"""One limit per op; see :func:`assert_accurate`."""


def lambda_return_inputs(H: int, B: int, *, lam: float = 0.95, seed: int = 0) -> dict[str, Any]:
    """Return arguments of ``lambda_return``: [H, B] float64 tensors of float32 numbers.

    Rewards in [0, 1], values of either sign about ten times larger, discount 0.99 and 0 (the end
    of an episode) for one in ten.
    """
    generator = torch.Generator().manual_seed(seed + 1000 * H + B)
    ends = torch.rand(H, B, generator=generator) < 0.1
    inputs = {
        "reward": torch.rand(H, B, generator=generator),
        "next_value": 10 * torch.randn(H, B, generator=generator),
        "discount": torch.where(ends, 0.0, 0.99),
    }
    return {name: tensor.double() for name, tensor in inputs.items()} | {"lam": lam}


def evaluate(
    op: Callable,
    inputs: Mapping[str, Any],
    *,
    backend: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Run an op forward and backward and return its outputs and gradients by name.

    Args:
        op: a public op that returns one tensor or a tuple of them; it takes ``backend=``.
        inputs: its arguments by name; floating tensors are converted to ``dtype`` and get
            gradients, all tensors are moved to ``device``.
        backend: the backend to name; asserted to have run.
        dtype, device: where and in what precision to compute.

    Returns:
        ``out0``, ``out1``, … and ``grad_<argument>``. The gradient that reaches the outputs is
        standard normal, the same for every backend and dtype.
    """
    arguments = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.detach().to(device, copy=True)
            if value.is_floating_point():
                value = value.to(dtype).requires_grad_()
        arguments[name] = value
    returned = op(**arguments, backend=backend)
    assert last_backend(op.__name__) == backend, f"{last_backend(op.__name__)} ran, not {backend}"
    outputs = (returned,) if isinstance(returned, Tensor) else tuple(returned)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    torch.autograd.backward(outputs, weights)
    result = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.requires_grad:
            result[f"grad_{name}"] = value.grad
    return result


def error(got: Tensor, truth: Tensor) -> float:
    """Return ‖got − truth‖₂ computed in float64; infinite where ``got`` is not finite."""
    distance = torch.linalg.vector_norm(got.detach().cpu().double() - truth.detach().cpu().double())
    return float(distance) if torch.isfinite(distance) else float("inf")


def assert_accurate(
    op: str, got: Mapping[str, Tensor], eager: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> None:
    """Assert that every result of a float32 backend is within the op's limit.

    Args:
        op: the op's name, a key of :data:`LIMITS`.
        got: the backend's float32 results, by name as :func:`evaluate` returns them.
        eager, truth: those of eager float32 and eager float64 on the same inputs.
    """
    assert got.keys() == eager.keys() == truth.keys()
    limit = LIMITS[op]
    eps = torch.finfo(torch.float32).eps
    for name, exact in truth.items():
        assert got[name].shape == exact.shape, f"{op}: {name} has shape {list(got[name].shape)}"
        assert got[name].dtype == eager[name].dtype, f"{op}: {name} is {got[name].dtype}"
        norm = float(torch.linalg.vector_norm(exact))
        allowed = limit.factor * error(eager[name], exact) + limit.rounding * eps * norm
        actual = error(got[name], exact)
        assert actual <= allowed, f"{op}: error of {name} is {actual:.3g}, allowed {allowed:.3g}"


class Resources(NamedTuple):
    """What a compiled GPU kernel uses: per thread registers and bytes of stack, local memory
    (spills) and, per program, bytes of shared memory."""

    registers: int
    stack: int
    local: int
    shared: int


def compile_ahead(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    arch: int,
    options: Mapping[str, Any],
) -> Resources:
    """Compile a Triton kernel for a GPU that need not be there, and return what it uses.

    Args:
        kernel: the ``@triton.jit`` function.
        signature: type of every argument that is not a constant, e.g. ``{"x": "*fp32"}``;
            pointers are taken to be 16-byte aligned, as those of tensors are.
        constants: the ``tl.constexpr`` arguments.
        arch: compute capability without the dot, e.g. 90.
        options: what a launch passes beside the arguments: ``num_warps`` and the like.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {n: signature.get(n, "constexpr") for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t.startswith("*")
    }
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=aligned),
        target=GPUTarget("cuda", arch, 32),
        options=dict(options),
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.run(
            [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Resources(usage["REG"], usage["STACK"], usage["LOCAL"], compiled.metadata.shared)
