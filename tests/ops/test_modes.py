"""Native ops under what torch is set to around a call: default dtype and device."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastdreamer import testing
from fastdreamer.ops.backend import last_backend
from fastdreamer.ops.cem import cem
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.lambda_return import lambda_return
from fastdreamer.ops.observe import observe
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.rssm_step import rssm_step
from fastdreamer.testing import Sizes

SIZES = Sizes(2, 13, 5, 6, 17, 9, 1, 1, 1, "elu")
OPS = {op.__name__: op for op in (cem, imagine, lambda_return, observe, open_loop, rssm_step)}


def make_inputs(op: str) -> dict[str, Any]:
    """Float32 arguments by name."""
    if op == "lambda_return":
        inputs = testing.lambda_return_inputs(3, 4)
        return {name: x.float() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    shape = {"rssm_step": (4,), "cem": (3, 2, 5, 2)}.get(op, (3, 4))
    options = {"heads": True} if op == "imagine" else {}
    return getattr(testing, f"{op}_inputs")(SIZES, *shape, **options)


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]


def trainable(inputs: dict[str, Any]) -> dict[str, Any]:
    """Copies that ask for gradients, but for the noise."""
    copy = lambda x: (  # noqa: E731
        x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
    )
    return {k: v if k.endswith("noise") else tree_map(copy, v) for k, v in inputs.items()}


@contextlib.contextmanager
def default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {"float64": default_dtype, "meta": lambda: torch.device("meta")}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("op", OPS)
def test_torchs_defaults_change_nothing(op, setting):
    """The inputs say dtype and device; outputs and gradients are those without the setting."""
    inputs = make_inputs(op)
    found = []
    for context in (contextlib.nullcontext, SETTINGS[setting]):
        given = trainable(inputs)
        leaves = [x for x in tensors(given) if x.requires_grad]
        with context():
            with torch.no_grad():
                plain = tensors(OPS[op](**given, backend="native"))
            outputs = tensors(OPS[op](**given, backend="native"))
            grads = []
            if op != "cem":  # which has no gradient
                loss = sum(x.square().sum() for x in outputs)
                grads = [g for g in torch.autograd.grad(loss, leaves, allow_unused=True)
                         if g is not None]  # fmt: skip
                assert len(grads) >= len(leaves) // 2
        assert last_backend(op) == "native"
        found.append([*plain, *outputs, *grads])
    for got, want in zip(*reversed(found), strict=True):
        assert got.dtype == want.dtype == torch.float32 and got.device == want.device
        assert torch.equal(got, want)
