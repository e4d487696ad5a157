"""The native recurrent ops (imagine, observe, open_loop, rssm_step) against eager float64.

Outputs and all gradients, fp32 and bf16, at Walker's sizes and at remainders around every tile, on
every ISA of the host and for several numbers of threads. The environment chooses the instruction
set, once a process, so those run this file as a script.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any
from unittest import mock

import native_and_eager
import pytest
import torch
from native_and_eager import assert_threads_change_nothing
from torch import Tensor

from fastdreamer import testing
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.layers import MLPParams
from fastdreamer.ops.native.packs import arrays, flat, pack_gru, pack_mlp
from fastdreamer.ops.observe import observe
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.rssm_step import rssm_step
from fastdreamer.testing import REPORT, Sizes, assert_accurate, error, evaluate

# sizes, H or T, B, layers of inp and of prior and posterior. Rows: tiles of 50 and vector loops;
# columns: panels of 16 and their remainders. The ReLU cases of few units are for float32: in
# bfloat16 a unit near its kink may switch, in eager as well as here, and with five units one alone
# decides the error. The wide one is for bfloat16: in float32 no unit of the small ones lies that
# near to its kink.
CASES = {
    "one-row": (Sizes(1, 7, 1, 1, 17, 5, 0, 1, 2, "relu"), 2, 1, (1, 1)),
    "long": (Sizes(3, 16, 5, 33, 17, 5, 3, 2, 1, "silu", 40), 15, 2, (2, 3)),
    "tile-1": (Sizes(6, 21, 30, 4, 17, 5, 1, 0, 3, "tanh"), 1, 49, (3, 1)),
    "tile": (Sizes(1, 21, 5, 17, 17, 9, 2, 3, 0, "elu"), 2, 50, (1, 4)),
    "tile+1": (Sizes(3, 7, 30, 8, 33, 400, 1, 1, 1, "silu"), 2, 51, (4, 2)),
    "tiles+1": (Sizes(6, 16, 1, 4, 17, 5, 2, 1, 2, "relu"), 2, 101, (1, 2)),
    "wide": (Sizes(3, 200, 5, 70, 400, 17, 0, 2, 1, "tanh", 200), 1, 7, (2, 2)),
    "wide-relu": (Sizes(6, 200, 30, 4, 400, 400, 2, 3, 3, "relu"), 2, 16, (1, 2)),
}
ONLY_FP32 = ("one-row", "tiles+1")
ONLY_BF16 = ("wide-relu",)
SMALL = CASES["tile+1"][0]._replace(units=17)
OPS = {"imagine": imagine, "observe": observe, "open_loop": open_loop, "rssm_step": rssm_step}


def make_inputs(op: str, sizes: Sizes, H: int, B: int, layers=(1, 2), **options) -> dict[str, Any]:
    """Arguments of an op whose input layer and latent heads have that many layers."""
    if op == "rssm_step":
        inputs = testing.rssm_step_inputs(sizes, B, **options)
    elif op == "observe":
        inputs = testing.observe_inputs(sizes, H, B, **options)
    elif op == "open_loop":
        inputs = testing.open_loop_inputs(sizes, H, B, **options)
    else:
        inputs = testing.imagine_inputs(sizes, H, B, heads=True, **options)
    generator = torch.Generator().manual_seed(5)
    params = inputs["params"]

    def mlp(*widths: int) -> MLPParams:
        def uniform(fan: int, *shape: int) -> Tensor:
            return (2 * torch.rand(*shape, generator=generator) - 1) / fan**0.5

        pairs = list(itertools.pairwise(widths))
        weights = tuple(uniform(a, b, a) for a, b in pairs)
        return MLPParams(weights, tuple(uniform(a, b) for a, b in pairs), sizes.activation)

    A, D, S, E, hidden = sizes[:5]
    inp = mlp(S + A, *[sizes.input_hidden or hidden] * layers[0])
    prior, post = (mlp(n, *[hidden] * (layers[1] - 1), 2 * S) for n in (D, D + E))
    return inputs | {"params": params._replace(inp=inp, prior=prior, post=post)}


def results(op: str, inputs: Mapping[str, Any], *, bf16: bool, **options) -> tuple[dict, ...]:
    return native_and_eager.results(OPS[op], inputs, bf16=bf16, **options)


def overall(result: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """One number for all results and gradients: their relative errors' root of squares."""
    relative = (
        error(result[k], exact) / float(exact.norm()) for k, exact in truth.items() if exact.any()
    )
    return sum(e * e for e in relative) ** 0.5


