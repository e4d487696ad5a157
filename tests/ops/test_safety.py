"""Native ops under bad input and bad company: an exception or the right answer, never a crash.

Arguments of every wrong kind (drawn by hypothesis), buffers the bindings must refuse, threads that
call at once, forks, modules that die before their tape, and torch.compile around the ops.
"""

import os
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
from fastdreamer.ops.cem import cem
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.lambda_return import lambda_return
from fastdreamer.ops.native import packs
from fastdreamer.ops.native.packs import flat, pack_gru, pack_mlp
from fastdreamer.ops.observe import observe
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.rssm_step import rssm_step
from fastdreamer.testing import Sizes

SIZES = Sizes(2, 9, 3, 4, 11, 7, 1, 1, 1, "elu")
OPS = {
    # all candidates are elite: which are the best is decided by roundings
    "cem": (
        cem,
        lambda sizes, H, B: testing.cem_inputs(sizes, H, B, 5, 2) | {"num_elites": 5},
    ),
    "imagine": (imagine, lambda sizes, H, B: testing.imagine_inputs(sizes, H, B, heads=True)),
    "open_loop": (open_loop, testing.open_loop_inputs),
    "observe": (observe, testing.observe_inputs),
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
        ("large", -1e6), ("denormal", 1e-40),
    ]
    for at in (0, 5)
}  # fmt: skip
ALL_NAN = {"all nan": lambda t: torch.full_like(t, float("nan"))}
CHANGES = SHAPES | LAYOUTS | DTYPES | PLACES | VALUES | ALL_NAN


