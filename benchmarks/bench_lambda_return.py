"""λ-return: native and torch.compile against eager, all fp32, forward and with backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdreamer import testing
from fastdreamer.ops.lambda_return import OP, lambda_return

SHAPES = [(15, 400), (15, 800), (12, 1000), (50, 16)]  # H, B: presets report and walker; planning
LAM = 0.95


def _variant(name: str) -> Callable[..., Tensor]:
    """A function with ``lambda_return``'s arguments that ignores ``backend``."""
    if name == "torch.compile":
        torch._dynamo.reset()  # a shape each time: dynamo must not settle for a dynamic one
        body = torch.compile(OP.eager, dynamic=False)
        return lambda *args, backend=None: body(*args)
    return lambda *args, backend=None: lambda_return(*args, backend=name)


def _check(function: Callable[..., Tensor], H: int, B: int) -> None:
    """The correctness gate: within the limits of ``testing``, or it is not timed."""
    inputs = testing.lambda_return_inputs(H, B, lam=LAM)
    results = {}
    for who, op, dtype in (
        ("truth", _variant("eager"), torch.float64),
        ("eager", _variant("eager"), torch.float32),
        ("got", function, torch.float32),
    ):
        arguments = {
            k: v.to(dtype).requires_grad_() if isinstance(v, Tensor) else v
            for k, v in inputs.items()
        }
        out = op(*arguments.values())
        tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
        grads = torch.autograd.grad(out, list(tensors.values()), _weights(H, B).to(dtype))
        results[who] = {"out0": out.detach()} | dict(zip(tensors, grads, strict=True))
    testing.assert_accurate("lambda_return", results["got"], results["eager"], results["truth"])


def _weights(H: int, B: int) -> Tensor:
    return torch.randn(H, B, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize(("H", "B"), SHAPES, ids=lambda n: str(n))
@pytest.mark.parametrize("variant", ["eager", "native", "torch.compile"])
def test_lambda_return(versus, variant: str, H: int, B: int, direction: str) -> None:
    if variant == "native" and (reason := OP.why_not("native", "cpu")):
        pytest.skip(reason)
    function, eager = _variant(variant), _variant("eager")
    try:
        _check(function, H, B)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"torch.compile does not work here: {error}")
    inputs = testing.lambda_return_inputs(H, B, lam=LAM)
    tensors = [v.float() for v in inputs.values() if isinstance(v, Tensor)]
    if direction == "forward":

        def run(op: Callable[..., Tensor]) -> None:
            with torch.no_grad():
                op(*tensors, LAM)
    else:
        tensors = [t.requires_grad_() for t in tensors]
        weights = _weights(H, B)

        def run(op: Callable[..., Tensor]) -> None:
            torch.autograd.grad(op(*tensors, LAM), tensors, weights)

    versus(lambda: run(function), lambda: run(eager), rounds=200, warmup=10)
