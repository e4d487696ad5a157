"""encode, decode and decode_error: gradcheck on eager, then native against eager float64.

Outputs and all gradients, fp32 and bf16, at the report's sizes and at remainders around every
vector, tile and chunk, on every ISA of the host (this file as a script) and for several numbers of
threads.
"""

import itertools
import math
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from native_and_eager import assert_threads_change_nothing
from torch import Tensor

from fastdreamer.ops.backend import BackendError, last_backend, use_backend
from fastdreamer.ops.codec import decode, decode_error, encode
from fastdreamer.ops.params import DecoderParams, EncoderParams
from fastdreamer.testing import (
    REPORT_CODEC,
    CodecSizes,
    assert_accurate,
    codec_inputs,
    error,
    evaluate,
)

OPS = {"encode": encode, "decode": decode, "decode_error": decode_error}
NARROW = CodecSizes(3, (4, 4, 4, 4), 16, 20, 16, True, (4, 4, 4))
ODD = CodecSizes(1, (5, 7, 9, 11), None, 13, 33, False, (9, 7, 5))
# images: tiles of ten (AMX: 16), groups of five, rows of pixels below four, chunks of several tiles
CASES = {
    "one": (REPORT_CODEC, 1),
    "report": (REPORT_CODEC, 12),
    "narrow": (NARROW, 3),
    "chunks": (NARROW._replace(embed=None), 203),
    "odd": (ODD, 7),
    "odd-pair": (ODD._replace(channels=2, encoder=(17, 16, 33, 3)), 11),
    "even": (ODD._replace(channels=2, encoder=(6, 10, 34, 18), decoder=(24, 40, 8)), 19),
    "wide": (CodecSizes(4, (20, 40, 72, 5), 7, 1, 3, True, (70, 50, 24)), 4),
}


def floats(results: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An embedding is bfloat16 under autocast."""
    return {name: tensor.float() for name, tensor in results.items()}


def check(op: str, inputs: Mapping[str, Any], *, bf16: bool = False, **options: Any) -> dict:
    fp32 = {"dtype": torch.float32, "autocast": bf16, **options}
    got = evaluate(OPS[op], inputs, backend="native", **fp32)
    eager = evaluate(OPS[op], inputs, backend="eager", **fp32)
    assert {name: t.dtype for name, t in got.items()} == {n: t.dtype for n, t in eager.items()}
    truth = evaluate(OPS[op], inputs, backend="eager", dtype=torch.float64, **options)
    assert_accurate(op, floats(got), floats(eager), truth, bf16=bf16, native=True)
    return got


def check_case(op: str, name: str, bf16: bool) -> None:
    """And without gradients, when nothing is kept, the same outputs."""
    inputs = codec_inputs(*CASES[name], smooth=bf16)[op]
    got = check(op, inputs, bf16=bf16)
    lean = evaluate(OPS[op], inputs, backend="native", dtype=torch.float32, autocast=bf16, wrt=())
    assert lean and all(torch.equal(got[key], out) for key, out in lean.items())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("op", OPS)
def test_sizes(op, name, bf16):
    check_case(op, name, bf16)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck_of_eager(op, check_gradients):
    sizes = CodecSizes(1, (2, 1, 2, 1), 2, 2, 2, True, (1, 2, 1))
    inputs = codec_inputs(sizes, 1, smooth=True, dtype=torch.float64)[op]
    # small images: gradcheck has a run for each of a weight's elements and of an output's
    if op == "encode":
        inputs["pixels"] = inputs["pixels"][:, :46, :46]
        inputs["params"] = inputs["params"]._replace(linear=None)
    else:
        decoder = inputs["params"]
        inputs["params"] = decoder._replace(weights=decoder.weights[:2], biases=decoder.biases[:2])
        if op == "decode_error":
            inputs["target"] = inputs["target"][:, :13, :13].repeat(1, 1, 1, 2)
    with use_backend("eager"):
        check_gradients(OPS[op], *inputs.values())


def test_the_error_is_that_of_the_images():
    """And its gradients are the images', for a gradient that is no power of two."""
    inputs = codec_inputs(NARROW, 23)["decode_error"]
    target = inputs.pop("target").double().div(255).sub(0.5).float()
    results = []
    for fused in (True, False):
        feat = inputs["feat"].clone().requires_grad_()
        if fused:
            raw = target.add(0.5).mul(255).round().to(torch.uint8)
            loss = decode_error(inputs["params"], feat, raw, backend="native")
        else:
            loss = (decode(inputs["params"], feat, backend="native") - target).square().sum()
        (loss / 7).backward()
        results.append((loss.detach(), feat.grad))
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("op", "wrt"),
    [
        ("encode", ("params.weights[1]",)),
        ("encode", ("params.biases",)),
        ("encode", ("params.linear",)),
        ("decode", ("feat",)),
        ("decode", ("params.weights[0]",)),
        ("decode", ("params.linear[1]", "params.biases[3]")),
        ("decode_error", ("feat",)),
        ("decode_error", ("params",)),
        ("decode_error", ("params.biases[0]",)),
    ],
)
def test_gradients_of_some_inputs(op, wrt, bf16):
    check(op, codec_inputs(NARROW, 5, smooth=bf16)[op], bf16=bf16, wrt=wrt)


