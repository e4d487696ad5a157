"""What native leaves to eager, and that torch's defaults are none of it.

Default dtype and device, transforms of torch.func, forward mode, MLPs deeper than it takes.
"""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from fastdreamer import _native, testing
from fastdreamer.ops.backend import BackendError, last_backend
from fastdreamer.ops.cem import cem
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.lambda_return import lambda_return
from fastdreamer.ops.layers import MLPParams
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


# --- what native cannot differentiate ------------------------------------------------------------


def first(inputs: dict[str, Any]) -> tuple[str, Tensor]:
    """A floating input that every op has by another name, and its name."""
    name = next(k for k in ("reward", "action", "embed", "state_noise") if k in inputs)
    return name, inputs[name]


DIFFERENTIABLE = sorted(OPS.keys() - {"cem"})


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_transforms_of_torch_func_take_eager(op, transform):
    inputs = make_inputs(op)
    name, x = first(inputs)
    wanted = {"eager": "eager", "auto": "eager"}

    def loss(x: Tensor, backend: str) -> Tensor:
        outputs = tensors(OPS[op](**{**inputs, name: x}, backend=backend))
        return sum(out.square().sum() for out in outputs)

    def run(backend: str) -> Tensor:
        if transform == "grad":
            return torch.func.grad(loss)(x, backend)
        if transform == "vmap":
            return torch.func.vmap(lambda x: loss(x, backend))(torch.stack([x, x + 1]))
        return torch.func.jvp(lambda x: loss(x, backend), (x,), (torch.ones_like(x),))[1]

    found = {}
    for backend, took in wanted.items():
        found[backend] = run(backend)
        assert last_backend(op) == took
    assert torch.equal(found["auto"], found["eager"]) and found["eager"].abs().max() > 0
    with pytest.raises(BackendError, match=f"{op}: .*'native' cannot run: a transform of torch.fu"):
        run("native")
    loss(x, "native")  # and outside it runs


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_takes_eager(op):
    """A tangent of an input, or of a parameter, which no argument of its own tells of."""
    inputs = make_inputs(op)
    plain = tensors(OPS[op](**inputs, backend="eager"))
    with torch.no_grad(), forward_ad.dual_level():
        dual = lambda x: forward_ad.make_dual(x, torch.ones_like(x))  # noqa: E731
        inputs |= {"reward": dual(inputs["reward"])} if op == "lambda_return" else {
            "params": inputs["params"]._replace(
                gru=inputs["params"].gru._replace(weight_hh=dual(inputs["params"].gru.weight_hh))
            )
        }  # fmt: skip
        found = {}
        for backend in ("eager", "auto"):
            outputs = tensors(OPS[op](**inputs, backend=backend))
            assert last_backend(op) == "eager"
            found[backend] = [forward_ad.unpack_dual(x) for x in outputs]
        with pytest.raises(BackendError, match="'native' cannot run: forward-mode differentiation"):
            OPS[op](**inputs, backend="native")
    for auto, eager, value in zip(found["auto"], found["eager"], plain, strict=True):
        assert torch.equal(auto.primal, value)
        assert (auto.tangent is None) == (eager.tangent is None)
        assert auto.tangent is None or torch.equal(auto.tangent, eager.tangent)
    assert any(x.tangent is not None for x in found["auto"])
    OPS[op](**make_inputs(op), backend="native")
    assert last_backend(op) == "native"


def deepen(mlp: MLPParams, layers: int) -> MLPParams:
    """More hidden layers behind the first, as wide as its output."""
    width = len(mlp.biases[0])
    more = layers - len(mlp.weights)
    weights = (mlp.weights[0], *[torch.eye(width)] * more, *mlp.weights[1:])
    biases = (mlp.biases[0], *[torch.zeros(width)] * more, *mlp.biases[1:])
    return mlp._replace(weights=weights, biases=biases)


DEEP = [
    *((op, "params", part) for op in OPS if op != "lambda_return" for part in ("inp", "prior")),
    ("observe", "params", "post"),
    ("imagine", "actor", "mlp"),
    *(("imagine", "returns", head) for head in ("reward", "critic", "target", "discount")),
    *(("cem", "returns", head) for head in ("reward", "target", "discount")),
]


@pytest.mark.parametrize(("op", "argument", "part"), DEEP, ids=lambda name: name)
def test_mlps_deeper_than_native_takes_are_eagers(op, argument, part):
    inputs = make_inputs(op)
    given = inputs[argument]
    if part == "discount":
        given = given._replace(discount=given.reward)
    for layers in (_native.MAX_LAYERS, _native.MAX_LAYERS + 1):
        deep = deepen(getattr(given, part), layers)
        inputs[argument] = given._replace(**{part: deep})
        fits = layers == _native.MAX_LAYERS
        results = tensors(OPS[op](**inputs, backend="native" if fits else "auto"))
        if not fits:
            assert last_backend(op) == "eager"
            says = f"{op}: .* an MLP has {layers} layers, native takes at most {layers - 1}$"
            with pytest.raises(BackendError, match=says):
                OPS[op](**inputs, backend="native")
        for got, want in zip(results, tensors(OPS[op](**inputs, backend="eager")), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
