"""Every op on a GPU: values and gradients, streams, threads, forks, captures, a whole update.

Skipped where there is no GPU that the kernels can run on, with doctor's reason. Each check runs in
a process of its own, so that a fault of the device ends one check and not all. The same checks run
on the CPU under Triton's interpreter, where streams and captures are nothing, so that what a GPU
sees first is the GPU's part alone.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map_only

sys.path.insert(0, str(Path(__file__).parent / "ops"))

import forked
import gpu_matrix
import test_triton
import test_triton_vocabulary
from test_triton import OPS, SMALL, make_inputs

from fastdreamer import testing
from fastdreamer.ops.backend import last_backend, use_backend
from fastdreamer.ops.lambda_return import lambda_return
from fastdreamer.ops.triton.cuda_graph import GRAPHS

ROOT = Path(__file__).parents[1]


def on_gpu() -> bool:
    return test_triton.DEVICE == "cuda"


def some_ops(*quick: str) -> list[str]:
    """Every op on a GPU; under the interpreter, which is slow, those named."""
    return list(OPS) if on_gpu() else list(quick)


def times(number: int) -> range:
    return range(number if on_gpu() else 1)


def inputs_of(op: str) -> dict:
    """Small arguments on the device."""
    steps = 2 if on_gpu() else 1
    if op == "cem":
        return test_triton.cem_inputs(SMALL, steps, 1, 7, 1)
    return make_inputs(op, SMALL, steps, 3)


def call(op: str, inputs: dict, backend: str = "triton") -> list[torch.Tensor]:
    """The outputs of an op and, but for cem, gradients of all inputs but the noise."""
    given, wrt = {}, []
    for name, value in inputs.items():
        fresh = tree_map_only(torch.Tensor, lambda x: x.detach(), value)
        if op != "cem" and not name.endswith("noise"):
            leaves = [x for x in tree_flatten(fresh)[0] if isinstance(x, torch.Tensor)]
            wrt += [x.requires_grad_() for x in leaves if x.is_floating_point()]
        given[name] = fresh
    leaves = [x for x in tree_flatten(OPS[op](**given, backend=backend))[0] if x is not None]
    assert last_backend(op) == backend
    if wrt:
        reached = [x for x in leaves if x.requires_grad]
        torch.autograd.backward(reached, [torch.cos(x.detach()) for x in reached])
    nothing = torch.zeros((), device=test_triton.DEVICE)
    grads = [nothing if x.grad is None else x.grad for x in wrt]
    return [x.detach() for x in leaves] + grads


def close(got: list, want: list, tolerance: float = 0.0) -> None:
    assert len(got) == len(want)
    options = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, **options)


def moved(inputs: dict, offset: int = 0) -> dict:
    """The same values elsewhere; their addresses are ``offset`` elements past multiples of 16."""

    def move(x: torch.Tensor) -> torch.Tensor:
        room = torch.empty(x.numel() + offset, dtype=x.dtype, device=x.device)
        return room[offset:].view(x.shape).copy_(x)

    return tree_map_only(torch.Tensor, move, inputs)


# --- what a process of its own runs -------------------------------------------------------------


def check_lambda_return() -> None:
    for shape in ((1, 1), (3, 5), (2, 128), (4, 129)):
        inputs = testing.lambda_return_inputs(*shape)
        got = test_triton.evaluate(lambda_return, inputs, backend="triton", dtype=torch.float32)
        truth = test_triton.evaluate(lambda_return, inputs, backend="eager", dtype=torch.float64)
        for name, exact in truth.items():
            assert testing.error(got[name], exact) <= 2e-5 * float(exact.norm()), (shape, name)


def check_addresses() -> None:
    """Tensors that move, and that lie at no multiple of 16 bytes."""
    for op in some_ops("rssm_step", "cem"):
        inputs = inputs_of(op)
        want, kept = call(op, inputs), []
        for _ in times(3):
            kept.append(moved(inputs))  # no address comes twice
            close(call(op, kept[-1]), want)
        close(call(op, moved(inputs, 1)), want, 1e-5)
        if on_gpu():
            close(call(op, inputs), want)


def check_weights_that_change() -> None:
    """A replay after an optimiser's step sees the new weights."""
    for op in some_ops("rssm_step"):
        inputs = inputs_of(op)
        for _ in range(2):
            close(call(op, inputs), call(op, inputs, "eager"), 1e-4)
            with torch.no_grad():
                for weight in inputs["params"].gru.weight_hh, *inputs["params"].prior.weights:
                    weight.mul_(0.9)


