"""lambda_return: every backend, ISA and thread count against eager float64.

The environment chooses the instruction set and Triton's interpreter, once a process, so those
checks run this file as a script in a process of their own.
"""

import sys

import forked
import pytest
import torch

from fastdreamer.ops.backend import last_backend
from fastdreamer.ops.lambda_return import lambda_return
from fastdreamer.testing import (
    assert_accurate,
    compile_ahead,
    error,
    evaluate,
    lambda_return_inputs,
)

# around the vector widths 8 and 16, the 128 columns of a Triton program, and enough for threads
SHAPES = [(1, 1), (1, 17), (2, 7), (3, 8), (2, 9), (5, 15), (5, 16), (15, 33), (4, 129), (15, 400)]
THREADED = (15, 1703)
LAMBDAS = (0.0, 0.95, 1.0)


def check_backend(backend: str, shapes=SHAPES, rtol: float | None = None) -> None:
    for shape in shapes:
        for lam in LAMBDAS:
            inputs = lambda_return_inputs(*shape, lam=lam)
            truth = evaluate(lambda_return, inputs, backend="eager", dtype=torch.float64)
            eager = evaluate(lambda_return, inputs, backend="eager", dtype=torch.float32)
            got = evaluate(lambda_return, inputs, backend=backend, dtype=torch.float32)
            if rtol is None:
                assert_accurate("lambda_return", got, eager, truth)
            for name, exact in truth.items():
                limit = (rtol or 2e-5) * float(torch.linalg.vector_norm(exact))
                assert error(got[name], exact) <= limit, (shape, lam, name)