def trained(params: Any) -> tuple[Any, list[Tensor]]:
    """The parameters as leaves."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.clone().requires_grad_())
        return leaves[-1]

    params = params._replace(
        weights=tuple(map(leaf, params.weights)),
        biases=tuple(map(leaf, params.biases)),
        linear=tuple(map(leaf, params.linear)),
    )
    return params, leaves


@pytest.mark.parametrize("op", OPS)
def test_backward_twice_and_no_second_derivative(op):
    inputs = codec_inputs(NARROW, 12)[op]
    params, leaves = trained(inputs["params"])
    out = OPS[op](**inputs | {"params": params}, backend="native").square().sum()
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out, leaves, retain_graph=True)))
    # gradients in their parameters' layouts: an optimiser walks both memories side by side
    assert [g.stride() for g in first] == [leaf.stride() for leaf in leaves]
    with pytest.raises(RuntimeError, match="native gradients have none of their own"):
        torch.autograd.grad(out, leaves, create_graph=True)


@pytest.mark.parametrize("op", OPS)
def test_what_was_changed_since_is_refused(op):
    inputs = codec_inputs(NARROW, 2)[op]
    params, leaves = trained(inputs["params"])
    out = OPS[op](**inputs | {"params": params}, backend="native").sum()
    with torch.no_grad():
        leaves[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("op", OPS)
def test_a_step_of_an_optimiser_is_seen(op):
    """Packed weights are not taken for new ones, fused Adam's included."""
    inputs = codec_inputs(NARROW, 3)[op]
    params, leaves = trained(inputs["params"])
    adam = torch.optim.Adam(leaves, lr=0.1, fused=True)
    for _ in range(2):
        OPS[op](**inputs | {"params": params}, backend="native").square().sum().backward()
        adam.step()
    results = [OPS[op](**inputs | {"params": params}, backend=b) for b in ("native", "eager")]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_weights_of_any_layout():
    """Contiguous ones, as after a plain construction, and views."""
    for op, inputs in codec_inputs(NARROW, 3).items():
        want = OPS[op](**inputs, backend="native")
        params = inputs["params"]
        params = params._replace(
            weights=tuple(w.contiguous() for w in params.weights),
            linear=(params.linear[0].t().contiguous().t(), params.linear[1]),
        )
        params, leaves = trained(params)
        got = OPS[op](**inputs | {"params": params}, backend="native")
        assert torch.equal(got, want)
        got.sum().backward()
        assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