def check(op: str, inputs: Mapping[str, Any], *, bf16: bool = False, **options) -> None:
    assert_accurate(op, *results(op, inputs, bf16=bf16, **options), bf16=bf16, native=True)


def check_case(op: str, name: str, bf16: bool) -> None:
    """And without gradients, when nothing is kept, the same outputs."""
    inputs = make_inputs(op, *CASES[name])
    got, eager, truth = results(op, inputs, bf16=bf16)
    assert_accurate(op, got, eager, truth, bf16=bf16, native=True)
    lean = inferred(op, inputs, bf16)
    assert lean and all(torch.equal(got[name], out) for name, out in lean.items())


def inferred(op: str, inputs: Mapping[str, Any], bf16: bool) -> dict[str, Tensor]:
    """Native's outputs without gradients, for which rssm_step has a call of its own."""
    from fastdreamer import _native

    with torch.no_grad(), mock.patch.object(_native, "rssm_step", wraps=_native.rssm_step) as spy:
        fp32 = {"dtype": torch.float32, "autocast": bf16, "wrt": ()}
        outputs = evaluate(OPS[op], inputs, backend="native", **fp32)
    assert spy.call_count == (op == "rssm_step")
    return outputs


def precisions(name: str) -> list[bool]:
    return [False] * (name not in ONLY_BF16) + [True] * (name not in ONLY_FP32)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("op", OPS)
def test_sizes(op, name):
    for bf16 in precisions(name):
        check_case(op, name, bf16)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("op", "shape"),
    [("imagine", (15, 50)), ("observe", (50, 8)), ("open_loop", (15, 50)), ("rssm_step", (1, 50))],
)
def test_walker_from_pixels(op, shape, bf16):
    """And in bfloat16 no error is larger than autocast's."""
    got, eager, truth = results(op, make_inputs(op, REPORT, *shape), bf16=bf16)
    assert_accurate(op, got, eager, truth, bf16=bf16, native=True)
    if bf16:
        for name, exact in truth.items():
            assert error(got[name], exact) <= error(eager[name], exact), name
        return

    allowed = 2 * overall(eager, truth)
    if overall(got, truth) > allowed:
        relative = (truth.spread[k] / float(exact.norm()) for k, exact in truth.items())
        allowed = max(allowed, 2 * sum(r * r for r in relative) ** 0.5)
    assert overall(got, truth) <= allowed