def check_nan() -> None:
    """A row's NaN reaches what eager's reaches, and no other row."""
    for op in set(some_ops("imagine", "observe")) & {"imagine", "observe", "open_loop"}:
        inputs = inputs_of(op)
        if op == "observe":
            inputs["is_first"].zero_()
        inputs["start"].deter[1, 2] = torch.nan
        leaves = [
            tree_flatten(OPS[op](**inputs, backend=backend))[0] for backend in ("triton", "eager")
        ]
        assert any(x.isnan().any() for x in leaves[0] if x is not None)
        close(*leaves, 1e-4)
    inputs = inputs_of("cem")
    inputs["state_noise"][:, :, :, 3] = torch.nan  # one candidate of each plan
    got, want = call("cem", inputs), call("cem", inputs, "eager")
    assert not got[0].isnan().any() and any(x.isnan().any() for x in want)
    close(got, want, 1e-4)


def check_streams() -> None:
    """On a stream of the caller's, whose work before and after is waited for."""
    stream = torch.cuda.Stream() if on_gpu() else None
    for op in some_ops("open_loop"):
        inputs = inputs_of(op)
        want = call(op, inputs)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            for _ in times(3):
                late = tree_map_only(torch.Tensor, torch.zeros_like, inputs)
                busy = torch.ones(512, 512, device=test_triton.DEVICE)
                for _ in times(20):
                    busy = busy @ busy / 512  # the copies below come late
                flat, values = (
                    [x for x in tree_flatten(t)[0] if isinstance(x, torch.Tensor)]
                    for t in (late, inputs)
                )
                for x, value in zip(flat, values, strict=True):
                    x.copy_(value)
                got = [x.clone() for x in call(op, late)]
        if stream is not None:
            stream.synchronize()
        close(got, want)


def check_threads() -> None:
    """Calls from several threads at once, and a backward pass on another than the forward's."""
    ops = some_ops("rssm_step", "open_loop")
    inputs = {op: inputs_of(op) for op in ops}
    want = {op: call(op, inputs[op]) for op in ops}
    errors = []

    def work(order: list) -> None:
        try:
            for op in order:
                close(call(op, moved(inputs[op])), want[op])
        except BaseException as error:
            errors.append(error)

    run_threads([ops, ops[::-1]], work)
    given = inputs["open_loop"]
    action = given["action"].clone().requires_grad_()
    out = OPS["open_loop"](**given | {"action": action}, backend="triton")
    grads = []
    run_threads([out.deter.sum()], lambda loss: grads.append(torch.autograd.grad(loss, action)))
    again = OPS["open_loop"](**given | {"action": action}, backend="triton")
    close(list(grads[0]), list(torch.autograd.grad(again.deter.sum(), action)))
    assert not errors, errors


def run_threads(arguments: list, work) -> None:
    threads = [threading.Thread(target=work, args=(each,)) for each in arguments]
    for thread in threads:
        thread.start()
        if not on_gpu():  # the interpreter can do one at a time
            thread.join()
    for thread in threads:
        thread.join()


def check_graphs() -> None:
    """A graph a shape, the oldest one given up; one at a time gives the same numbers."""
    op = "imagine" if on_gpu() else "open_loop"
    small, large = inputs_of(op), make_inputs(op, SMALL, 2, 4)
    want = [call(op, inputs) for inputs in (small, large)]
    assert len(GRAPHS) >= (4 if on_gpu() else 0)  # forward and backward of each
    GRAPHS.clear()
    GRAPHS._capacity = 1
    for _ in times(2):
        for inputs, numbers in zip((small, large), want, strict=True):
            close(call(op, moved(inputs)), numbers)
            assert len(GRAPHS) == (1 if on_gpu() else 0)
    os.environ["FASTDREAMER_GRAPH"] = "0"  # kernel by kernel, by Triton's own launcher
    close(call(op, small), want[0], 1e-5)


def check_capture() -> None:
    """Inside torch.cuda.graph: the launches go into the caller's graph, forward and backward."""
    for op in some_ops("open_loop"):
        inputs = inputs_of(op)
        want = call(op, inputs)
        held, replay = captured(lambda op=op, inputs=inputs: call(op, inputs))
        for _ in times(2):
            for x in held:
                x.fill_(-9.0)
            replay()
            close(held, want, 1e-5)
        noise = inputs["noise" if "noise" in inputs else "state_noise"]
        noise.neg_()  # read again where it is
        replay()
        close(held, call(op, inputs), 1e-5)
        with pytest.raises(AssertionError):
            close(held, want, 1e-5)


def captured(run) -> tuple[list[torch.Tensor], "callable"]:
    """The outputs of what a graph of torch's captured, and its replay; on a CPU a second call."""
    if not on_gpu():
        held = [x.clone() for x in run()]

        def again() -> None:
            for x, new in zip(held, run(), strict=True):
                x.copy_(new)

        return held, again
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run()
    return held, graph.replay