def _inferred(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def named_tensors(inputs: dict[str, Any]) -> list[str]:
    return [n for n, leaf in _leaves(inputs)[0] if isinstance(leaf, Tensor)]


def _leaves(inputs: dict[str, Any]) -> tuple[list[tuple[str, Any]], Any]:
    leaves, spec = tree_flatten_with_path(inputs)
    return [(path[0].key + keystr(path[1:]), leaf) for path, leaf in leaves], spec


def changed(inputs: dict[str, Any], changes: dict[str, str]) -> dict[str, Any]:
    leaves, spec = _leaves(inputs)
    done = [
        CHANGES[changes[name]](leaf) if name in changes else leaf for name, leaf in leaves
    ]  # fmt: skip
    return tree_unflatten(done, spec)


def call(
    op: Any, inputs: dict[str, Any], backend: str, gradients: bool, bf16: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and, if asked, gradients by everything that takes one."""
    leaves, spec = _leaves(inputs)
    wanted = [
        leaf.detach().clone().requires_grad_()
        if gradients and isinstance(leaf, Tensor) and leaf.dtype == torch.float32
        and not name.endswith("noise") and leaf.device.type == "cpu"
        else leaf
        for name, leaf in leaves
    ]  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        returned = op(**tree_unflatten(wanted, spec), backend=backend)
    outputs = [x for x in tree_leaves(returned) if isinstance(x, Tensor)]
    reached = [x for x in outputs if x.requires_grad]
    inputs_of = [x for x in wanted if isinstance(x, Tensor) and x.requires_grad and x.is_leaf]
    detached = [x.detach() for x in outputs]
    if not gradients or not reached:
        return detached, []
    grads = torch.autograd.grad(
        [x.square().sum() for x in reached], inputs_of, allow_unused=True, materialize_grads=True
    )
    return detached, list(grads)


def same(got: Tensor, want: Tensor, tolerance: float, spreads: bool = False) -> None:
    """Numbers where eager has them, equal up to rounding, and NaN where it has NaN.

    An infinity may be NaN, as of ∞ − ∞ in another order of the same sum, but nothing finite. Where
    NaN ``spreads``, it may stand for a number, too.
    """
    assert got.shape == want.shape and got.dtype == want.dtype and got.device == want.device
    if got.device.type == "meta":
        return
    got, want = got.to_dense(), want.to_dense()  # zeros for a sparse tensor that is not used
    assert bool((got.isnan() | ~want.isnan()).all()), "eager is NaN and native is not"
    fine = want.isfinite()
    assert bool((got.isnan() | (got == want) | ~want.isinf()).all()), "an infinity is lost"
    if spreads:
        fine &= ~got.isnan()
    assert bool(got[fine].isfinite().all()), "eager is finite and native is not"
    scale = float(want[fine].abs().max()) if fine.any() else 0.0
    atol = tolerance * max(scale, 1.0)
    torch.testing.assert_close(got[fine], want[fine], rtol=10 * tolerance, atol=atol)


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
    gradients, bf16 = data.draw(st.booleans(), "gradients"), data.draw(st.booleans(), "bf16")
    check_call(op, inputs, changes, backend, gradients, bf16)


def check_call(
    op: Any,
    inputs: dict[str, Any],
    changes: dict[str, str],
    backend: str,
    gradients: bool,
    bf16: bool = False,
) -> None:
    def attempt(which: str) -> tuple[list[Tensor], list[Tensor]] | Exception:
        try:
            return call(op, changed(inputs, changes), which, gradients, bf16)
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
    # bfloat16 rounds to 2^-9, some times in a row
    tolerance = 1e-2 if bf16 else 1e-4
    for a, b in zip(got[0], want[0], strict=True):
        same(a, b, tolerance)
    relu = "params" in inputs and inputs["params"].prior.activation == "relu"
    # in bfloat16 a unit near its kink may switch, in eager as well as here
    tolerance = 1.0 if relu and bf16 else tolerance
    # and slopes of the heads wait for the gradient of the returns: 0 · NaN
    spreads = relu and op is imagine
    for a, b in zip(got[1], want[1], strict=True):
        same(a, b, tolerance, spreads)


@pytest.mark.parametrize("name", OPS)
def test_nan_and_inf_come_out_where_eager_puts_them(name):
    """In every argument and parameter, one at a time, forward and backward."""
    op, make = OPS[name]
    for activation in ("elu", "relu"):
        inputs = make(SIZES._replace(activation=activation), 2, 3)
        for tensor in named_tensors(inputs):
            for change in ("nan", "inf", "-inf", "all nan"):
                check_call(op, inputs, {tensor: change}, "native", True)


@pytest.mark.parametrize("name", OPS)
def test_shapes_and_layouts_that_do_not_fit(name):
    """Every one of every tensor: never taken for the weights packed before from its memory."""
    op, make = OPS[name]
    inputs = make(SIZES, 2, 3)
    for tensor in named_tensors(inputs):
        for change in SHAPES | LAYOUTS:
            check_call(op, inputs, {tensor: change}, "auto", False)


# --- what the bindings refuse -------------------------------------------------------------------


class Forward:
    """Arguments of the bindings' forward calls, by name; calls one with some replaced."""

    H, B = 2, 3

    def __init__(self, gradients: bool = True) -> None:
        A, D, S, E = SIZES[:4]
        H, B = self.H, self.B
        params, actor, returns = testing.make_params(SIZES)
        pack = {"bf16": False, "gradients": gradients}
        inp, gru = pack_mlp(params.inp, act_last=True, **pack), pack_gru(params.gru, **pack)
        prior = pack_mlp(params.prior, **pack)
        heads = [pack_mlp(head, **pack) for head in returns[:3]]
        heads.append(heads[0])  # as a discount head: any of that shape
        self.imagine = {
            "op": "imagine",
            "rssm": (inp, gru, prior, tuple(params.latent)),
            "actor": (pack_mlp(actor.mlp, **pack), 5.0, tuple(actor.std), "tanh", False, False),
            "heads": (*heads, 0.99, 0.95, False, (None, False), (None, False), False),
            "start_deter": zeros(B, D),
            "start_stoch": zeros(B, S),
            "state_noise": zeros(H, B, S),
            "action_noise": zeros(H, B, A),
            "action": zeros(H, B, A),
            "outputs": tuple(
                zeros(*s) for s in [(H, B, D), *[(H, B, S)] * 3, *[(H, B)] * 5]
            ),
            "wants": (True, True, True, True, True, True),
            "threads": 1,
        }  # fmt: skip
        post = params.post
        first = post._replace(weights=post.weights[:1], biases=post.biases[:1])
        embed = pack_mlp(first, columns=(D, E), **pack)
        self.observe = {
            "rssm": (*self.imagine["rssm"], pack_mlp(post, columns=(0, D), bias=False, **pack),
                     embed),
            "start_deter": zeros(B, D),
            "start_stoch": zeros(B, S),
            "embed": zeros(H, B, E),
            "action": zeros(H, B, A),
            "is_first": np.zeros((H, B), np.bool_),
            "resets": (True, True, True),
            "noise": zeros(H, B, S),
            "outputs": tuple(zeros(H, B, n) for n in (D, S, S, S, S, S)),
            "keep": True,
            "threads": 1,
        }  # fmt: skip
        self.rssm_step = {
            "rssm": self.imagine["rssm"],
            "deter": zeros(B, D),
            "stoch": zeros(B, S),
            "action": zeros(B, A),
            "noise": zeros(B, S),
            "outputs": tuple(zeros(B, n) for n in (D, S, S, S)),
            "threads": 1,
        }

    def call(self, op: str, **replaced: Any) -> Any:
        arguments = {**getattr(self, op), **replaced}
        name = op if op == "rssm_step" else f"{op}_forward"
        return getattr(_native, name)(*arguments.values())


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def locked(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


WRONG_ARRAYS = {
    "another shape": lambda a: np.zeros((*a.shape[:-1], a.shape[-1] + 1), a.dtype),
    "fewer dimensions": lambda a: a[0].copy(),
    "empty": lambda a: a[:0],
    "float64": lambda a: a.astype(np.float64),
    "another byte order": lambda a: a.astype(">f4"),
    "strided": lambda a: np.repeat(a, 2, -1)[..., ::2],
    "backwards": lambda a: a[::-1],
    "transposed": lambda a: np.asfortranarray(a) if min(a.shape) > 1 else a[..., None],
}


@pytest.mark.parametrize("op", ["imagine", "observe", "rssm_step"])
def test_bindings_refuse_arrays_that_do_not_fit(op):
    forward = Forward()
    forward.call(op)
    arguments = getattr(forward, op)
    arrays = [name for name, value in arguments.items() if isinstance(value, np.ndarray)]
    for wrong, change in WRONG_ARRAYS.items():
        for name in arrays:
            with pytest.raises(ValueError, match=f"^{op}: .* must (be|have) "):
                forward.call(op, **{name: change(arguments[name])})
        for i in range(len(arguments["outputs"])):
            outputs = list(arguments["outputs"])
            outputs[i] = change(outputs[i])
            with pytest.raises(ValueError, match=f"^{op}: .* must (be|have) "):
                forward.call(op, outputs=tuple(outputs))
        assert wrong
    for name in arrays:
        for junk in (None, 1.0, [[0.0]], object()):
            with pytest.raises((TypeError, ValueError)):
                forward.call(op, **{name: junk})
    for i, output in enumerate(arguments["outputs"]):
        outputs = list(arguments["outputs"])
        outputs[i] = locked(output)
        with pytest.raises(ValueError, match="must be writable"):
            forward.call(op, outputs=tuple(outputs))
        for other in arrays:
            if arguments[other].shape == output.shape and arguments[other].dtype == np.float32:
                outputs[i] = arguments[other]
                with pytest.raises(ValueError, match="overlaps"):
                    forward.call(op, outputs=tuple(outputs))
        for j in range(i):
            if arguments["outputs"][j].shape == output.shape:
                outputs[i] = arguments["outputs"][j]
                with pytest.raises(ValueError, match="overlaps"):
                    forward.call(op, outputs=tuple(outputs))


@pytest.mark.parametrize("op", ["imagine", "observe", "rssm_step"])
def test_bindings_refuse_parts_that_do_not_fit(op):
    forward = Forward()
    arguments = getattr(forward, op)
    inp, gru, prior, *rest = arguments["rssm"]
    foreign = testing.make_params(SIZES._replace(D=8, hidden=12))[0]
    for bf16 in (False, True):
        pack = {"bf16": bf16, "gradients": True}
        params = foreign if not bf16 else testing.make_params(SIZES)[0]
        others = (
            pack_mlp(params.inp, act_last=True, **pack),
            pack_gru(params.gru, **pack),
            pack_mlp(params.prior, **pack),
        )
        for i, other in enumerate(others):
            rssm = [inp, gru, prior]
            rssm[i] = other
            with pytest.raises(ValueError, match=f"^{op}: "):
                forward.call(op, rssm=(*rssm, *rest))
    for rssm in [(), (inp, gru), (gru, inp, prior, *rest), (None, None, None, *rest), None, 3]:
        with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)):
            forward.call(op, rssm=rssm)
    for threads in (0, -1):
        with pytest.raises(ValueError, match="threads must be at least 1"):
            forward.call(op, threads=threads)
    with pytest.raises(TypeError):
        forward.call(op, threads=2**40)
    packs.forget()
    unready = Forward(gradients=False)
    if op == "rssm_step":  # this call has none
        unready.call(op)
        return
    with pytest.raises(ValueError, match="packed for gradients"):
        unready.call(op)


def test_backward_refuses_what_was_not_announced():
    A, D, S = SIZES[:3]
    H, B = Forward.H, Forward.B
    params, actor, returns = testing.make_params(SIZES)

    def layers(mlp):
        return [zeros(*t.shape) for t in flat(mlp)]

    good = {
        "grads": tuple(
            zeros(*s) for s in [(H, B, D), (H, B, S), (H, B, A), *[(H, B, S)] * 2, *[(H, B)] * 3]
        ),
        "inputs": (zeros(B, D), zeros(B, S), None),
        "actor": layers(actor.mlp),
        "inp": layers(params.inp),
        "gru": [zeros(*t.shape) for t in params.gru],
        "prior": layers(params.prior),
        "reward": layers(returns.reward),
        "discount": layers(returns.reward),
        "threads": 1,
    }  # fmt: skip
    tape = Forward().call("imagine")

    def backward(tape=tape, **replaced):
        _native.imagine_backward(tape, *{**good, **replaced}.values())

    backward()
    backward(grads=(None,) * 8, inputs=(None, None, None))
    for name in ("actor", "inp", "gru", "prior", "reward", "discount"):
        with pytest.raises(ValueError, match="not announced"):
            backward(**{name: None})
        with pytest.raises((ValueError, IndexError)):
            backward(**{name: good[name][:-1]})
        with pytest.raises((ValueError, IndexError)):
            backward(**{name: good[name][::-1]} if len(good[name]) > 1 else {name: []})
    with pytest.raises(ValueError, match="threads"):
        backward(threads=0)
    for i in range(8):
        grads = list(good["grads"])
        grads[i] = grads[i][..., :-1].copy()
        with pytest.raises(ValueError, match="grad of"):
            backward(grads=tuple(grads))
    with pytest.raises(ValueError, match="overlaps"):
        backward(inputs=(good["inputs"][0], good["inputs"][0].reshape(-1)[: B * S].reshape(B, S),
                         None))  # fmt: skip
    critic = layers(returns.critic)
    _native.critic_backward(tape, zeros(H, B), critic, 1)
    with pytest.raises(ValueError):
        _native.critic_backward(tape, zeros(H, B), critic[:-1], 1)
    with pytest.raises(ValueError):
        _native.critic_backward(tape, zeros(H, B + 1), critic, 1)
    forward_only = Forward().call("imagine", wants=(False, False, False, False, True, False))
    with pytest.raises(ValueError, match="no backward sweep"):
        backward(forward_only)
    without_critic = Forward().call("imagine", wants=(True, True, True, True, False, True))
    with pytest.raises(ValueError, match="no critic"):
        _native.critic_backward(without_critic, zeros(H, B), critic, 1)
    no_returns = Forward()
    outputs = list(no_returns.imagine["outputs"])
    outputs[6] = None
    tape = no_returns.call("imagine", outputs=tuple(outputs))
    with pytest.raises(ValueError):
        backward(tape)  # a gradient of returns that were not computed
