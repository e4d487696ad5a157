"""Native ops under bad input and bad company: an exception or the right answer, never a crash.

Arguments of every wrong kind (drawn by hypothesis), buffers the bindings must refuse, threads that
call at once, forks, modules that die before their tape, and torch.compile around the ops.
"""

import gc
import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_unflatten

from fastdreamer import _native, testing
from fastdreamer.ops.backend import BackendError, last_backend
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.lambda_return import lambda_return
from fastdreamer.ops.native import packs
from fastdreamer.ops.native.packs import pack_gru, pack_mlp
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.rssm_step import rssm_step
from fastdreamer.testing import Sizes

SIZES = Sizes(2, 9, 3, 4, 11, 7, 1, 1, 1, "elu")
OPS = {
    "imagine": (imagine, lambda sizes, H, B: testing.imagine_inputs(sizes, H, B, heads=True)),
    "open_loop": (open_loop, testing.open_loop_inputs),
    "rssm_step": (rssm_step, lambda sizes, H, B: testing.rssm_step_inputs(sizes, B)),
    "lambda_return": (
        lambda_return,
        lambda sizes, H, B: {
            k: v.float() if isinstance(v, Tensor) else v
            for k, v in testing.lambda_return_inputs(H, B).items()
        },
    ),
}
REFUSALS = (ValueError, TypeError, BackendError)
FUZZ = settings(
    max_examples=int(os.environ.get("FASTDREAMER_FUZZ", "150")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

# --- what can be wrong with a tensor ------------------------------------------------------------


def poke(tensor: Tensor, value: float, at: int) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[at % tensor.numel()] = value
    return tensor


SHAPES = {
    "without the first dimension": lambda t: t[0],
    "one dimension more": lambda t: t[None],
    "flat": lambda t: t.reshape(-1),
    "a scalar": lambda t: t.sum(),
    "longer": lambda t: torch.cat([t, t[:1]]),
    "shorter": lambda t: t[:-1],
    "wider": lambda t: torch.cat([t, t[..., :1]], -1),
    "narrower": lambda t: t[..., :-1],
    "empty": lambda t: t[:0],
    "without width": lambda t: t[..., :0],
    "transposed sizes": lambda t: t.mT.contiguous() if t.dim() > 1 else t[::2],
}
LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else torch.stack([t, t], 1)[:, 0],
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "a slice": lambda t: torch.cat([t, t])[: len(t)],
    "not aligned": lambda t: torch.cat([torch.zeros(1), t.flatten()])[1:].view(t.shape),
    "broadcast": lambda t: t[..., :1].expand(t.shape),
    "sparse": lambda t: t.to_sparse(),
}
DTYPES = {
    str(dtype)[6:]: lambda t, dtype=dtype: t.to(dtype)
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool,
                  torch.complex64)
}  # fmt: skip
PLACES = {
    "meta": lambda t: t.to("meta"),
    "None": lambda t: None,
    "a list": lambda t: t.tolist(),
    "an array": lambda t: t.numpy(),
    "a parameter": lambda t: torch.nn.Parameter(t),
    "in inference mode": lambda t: _inferred(t),
}
VALUES = {
    name: lambda t, value=value, at=at: poke(t, value, at)
    for name, value in [
        ("nan", float("nan")), ("inf", float("inf")), ("-inf", float("-inf")),
        ("largest", 3.4e38), ("denormal", 1e-40), ("large", -1e6),
    ]
    for at in (0, 5)
}  # fmt: skip
ALL_NAN = {"all nan": lambda t: torch.full_like(t, float("nan"))}
CHANGES = SHAPES | LAYOUTS | DTYPES | PLACES | VALUES | ALL_NAN