def check_fork() -> None:
    """CUDA does not survive a fork: the child is told so, the parent goes on."""
    inputs = inputs_of("open_loop")
    want = call("open_loop", inputs)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            close(call("open_loop", inputs), want)
            status = 2
        except RuntimeError as error:
            status = 3 if "fork" in str(error) or "spawn" in str(error) else 4
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (3 if on_gpu() else 2)
    close(call("open_loop", inputs), want)


TODAYS = {
    "stoch": 3, "classes": 5, "unimix": 0.01, "cell": "late-reset", "activation": "silu",
    "norm": "layer",
}  # fmt: skip
"""Of a model: what preset walker-v3 has, but for two-hot heads, whose gradients are roundings of
e^20 before they have learned."""


def check_update() -> None:
    """One update of a Dreamer: the losses and gradients' norms that eager gives."""
    check_one_update({})


def check_todays_update() -> None:
    check_one_update(TODAYS)


def check_one_update(model: dict) -> None:
    from fastdreamer.config import preset
    from fastdreamer.learning.dreamer import Dreamer

    tiny = preset("tiny")
    config = dataclasses.replace(
        tiny,
        device=test_triton.DEVICE,
        precision="fp32",
        env=dataclasses.replace(tiny.env, obs="state"),
        model=dataclasses.replace(tiny.model, **model),
        behavior=dataclasses.replace(tiny.behavior, imag_horizon=2),
    )
    T, B, A, S = 3, 2, 2, 5
    draw = torch.Generator().manual_seed(0)
    batch = {
        "state": torch.randn(T, B, S, generator=draw),
        "action": 2 * torch.rand(T, B, A, generator=draw) - 1,
        "reward": torch.rand(T, B, generator=draw),
        "is_first": torch.tensor([[True, True], [False, False], [False, True]]),
    }
    batch = test_triton.on_device(batch)
    metrics = {}
    for backend in ("triton", "eager"):
        agent = Dreamer(config, {"state": (S,)}, A)
        with use_backend(backend):
            optimizers = agent.make_optimizers()
            metrics[backend] = agent.update(batch, optimizers, torch.Generator().manual_seed(1))
            for op in ("observe", "imagine"):
                assert last_backend(op) == backend
        assert all(p.device.type == test_triton.DEVICE for p in agent.parameters())
    for name, value in metrics["eager"].items():
        assert abs(metrics["triton"][name] - value) <= 1e-4 * max(1, abs(value)), name


OWN = {
    name.removeprefix("check_"): f
    for name, f in list(globals().items())
    if name[:6] == "check_" and f is not check_one_update
}
CHECKS = {**test_triton.QUICK, **OWN, **test_triton_vocabulary.QUICK}


# --- the tests ----------------------------------------------------------------------------------


def run_self(
    name: str, device: str, timeout: int = 600
) -> subprocess.CompletedProcess | forked.Done:
    if device == "cpu":
        return forked.run(__file__, name, device, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    hidden = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    visible = os.environ["FASTDREAMER_TEST_GPUS"]  # of conftest.py
    if visible != "all":
        environment["CUDA_VISIBLE_DEVICES"] = visible
    return subprocess.run(
        [sys.executable, __file__, name, device],
        env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="session")
def gpu() -> None:
    done = run_self("why_not", "cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    if reason := done.stdout.strip():
        pytest.skip(reason)


@pytest.mark.parametrize("name", CHECKS)
def test_on_the_gpu(name, gpu):
    done = run_self(name, "cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[-1] == "cuda"


@pytest.mark.parametrize("name", OWN)  # their own files run the others
def test_under_the_interpreter(name):
    done = run_self(name, "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[-1] == "cpu"


def test_the_matrix_fails_where_a_part_does(monkeypatch, capfd):
    parts = {"good": (["-c", "print('x')"], {}), "bad": (["-c", "import os; os.environ['Y']"], {})}
    monkeypatch.setattr(gpu_matrix, "PARTS", parts)
    assert gpu_matrix.run(["good"]) == 0
    assert gpu_matrix.run(["bad", "good"]) == 1
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    ends = [(line[0], line[-1]) for line in lines if line[-2:-1] == ["min"]]
    assert ends == [
        *(("good", "passed"), ("total", "passed")),
        *(("bad", "failed"), ("good", "passed"), ("total", "failed")),
    ]


if __name__ == "__main__":
    name, test_triton.DEVICE = sys.argv[1:]
    if name == "why_not":
        from fastdreamer.ops.gpu import why_no_kernels

        print(why_no_kernels() or "")
        sys.exit()
    if on_gpu():
        from fastdreamer.ops.gpu import why_no_kernels

        assert why_no_kernels() is None, why_no_kernels()
    else:
        from interpreter import correct_bfloat16

        correct_bfloat16()
    CHECKS[name]()
    if on_gpu():
        torch.cuda.synchronize()
        assert name == "refit" or len(GRAPHS) or name == "graphs", "nothing was replayed"
    print(test_triton.DEVICE)