@pytest.mark.parametrize("activation", ["elu", "relu", "silu", "tanh"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("op", ["imagine", "observe"])
def test_activations(op, activation, frozen):
    sizes = Sizes(3, 21, 5, 7, 40, 40, 2, 3, 2, activation)
    wrt = ("actor", "start", "returns", "embed", "action") if frozen else None
    for bf16 in (False, True)[: 1 if activation == "relu" else 2]:
        check(op, make_inputs(op, sizes, 4, 13), bf16=bf16, wrt=wrt)


def test_an_embedding_in_bfloat16():
    """As the encoder hands it over under autocast; its gradient comes back in bfloat16."""
    inputs = make_inputs("observe", *CASES["long"])
    wide = evaluate(
        observe,
        {**inputs, "embed": inputs["embed"].bfloat16()},
        backend="native", dtype=torch.float32, autocast=True,
    )  # fmt: skip
    grads = []
    for embed in (inputs["embed"].bfloat16(), inputs["embed"].bfloat16().float()):
        for bf16 in (True, False):
            given = embed.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                seen = observe(**inputs | {"embed": given}, backend="native")
            if bf16:
                assert torch.equal(seen.post.mean, wide["out.post.mean"])
            seen.state.stoch.square().sum().backward()
            assert given.grad.dtype == embed.dtype
            grads.append(given.grad.bfloat16())
    assert torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[3])


def check_without_eager(op: str, name: str) -> None:
    """Native and eager alike are within what roundings come to: no limit is another's luck."""
    got, eager, truth = results(op, make_inputs(op, *CASES[name]), bf16=False)
    nearest = {key: exact.float() for key, exact in truth.items()}
    for found in (got, eager):
        assert_accurate(op, found, nearest, truth)


@pytest.mark.parametrize("name", ["one-row", "long", "tile+1"])
@pytest.mark.parametrize("op", OPS)
def test_accurate_whatever_eager_is(op, name):
    check_without_eager(op, name)


# --- which gradients ----------------------------------------------------------------------------

PARTS = ("params", "actor", "start", "returns.reward", "returns.critic")


@pytest.mark.parametrize("target", [False, True])
def test_every_subset_of_gradients(target):
    inputs = make_inputs("imagine", SMALL, 3, 4)
    if not target:
        inputs["returns"] = inputs["returns"]._replace(target=None)
    for n in range(len(PARTS) + 1):
        for wrt in itertools.combinations(PARTS, n):
            check("imagine", inputs, wrt=wrt)


@pytest.mark.parametrize(
    ("op", "wrt"),
    [
        ("imagine", "params.gru.bias_hh"),
        ("imagine", "params.inp.weights[0]"),
        ("imagine", "actor.mlp.biases[1]"),
        ("imagine", "start.stoch"),
        ("imagine", "returns.critic.weights[1]"),
        ("imagine", "returns.reward.biases[0]"),
        ("imagine", "returns.target"),
        ("open_loop", "action"),
        ("open_loop", "start.deter"),
        ("open_loop", "params.prior.weights[0]"),
        ("rssm_step", "action"),
        ("rssm_step", "state.stoch"),
        ("rssm_step", "params"),
        ("observe", "embed"),
        ("observe", "action"),
        ("observe", "start.deter"),
        ("observe", "params.post.weights[0]"),
        ("observe", "params.prior"),
        ("observe", "params.gru.bias_ih"),
    ],
)
def test_gradient_of_one_input(op, wrt):
    check(op, make_inputs(op, SMALL, 3, 4), wrt=(wrt,))


@pytest.mark.parametrize("frozen", [False, True])
def test_every_subset_of_outputs(frozen):
    """Outputs that nothing uses leave None where their gradient would be."""
    inputs = make_inputs("imagine", SMALL, 3, 4)
    wrt = ("actor", "start", "returns") if frozen else None
    names = ("deter", "stoch", "action", "reward", "value", "returns")
    for n in range(1, len(names) + 1):
        for using in itertools.combinations(names, n):
            check("imagine", inputs, wrt=wrt, using=[f"out.{name}" for name in using])


@pytest.mark.parametrize(
    ("op", "outputs"),
    [
        ("open_loop", ("out.deter", "out.stoch")),
        ("rssm_step", ("out[0].deter", "out[0].stoch", "out[1].mean", "out[1].std")),
        ("observe", ("out.state.deter", "out.state.stoch", "out.post.std", "out.prior.mean")),
    ],
)
def test_every_subset_of_the_outputs_of_others(op, outputs):
    inputs = make_inputs(op, SMALL, 3, 4)
    for n in range(1, len(outputs) + 1):
        for using in itertools.combinations(outputs, n):
            check(op, inputs, using=using)


def test_without_heads_and_without_gradients():
    inputs = make_inputs("imagine", SMALL, 3, 4)
    del inputs["returns"]
    for bf16 in (False, True):
        check("imagine", inputs, bf16=bf16)
    for op in OPS:
        inputs = make_inputs(op, SMALL, 3, 4)
        for bf16 in (False, True):
            got, eager, truth = results(op, inputs, bf16=bf16, wrt=())
            assert_accurate(op, got, eager, truth, bf16=bf16, native=True)
            taped = evaluate(OPS[op], inputs, backend="native", dtype=torch.float32, autocast=bf16)
            # inference keeps nothing and computes the same
            assert all(torch.equal(got[name], taped[name]) for name in got)


def leaves_of(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], list[Tensor], list[Tensor]]:
    """The arguments with actor and critic trained, and those parameters."""
    actor, returns = inputs["actor"], inputs["returns"]

    def trained(mlp: MLPParams) -> MLPParams:
        return MLPParams(
            *(tuple(t.clone().requires_grad_() for t in part) for part in mlp[:2]), mlp.activation
        )

    actor = actor._replace(mlp=trained(actor.mlp))
    returns = returns._replace(critic=trained(returns.critic))
    leaves = ([*m.weights, *m.biases] for m in (actor.mlp, returns.critic))
    return {**inputs, "actor": actor, "returns": returns}, *leaves