def test_biases_that_are_not_contiguous():
    """Native takes them as it takes such weights, and gradients reach them."""
    for op, inputs in codec_inputs(NARROW, 3).items():
        params, leaves = trained(inputs["params"])
        strided = params._replace(
            biases=tuple(b.repeat_interleave(2)[::2] for b in params.biases),
            linear=(params.linear[0], params.linear[1].repeat_interleave(2)[::2]),
        )
        runs = []
        for given, backend in ((params, "native"), (strided, "native"), (strided, "eager")):
            out = OPS[op](**inputs | {"params": given}, backend=backend)
            runs.append([out.detach(), *torch.autograd.grad(out.square().mean(), leaves)])
        assert all(map(torch.equal, runs[1], runs[0]))
        for got, want in zip(*runs[1:], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_input_that_is_not_contiguous():
    """Native refuses it with the reason, auto takes eager."""
    inputs = codec_inputs(NARROW, 4)
    cases = {
        "encode": {"pixels": inputs["encode"]["pixels"].transpose(1, 2)},
        "decode": {"feat": inputs["decode"]["feat"].repeat(1, 2)[:, ::2]},
        "decode_error": {"target": inputs["decode_error"]["target"].flip(0).transpose(1, 2)},
    }
    for op, strided in cases.items():
        given = inputs[op] | strided
        with pytest.raises(BackendError, match="strides"):
            OPS[op](**given, backend="native")
        got = OPS[op](**given, backend="auto")
        assert last_backend(op) == "eager"
        (name, tensor), *_ = strided.items()
        want = OPS[op](**given | {name: tensor.contiguous()}, backend="native")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_goes_where_eager_lets_it(value, bf16):
    for op, inputs in codec_inputs(NARROW, 13).items():
        # Of a weight all taps, and no infinite ones: outside the image eager adds 0 · w.
        for name in ("biases", "weights")[: 1 + math.isnan(value)]:
            params = inputs["params"]
            spoiled = [t.clone() for t in getattr(params, name)]
            spoiled[1][0] = value
            given = inputs | {"params": params._replace(**{name: tuple(spoiled)})}
            runs = [
                evaluate(
                    OPS[op], given, backend=b, dtype=torch.float32, autocast=bf16,
                    wrt=("params.weights[3]", "params.biases[3]", "feat"),
                )
                for b in ("native", "eager")
            ]  # fmt: skip
            for key, want in runs[1].items():
                got = runs[0][key]
                assert torch.equal(got.isnan(), want.isnan()), (op, name, key)
                if key.startswith("out"):
                    assert torch.equal(got.isinf(), want.isinf()), (op, name, key)


@pytest.mark.parametrize("name", ["one", "odd", "chunks"])
@pytest.mark.parametrize("op", OPS)
def test_threads_change_nothing(op, name, threads):
    assert_threads_change_nothing(OPS[op], codec_inputs(*CASES[name])[op], threads)


def test_an_image_s_result_does_not_depend_on_the_batch():
    """So that acting sees what learning sees; AMX sums those of 16 images in another order."""
    from fastdreamer import _native

    inputs = codec_inputs(REPORT_CODEC, 23)
    for op, of in (("encode", "pixels"), ("decode", "feat")):
        for bf16 in (False, True):
            n = 16 if bf16 and _native.choice()["bf16"].startswith("amx") else 1
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                whole = OPS[op](**inputs[op], backend="native")
                for i in (0, 5, 23 - n):
                    some = inputs[op] | {of: inputs[op][of][i : i + n].clone()}
                    assert torch.equal(OPS[op](**some, backend="native"), whole[i : i + n])


def test_two_threads_at_once():
    inputs = codec_inputs(NARROW, 30)["decode_error"]
    options = {"backend": "native", "dtype": torch.float32}
    want, results = evaluate(decode_error, inputs, **options), {}
    pool = [
        threading.Thread(
            target=lambda i=i: results.update({i: evaluate(decode_error, inputs, **options)})
        )
        for i in range(2)
    ]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    for got in results.values():
        assert all(torch.equal(got[key], want[key]) for key in want)
    assert len(results) == 2


@pytest.mark.parametrize("op", OPS)
def test_two_threads_go_back_through_one_graph(op):
    """With other gradients each, again and again: neither writes what the other reads."""
    inputs = codec_inputs(NARROW, 30)[op]
    params, leaves = trained(inputs["params"])
    out = OPS[op](**inputs | {"params": params}, backend="native")
    weights = [torch.ones_like(out), torch.linspace(-1, 2, out.numel()).view_as(out)]
    start = threading.Barrier(2)

    def back(weight: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, weight, retain_graph=True)

    def work(weight: Tensor) -> list[tuple[Tensor, ...]]:
        torch.set_num_threads(1)
        results = []
        for _ in range(20):
            start.wait(60)
            results.append(back(weight))
        return results

    want = list(map(back, weights))
    with ThreadPoolExecutor(2) as pool:
        for results, expected in zip(pool.map(work, weights), want, strict=True):
            for got in results:
                assert all(map(torch.equal, got, expected))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_goes_on(threads):
    threads(2)
    inputs = codec_inputs(NARROW, 30)["encode"]
    want = encode(**inputs, backend="native")
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(encode(**inputs, backend="native"), want) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_matrix_products_of_torch_between_two_calls():
    """oneDNN may leave the processor's tiles in another state."""
    inputs = codec_inputs(REPORT_CODEC, 11)["decode_error"]
    options = {"backend": "native", "dtype": torch.float32, "autocast": True}
    want = evaluate(decode_error, inputs, **options)
    square = torch.randn(256, 256, dtype=torch.bfloat16)
    assert (square @ square).isfinite().all()
    got = evaluate(decode_error, inputs, **options)
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize(
    ("op", "changed", "message"),
    [
        ("encode", lambda x: {"pixels": x["pixels"].float()}, "pixels must be .* uint8"),
        ("encode", lambda x: {"pixels": x["pixels"][..., :2]}, r"height, width, 3\] uint8"),
        ("encode", lambda x: {"pixels": x["pixels"][:, :46]}, r"linear\[0\] must be"),
        ("encode", lambda x: {"pixels": x["pixels"][:, :9]}, "too small for the kernels"),
        ("decode", lambda x: {"feat": x["feat"][:, :-1].contiguous()}, r"linear\[0\] must be"),
        ("decode", lambda x: {"feat": x["feat"][0]}, r"feat must be \[N, F\]"),
        (
            "decode",
            lambda x: {"params": x["params"]._replace(biases=x["params"].biases[:3])},
            "4 weights, 3 biases",
        ),
        (
            "decode",
            lambda x: {"params": x["params"]._replace(weights=x["params"].weights[::-1])},
            r"biases\[0\] must be \[out=3\]",
        ),
        ("decode_error", lambda x: {"target": x["target"][:-1]}, r"target must be \[N=4"),
        ("decode_error", lambda x: {"target": x["target"][:, 1:]}, "target must be"),
    ],
)
def test_bad_input(op, changed, message):
    inputs = codec_inputs(NARROW, 4)[op]
    for backend in ("eager", "native"):
        with pytest.raises(ValueError, match=message):
            OPS[op](**inputs | changed(inputs), backend=backend)


def test_what_the_core_has_no_loop_for_is_eager_s():
    weight, bias = torch.randn(2, 3, 9, 9), torch.zeros(2)
    pixels = torch.randint(0, 256, (2, 20, 20, 3), dtype=torch.uint8)
    wide = {"params": EncoderParams((weight,), (bias,), None), "pixels": pixels}
    one = DecoderParams((torch.randn(4, 5), torch.zeros(4)), False, (torch.randn(4, 3, 5, 5),), (
        torch.zeros(3),
    ))  # fmt: skip
    cases = [
        (encode, wide, "a kernel of 9, native has 8"),
        (decode, {"params": one, "feat": torch.randn(2, 5)}, "one convolution, native needs 2"),
    ]
    for op, inputs, reason in cases:
        with pytest.raises(BackendError, match=reason):
            op(**inputs, backend="native")
        out = op(**inputs, backend="auto")
        assert last_backend(op.__name__) == "eager"
        assert torch.equal(out, op(**inputs, backend="eager"))


def test_double_and_empty_are_eager_s():
    for dtype, N in ((torch.float64, 2), (torch.float32, 0)):
        for op, inputs in codec_inputs(NARROW, N, dtype=dtype).items():
            with pytest.raises(BackendError, match="float64|empty"):
                OPS[op](**inputs, backend="native")
            out = OPS[op](**inputs, backend="auto")
            assert last_backend(op) == "eager" and out.dtype == dtype


def test_isa(run_on_isa):
    run_on_isa(__file__)


def test_no_worse_than_autocast_at_the_report_s_sizes():
    """All gradients together: those of single layers are as the ReLUs near their kinks fall."""
    for op, inputs in codec_inputs(REPORT_CODEC, 50).items():
        fp32 = {"dtype": torch.float32, "autocast": True}
        got, eager = (evaluate(OPS[op], inputs, backend=b, **fp32) for b in ("native", "eager"))
        truth = evaluate(OPS[op], inputs, backend="eager", dtype=torch.float64)

        def overall(results, truth=truth):
            relative = [error(results[k], t) / float(t.norm()) for k, t in truth.items()]
            return sum(e * e for e in relative) ** 0.5

        assert overall(got) <= 1.05 * overall(eager), op


if __name__ == "__main__":
    from fastdreamer import _native

    torch.set_num_threads(2)
    for op, name, bf16 in itertools.product(OPS, ("one", "narrow", "odd", "wide"), (False, True)):
        check_case(op, name, bf16)
    print(_native.isa())