def guarded(shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a NaN-filled [H, B] array and the larger one it lies in."""
    whole = torch.full((shape[0] * shape[1] + 64,), float("nan"))
    return whole[32:-32].view(shape), whole


def check_native_buffers() -> None:
    """Native writes every element of its outputs, nothing else, and the same on all threads."""
    from fastdreamer import _native

    for shape in [*SHAPES, THREADED]:
        inputs = lambda_return_inputs(*shape)
        want = evaluate(lambda_return, inputs, backend="native", dtype=torch.float32)
        arrays = [inputs[k].float().numpy() for k in ("reward", "next_value", "discount")]
        # the cotangent that evaluate() draws
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).numpy()
        for threads in (1, 2, 3):
            outputs = [guarded(shape) for _ in range(4)]
            returns, *grads = [inner.numpy() for inner, _ in outputs]
            _native.lambda_return_forward(*arrays, inputs["lam"], returns, threads)
            _native.lambda_return_backward(
                grad, *arrays[1:], returns, inputs["lam"], *grads, threads
            )
            for (inner, whole), name in zip(outputs, want, strict=True):
                assert torch.equal(inner, want[name]), (shape, threads, name)
                assert whole[:32].isnan().all() and whole[-32:].isnan().all(), (shape, threads)


def run_self(*arguments: str, **environment: str) -> str:
    done = forked.run(__file__, *arguments, keep=True, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


# --- eager -------------------------------------------------------------------------------------


def test_eager_is_the_published_equation():
    reward, value = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[10.0], [20.0], [30.0]])
    discount = torch.tensor([[0.5], [0.0], [0.9]])
    got = lambda_return(reward, value, discount, 0.75, backend="eager")
    last = 3 + 0.9 * 30  # the last step bootstraps fully
    middle = 2.0  # ends the episode: nothing after it counts
    first = 1 + 0.5 * (0.25 * 10 + 0.75 * middle)
    torch.testing.assert_close(got, torch.tensor([[first], [middle], [last]]))
    assert last_backend("lambda_return") == "eager"


def test_lambda_one_is_the_discounted_sum_and_zero_the_one_step_target():
    inputs = lambda_return_inputs(6, 3)
    reward, value = inputs["reward"], inputs["next_value"]
    discount = torch.full_like(reward, 0.9)
    powers = 0.9 ** torch.arange(7, dtype=torch.float64)
    total = (powers[:6, None] * reward).sum(0) + powers[6] * value[-1]
    got = lambda_return(reward, value, discount, 1.0)
    torch.testing.assert_close(got[0], total)
    torch.testing.assert_close(
        lambda_return(reward, value, discount, 0.0), reward + discount * value
    )


@pytest.mark.parametrize("shape", [(1, 1), (4, 3)])
@pytest.mark.parametrize("lam", LAMBDAS)
def test_eager_gradcheck(shape, lam):
    inputs = lambda_return_inputs(*shape)
    tensors = [inputs[k].requires_grad_() for k in ("reward", "next_value", "discount")]
    assert torch.autograd.gradcheck(
        lambda r, v, d: lambda_return(r, v, d, lam, backend="eager"), tensors
    )


# --- native ------------------------------------------------------------------------------------


def test_native():
    check_backend("native")
    check_native_buffers()


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512bf16", "amx", "amx_emulated"])
def test_native_on_isa(isa):
    from fastdreamer import _native

    reason = _native.isa_reasons()[isa]
    if reason is None:
        assert run_self("native", FASTDREAMER_ISA=isa) == isa
        return
    with pytest.raises(AssertionError) as refusal:
        run_self("native", FASTDREAMER_ISA=isa)
    assert f"FASTDREAMER_ISA is '{isa}'; this machine has" in str(refusal.value)
    assert reason in str(refusal.value)


def test_unknown_isa_lists_those_of_the_host():
    with pytest.raises(AssertionError, match="FASTDREAMER_ISA is 'mmx'; this machine has scalar"):
        run_self("native", FASTDREAMER_ISA="mmx")


def test_native_takes_expanded_gradients_and_leaves_constants_alone():
    inputs = lambda_return_inputs(5, 9)
    reward = inputs["reward"].float().requires_grad_()
    value, discount = inputs["next_value"].float(), inputs["discount"].float()
    lambda_return(reward, value, discount, 0.95, backend="native").sum().backward()
    native = reward.grad
    reward.grad = None
    lambda_return(reward, value, discount, 0.95, backend="eager").sum().backward()
    torch.testing.assert_close(native, reward.grad)
    assert value.grad is None and discount.grad is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_extension_shares_the_openmp_runtime_of_torch():
    from fastdreamer import _native

    assert _native.build_info()["openmp"]
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if "libgomp" in line}
    assert len(loaded) == 1, loaded


def test_auto_is_native_for_float32_and_eager_for_others():
    inputs = lambda_return_inputs(3, 4)
    tensors = [inputs[k] for k in ("reward", "next_value", "discount")]
    lambda_return(*tensors, 0.95)
    assert last_backend("lambda_return") == "eager"
    lambda_return(*[x.float() for x in tensors], 0.95)
    assert last_backend("lambda_return") == "native"
    lambda_return(*[x.float().T for x in tensors], 0.95)
    assert last_backend("lambda_return") == "eager"
    assert lambda_return(*[x.bfloat16() for x in tensors], 0.95).dtype == torch.bfloat16


def test_bindings_reject_what_the_kernels_cannot_take():
    import numpy as np

    from fastdreamer import _native

    good = [np.zeros((3, 4), np.float32) for _ in range(4)]

    def forward(position=None, array=None, lam=0.5, threads=1):
        arrays = list(good)
        if position is not None:
            arrays[position] = array
        _native.lambda_return_forward(*arrays[:3], lam, arrays[3], threads)

    forward()
    for position, array, message in [
        (1, np.zeros((3, 5), np.float32), r"next_value must be \[3, 4\] float32.*got \[3, 5\]"),
        (2, np.zeros((3, 4)), "discount must be .* got .* of buffer format 'd'"),
        (2, np.zeros((4, 3), np.float32).T, "discount must be .* got .* byte strides"),
        (1, np.zeros(12, np.float32), "next_value must be \\[3, 4\\] .* got \\[12\\]"),
        (0, np.zeros((0, 4), np.float32), "empty"),
        (3, good[0], "returns overlaps reward"),
    ]:
        with pytest.raises(ValueError, match=message):
            forward(position, array)
    locked = np.zeros((3, 4), np.float32)
    locked.flags.writeable = False
    with pytest.raises(ValueError, match="returns must be writable"):
        forward(3, locked)
    with pytest.raises(ValueError, match="lam must be in"):
        forward(lam=float("nan"))
    with pytest.raises(ValueError, match="threads must be at least 1"):
        forward(threads=0)
    with pytest.raises(TypeError):
        forward(0, [[0.0]])


# --- triton ------------------------------------------------------------------------------------


def test_triton_under_the_interpreter():
    assert run_self("triton", TRITON_INTERPRET="1") == "triton"


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_triton_compiles_without_spills(arch):
    from fastdreamer.ops.triton import lambda_return as module

    programs = module.forward_program(3, 5, 0.95), module.backward_program(3, 5, 0.95)
    for program, pointers in zip(programs, (4, 7), strict=True):
        (launch,) = program.body
        kernel = launch.kernel
        signature = dict.fromkeys(kernel.arguments[:pointers], "*fp32")
        signature |= {"H": "i32", "B": "i32", "lam": "fp32", "mix": "fp32"}
        assert dict(launch.spec({}).types) == signature
        used = compile_ahead(
            kernel.fn, signature, kernel.constants, arch=arch, options=kernel.options
        )
        assert used.stack == used.local == used.shared == 0, used
        assert used.registers <= 64, used


# --- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"reward": torch.zeros(3)}, ValueError, r"reward must be \[H, B\] floating, got \[3\]"),
        ({"reward": [1.0]}, TypeError, "reward must be a tensor, got list"),
        ({"reward": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, "got .* int64"),
        (
            {"next_value": torch.zeros(3, 5)},
            ValueError,
            r"lambda_return: next_value must be \[H=3, B=4\] float32, got \[3, 5\] float32",
        ),
        ({"discount": torch.zeros(3, 4).double()}, ValueError, "discount must be .* float64"),
        ({"lam": 1.5}, ValueError, r"lam must be in \[0, 1\], got 1.5"),
        ({"lam": float("nan")}, ValueError, "lam must be in"),
        ({"backend": "fast"}, ValueError, "eager, native, triton, auto, got 'fast'"),
    ],
)
def test_wrong_arguments(change, kind, message):
    zeros = torch.zeros(3, 4)
    arguments = {"reward": zeros, "next_value": zeros, "discount": zeros, "lam": 0.95} | change
    with pytest.raises(kind, match=message):
        lambda_return(**arguments)


def test_empty_is_refused():
    zeros = torch.zeros(0, 4)
    with pytest.raises(ValueError, match="empty"):
        lambda_return(zeros, zeros, zeros, 0.95)


if __name__ == "__main__":
    if sys.argv[1] == "native":
        from fastdreamer import _native

        check_backend("native")
        check_native_buffers()
        print(_native.isa())
    else:
        check_backend("triton", [(1, 1), (3, 5), (2, 128), (4, 129)], rtol=2e-5)
        print(last_backend("lambda_return"))