@pytest.mark.parametrize("target", [False, True])
def test_actor_and_critic_in_any_order_together_and_twice(target):
    inputs = make_inputs("imagine", SMALL, 3, 60)
    if not target:
        inputs["returns"] = inputs["returns"]._replace(target=None)
    inputs, actor, critic = leaves_of(inputs)

    def gradients(*order: str) -> list[tuple[Tensor, ...]]:
        dream = imagine(**inputs, backend="native")
        losses = {
            "actor": (-dream.returns.mean(), actor),
            "critic": ((dream.value - dream.returns.detach()).square().mean(), critic),
        }
        return [torch.autograd.grad(*losses[which], retain_graph=True) for which in order]

    dream = imagine(**inputs, backend="native")
    loss = -dream.returns.mean() + (dream.value - dream.returns.detach()).square().mean()
    together = torch.autograd.grad(loss, [*actor, *critic])
    want = {"actor": together[: len(actor)], "critic": together[len(actor) :]}
    for order in [("actor", "critic"), ("critic", "actor"), ("actor", "critic") * 2]:
        for which, got in zip(order, gradients(*order), strict=True):
            assert all(map(torch.equal, got, want[which])), (order, which)


def test_there_is_no_second_derivative():
    inputs, actor, _ = leaves_of(make_inputs("imagine", SMALL, 2, 3))
    dream = imagine(**inputs, backend="native")
    # at once: later, where other terms of a loss have one, nobody would notice that it is missing
    with pytest.raises(RuntimeError, match="native gradients have none of their own"):
        torch.autograd.grad(dream.returns.sum(), actor, create_graph=True)


def test_what_nothing_reaches_gets_no_gradient():
    """As with eager: an optimiser would move a parameter with a gradient of zeros."""
    inputs, _, _ = leaves_of(make_inputs("imagine", SMALL, 2, 3))
    reward = [t.requires_grad_() for t in inputs["returns"].reward.weights]
    dream = imagine(**inputs, backend="native")
    assert torch.autograd.grad(dream.stoch.sum(), reward, allow_unused=True) == (None,) * len(
        reward
    )


# --- threads and ISAs ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one-row", "tile-1", "tiles+1", "wide"])
@pytest.mark.parametrize("op", OPS)
def test_threads_change_nothing(op, name, threads):
    inputs = make_inputs(op, *CASES[name])
    lean = functools.partial(inferred, op, inputs)
    assert_threads_change_nothing(OPS[op], inputs, threads, lean)


def test_isa(run_on_isa):
    run_on_isa(__file__)


# --- the bindings' buffers ----------------------------------------------------------------------


class Guarded:
    """Makes arrays full of NaN inside larger ones, and looks at both afterwards."""

    MARGIN = 64

    def __init__(self) -> None:
        self.made: list[tuple[Tensor, Tensor]] = []

    def new(self, *shape: int) -> Any:
        size = torch.Size(shape).numel()
        whole = torch.full((size + 2 * self.MARGIN,), float("nan"))
        self.made.append((whole[self.MARGIN : self.MARGIN + size].view(shape), whole))
        return self.made[-1][0].numpy()

    def like(self, tensors: tuple[Tensor, ...]) -> list:
        return [self.new(*t.shape) for t in tensors]

    def layers(self, mlp: MLPParams) -> list:
        return self.like(flat(mlp))

    def check(self, label: Any) -> None:
        for i, (inner, whole) in enumerate(self.made):
            assert inner.isfinite().all(), (label, i, tuple(inner.shape), "not all written")
            ends = torch.cat([whole[: self.MARGIN], whole[-self.MARGIN :]])
            assert ends.isnan().all(), (label, i, tuple(inner.shape), "written beside")