def _inferred(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def named_tensors(inputs: dict[str, Any]) -> list[str]:
    return [n for n, leaf in _leaves(inputs)[0] if isinstance(leaf, Tensor) and "post" not in n]


def _leaves(inputs: dict[str, Any]) -> tuple[list[tuple[str, Any]], Any]:
    leaves, spec = tree_flatten_with_path(inputs)
    return [(path[0].key + keystr(path[1:]), leaf) for path, leaf in leaves], spec


def changed(inputs: dict[str, Any], changes: dict[str, str]) -> dict[str, Any]:
    leaves, spec = _leaves(inputs)
    done = [
        CHANGES[changes[name]](leaf) if name in changes else leaf for name, leaf in leaves
    ]  # fmt: skip
    return tree_unflatten(done, spec)


def call(op: Any, inputs: dict[str, Any], backend: str, gradients: bool) -> list[Tensor]:
    """Outputs and, if asked, gradients by everything that takes one."""
    leaves, spec = _leaves(inputs)
    wanted = [
        leaf.detach().clone().requires_grad_()
        if gradients and isinstance(leaf, Tensor) and leaf.dtype == torch.float32
        and not name.endswith("noise") and leaf.device.type == "cpu"
        else leaf
        for name, leaf in leaves
    ]  # fmt: skip
    returned = op(**tree_unflatten(wanted, spec), backend=backend)
    outputs = [x for x in tree_leaves(returned) if isinstance(x, Tensor)]
    reached = [x for x in outputs if x.requires_grad]
    inputs_of = [x for x in wanted if isinstance(x, Tensor) and x.requires_grad and x.is_leaf]
    if not gradients or not reached:
        return [x.detach() for x in outputs]
    grads = torch.autograd.grad(
        [x.square().sum() for x in reached], inputs_of, allow_unused=True, materialize_grads=True
    )
    return [x.detach() for x in outputs] + list(grads)


def same(got: Tensor, want: Tensor, exact: bool) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype and got.device == want.device
    if got.device.type == "meta":
        return
    assert bool((got.isnan() | ~want.isnan()).all()), "eager is NaN and native is not"
    fine = got.isfinite() & want.isfinite()
    if not exact:
        return
    assert bool((fine | (got == want) | (got.isnan() & want.isnan())).all()), (got, want)
    scale = float(want[fine].abs().max()) if fine.any() else 0.0
    torch.testing.assert_close(got[fine], want[fine], rtol=1e-3, atol=1e-4 * max(scale, 1.0))


@FUZZ
@given(data=st.data())
def test_fuzz(data):
    """Whatever is passed: an exception of the right kind, or eager's answer."""
    name = data.draw(st.sampled_from(sorted(OPS)), "op")
    op, make = OPS[name]
    few = st.integers(1, 5)
    sizes = SIZES._replace(
        A=data.draw(few), D=data.draw(st.integers(1, 35)), S=data.draw(few),
        hidden=data.draw(st.integers(1, 35)), units=data.draw(st.integers(1, 20)),
        reward_layers=data.draw(st.integers(0, 2)), critic_layers=data.draw(st.integers(0, 2)),
        actor_layers=data.draw(st.integers(0, 2)),
        activation=data.draw(st.sampled_from(["elu", "relu", "silu", "tanh"])),
    )  # fmt: skip
    inputs = make(sizes, data.draw(few, "H"), data.draw(few, "B"))
    names = named_tensors(inputs)
    arguments = [n for n in names if not n.startswith(("params", "actor", "returns"))]
    victims = data.draw(
        st.lists(st.sampled_from(names) | st.sampled_from(arguments), max_size=2, unique=True)
    )
    changes = {n: data.draw(st.sampled_from(sorted(CHANGES)), n) for n in victims}
    backend = data.draw(st.sampled_from(["native", "auto"]), "backend")
    check_call(op, inputs, changes, backend, data.draw(st.booleans(), "gradients"))


def check_call(op, inputs, changes: dict[str, str], backend: str, gradients: bool) -> None:
    def attempt(which: str) -> list[Tensor] | Exception:
        try:
            return call(op, changed(inputs, changes), which, gradients)
        except Exception as error:
            return error

    got = attempt(backend)
    ran = last_backend(op.__name__)
    want = attempt("eager")
    if isinstance(got, Exception):
        # what torch itself says of a tensor that eager cannot take either is as good as ours
        assert isinstance(got, REFUSALS) or type(got) is type(want), repr(got)
        assert str(got)
        return
    assert not isinstance(want, Exception), f"native took what eager refuses: {want!r}"
    assert backend == "auto" or ran == "native"
    extreme = set(changes.values()) & (VALUES | ALL_NAN).keys()
    for a, b in zip(got, want, strict=True):
        same(a, b, not extreme)