def check_buffers(name: str, bf16: bool, threads: int) -> None:
    """Forward and backward write every element of their outputs and nothing beside them."""
    from fastdreamer import _native

    sizes, H, B, layers = CASES[name]
    A, D, S = sizes[:3]
    given = make_inputs("imagine", sizes, H, B, layers)
    params, actor, returns, start = (given[k] for k in ("params", "actor", "returns", "start"))
    pack = {"bf16": bf16, "gradients": True}
    model = (
        pack_mlp(params.inp, act_last=True, **pack),
        pack_gru(params.gru, **pack),
        pack_mlp(params.prior, **pack),
        params.latent,
    )
    discount = returns.discount or returns.reward
    heads = (*(pack_mlp(head, **pack) for head in (*returns[:3], discount)), *returns[3:5], False)
    heads += ((None, False), (None, False), False)
    for with_actor in (True, False):
        g = Guarded()
        policy = (
            (pack_mlp(actor.mlp, **pack), *actor[1:3], "tanh", True, False) if with_actor else None
        )
        action = g.new(H, B, A) if with_actor else testing.open_loop_inputs(sizes, H, B)["action"]
        shapes = [(H, B, D), *[(H, B, S)] * 3, *[(H, B)] * 5]
        noise = arrays(*start, given["state_noise"], given["action_noise"] if with_actor else None)
        tape = _native.imagine_forward(
            "imagine",
            *(model, policy, heads, *noise),
            action if with_actor else action.numpy(),
            tuple(g.new(*shape) for shape in shapes),
            (True, with_actor, True, True, True, True),
            threads,
        )
        g.check((name, with_actor, "forward"))
        g = Guarded()
        ones = [(H, B, D), (H, B, S), (H, B, A), (H, B, S), (H, B, S), (H, B), (H, B), (H, B)]
        _native.imagine_backward(
            tape,
            tuple(torch.ones(shape).numpy() for shape in ones),
            (g.new(B, D), g.new(B, S), None if with_actor else g.new(H, B, A)),
            g.layers(actor.mlp) if with_actor else None,
            g.layers(params.inp),
            g.like(params.gru),
            g.layers(params.prior),
            g.layers(returns.reward),
            g.layers(discount),
            threads,
        )
        value_grad = torch.ones(H, B).numpy()
        _native.critic_backward(tape, value_grad, g.layers(returns.critic), threads)
        g.check((name, with_actor, "backward"))


def check_observe_buffers(name: str, bf16: bool, threads: int) -> None:
    from fastdreamer import _native

    sizes, T, B, layers = CASES[name]
    A, D, S, E = sizes[:4]
    given = make_inputs("observe", sizes, T, B, layers)
    params = given["params"]
    pack = {"bf16": bf16, "gradients": True}
    post, g = params.post, Guarded()
    first = post._replace(weights=post.weights[:1], biases=post.biases[:1])
    tape = _native.observe_forward(
        (
            pack_mlp(params.inp, act_last=True, **pack),
            pack_gru(params.gru, **pack),
            pack_mlp(params.prior, **pack),
            params.latent,
            pack_mlp(post, columns=(0, D), bias=False, **pack),
            pack_mlp(first, columns=(D, E), **pack),
        ),
        *arrays(*given["start"], *(given[k] for k in ("embed", "action", "is_first"))),
        (True, True, True),
        given["noise"].numpy(),
        tuple(g.new(T, B, n) for n in (D, S, S, S, S, S)),
        True,
        threads,
    )
    g.check((name, "forward"))
    g = Guarded()
    _native.observe_backward(
        tape,
        tuple(torch.ones(T, B, n).numpy() for n in (D, S, S, S, S, S)),
        (g.new(B, D), g.new(B, S), g.new(T, B, E), g.new(T, B, A), None, None),
        (g.layers(params.inp), g.like(params.gru), g.layers(params.prior), g.layers(post)),
        threads,
    )
    g.check((name, "backward"))


def check_rssm_step_buffers(name: str, bf16: bool, threads: int) -> None:
    from fastdreamer import _native

    sizes, _, B, layers = CASES[name]
    D, S = sizes[1:3]
    given = make_inputs("rssm_step", sizes, 1, B, layers)
    params = given["params"]
    pack = {"bf16": bf16, "gradients": False}
    model = (
        pack_mlp(params.inp, act_last=True, **pack),
        pack_gru(params.gru, **pack),
        pack_mlp(params.prior, **pack),
        params.latent,
    )
    g = Guarded()
    outputs = g.new(B, D), g.new(B, S), g.new(B, S), g.new(B, S)
    inputs = arrays(*given["state"], given["action"], given["noise"])
    _native.rssm_step(model, *inputs, outputs, threads)
    g.check(name)


@pytest.mark.parametrize("name", CASES)
def test_buffers(name):
    for bf16, threads in itertools.product((False, True), (1, 3)):
        check_buffers(name, bf16, threads)
        check_observe_buffers(name, bf16, threads)
        check_rssm_step_buffers(name, bf16, threads)


if __name__ == "__main__":
    from fastdreamer import _native

    torch.set_num_threads(1)
    for name in CASES:
        for op in OPS:
            for bf16 in precisions(name):
                check_case(op, name, bf16)
            if name in ("one-row", "long"):
                check_without_eager(op, name)
        for bf16 in (False, True):
            check_buffers(name, bf16, 2)
            check_observe_buffers(name, bf16, 2)
            check_rssm_step_buffers(name, bf16, 2)
    print(_native.isa())
