"""Native ops in company: threads, forks, modules that die first, exits, torch.compile."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import forked
import pytest
import torch
from torch import Tensor

from fastdreamer import _native, testing
from fastdreamer.ops.backend import last_backend
from fastdreamer.ops.cem import cem
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.layers import MLPParams
from fastdreamer.ops.native import packs
from fastdreamer.ops.observe import observe
from fastdreamer.ops.rssm_step import rssm_step
from fastdreamer.testing import Sizes

SIZES = Sizes(2, 13, 5, 6, 17, 9, 1, 1, 1, "elu")


def train(mlp: MLPParams) -> MLPParams:
    weights, biases = (tuple(t.requires_grad_() for t in part) for part in mlp[:2])
    return MLPParams(weights, biases, mlp.activation)


def case(seed: int = 0, B: int = 60) -> tuple[dict[str, Any], list[Tensor]]:
    """Arguments of imagine with actor and critic to be trained, and those two's parameters."""
    inputs = testing.imagine_inputs(SIZES, 3, B, heads=True, seed=seed)
    actor, critic = train(inputs["actor"].mlp), train(inputs["returns"].critic)
    inputs["actor"] = inputs["actor"]._replace(mlp=actor)
    inputs["returns"] = inputs["returns"]._replace(critic=critic)
    return inputs, [t for mlp in (actor, critic) for t in (*mlp.weights, *mlp.biases)]


def loss(inputs: dict[str, Any]) -> Tensor:
    dream = imagine(**inputs, backend="native")
    return -dream.returns.mean() + (dream.value - dream.returns.detach()).square().mean()


def gradients(inputs: dict[str, Any], leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss(inputs), leaves))


def run(code: str, **environment: str) -> str:
    """Run code that may use this file as ``company``."""
    return run_alone(f"import test_company as company\n{code}", **environment)


def run_alone(code: str, **environment: str) -> str:
    """Run code in a process where nothing is imported yet."""
    forks = "ignore:This process:DeprecationWarning"  # of a fork beside threads, from 3.12 on
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", forks, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, (done.returncode, done.stdout + done.stderr)
    assert not done.stderr, done.stderr
    return done.stdout.strip()


# --- threads ------------------------------------------------------------------------------------


@contextlib.contextmanager
def switching_often():
    """Threads give the interpreter away five times as often as usually."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-3)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("inner", [1, 2])
def test_threads_that_call_at_once_compute_what_one_does(inner, monkeypatch):
    """Eight of them, on shared and on own parameters, while an optimiser steps elsewhere and so
    few packs are kept that each evicts those of the others."""
    monkeypatch.setattr(packs, "LIMIT", 8)
    cases = [case(0), case(0), *(case(seed) for seed in range(1, 4))]
    cases += [cases[0], cases[1], cases[2]]  # shared
    torch.set_num_threads(inner)
    try:
        want = [gradients(*given) for given in cases]
        stop = threading.Event()

        def optimise() -> None:
            inputs, leaves = case(9)
            optimiser = torch.optim.Adam(leaves, fused=True)
            while not stop.is_set():
                optimiser.zero_grad()
                loss(inputs).backward()
                optimiser.step()

        def work(given: tuple) -> list[list[Tensor]]:
            torch.set_num_threads(inner)
            return [gradients(*given) for _ in range(3)]

        with switching_often(), ThreadPoolExecutor(9) as pool:
            background = pool.submit(optimise)
            try:
                results = list(pool.map(work, cases))
            finally:
                stop.set()
            background.result()
    finally:
        torch.set_num_threads(1)
    for expected, repeats in zip(want, results, strict=True):
        for got in repeats:
            assert all(map(torch.equal, got, expected))


def test_backward_on_another_thread_than_forward():
    inputs, leaves = case()
    want = gradients(inputs, leaves)
    total = loss(inputs)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(torch.autograd.grad, total, leaves).result()
    assert all(map(torch.equal, got, want))


BINDINGS = {  # and what calls them
    "imagine_forward": ("imagine", True),
    "imagine_backward": ("imagine", True),
    "critic_backward": ("imagine", True),
    "observe_forward": ("observe", True),
    "observe_backward": ("observe", True),
    "rssm_step": ("rssm_step", False),
    "cem": ("cem", False),
    "PackedMlp": ("imagine", True),
    "PackedGru": ("imagine", True),
}


@pytest.mark.parametrize("binding", BINDINGS)
def test_another_thread_runs_during_a_call(binding):
    """One that counts: it could not, were the interpreter's lock held."""
    call = last_call(*BINDINGS[binding], binding)
    counted, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1
            time.sleep(1e-5)

    def counted_during(work: Callable) -> int:
        before = counted[0]
        work()
        return counted[0] - before

    before, counter = sys.getswitchinterval(), threading.Thread(target=count)
    # nobody is made to give the lock away, so that what is counted was counted without it
    sys.setswitchinterval(1000.0)
    try:
        counter.start()
        while not counted[0]:
            time.sleep(1e-5)
        assert counted_during(lambda: sum(range(10**6))) == 0
        assert any(counted_during(call) for _ in range(1000))
    finally:
        stop.set()
        sys.setswitchinterval(before)
        counter.join()


def last_call(op: str, gradients: bool, binding: str) -> Callable:
    """The op's last call of a function of the extension, with its arguments."""
    ops = {"imagine": imagine, "observe": observe, "rssm_step": rssm_step, "cem": cem}
    sizes = SIZES._replace(D=100, hidden=100, units=100)
    given = {
        "imagine": lambda: testing.imagine_inputs(sizes, 5, 50, heads=True),
        "observe": lambda: testing.observe_inputs(sizes, 5, 50),
        "rssm_step": lambda: testing.rssm_step_inputs(sizes, 200),
        "cem": lambda: testing.cem_inputs(sizes, 5, 1, 50, 2),
    }[op]()
    packs.forget()
    function = getattr(_native, binding)
    with mock.patch.object(_native, binding, wraps=function) as spy:
        if gradients:
            testing.evaluate(ops[op], given, backend="native", dtype=torch.float32)
        else:
            with torch.no_grad():
                ops[op](**given, backend="native")
    arguments = spy.call_args
    return lambda: function(*arguments.args, **arguments.kwargs)


# --- forks --------------------------------------------------------------------------------------

FORK = """
import os, torch
torch.set_num_threads(2)
given = company.case()
want = company.gradients(*given)
tape = company.loss(given[0])
child = os.fork()
if child == 0:
    ok = all(map(torch.equal, company.gradients(*given), want))
    ok &= all(map(torch.equal, torch.autograd.grad(tape, given[1]), want))  # the parent's tape
    company.packs.forget()
    ok &= all(map(torch.equal, company.gradients(*given), want))
    ok &= company.last_backend("imagine") == "native"
    os._exit(0 if ok else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert all(map(torch.equal, company.gradients(*given), want))
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes_the_same():
    """After the parent ran on several threads, of which the child has none."""
    assert run(FORK) == "done"


FORK_BEFORE_THE_CORE = """
import os, sys, time, torch, fastdreamer
torch.set_num_threads(2)
torch.ones(1 << 22).add(1)
assert "fastdreamer._native" not in sys.modules
child = os.fork()
if child == 0:
    from fastdreamer import _native
    _native.peak(False, 2, 1e-3)
    os._exit(0)
end = time.monotonic() + 30
while (found := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
    time.sleep(0.01)
if found == (0, 0):
    os.kill(child, 9)
    sys.exit("the child hangs")
assert os.waitstatus_to_exitcode(found[1]) == 0
from fastdreamer import _native
_native.peak(False, 2, 1e-3)
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_that_is_the_first_to_load_the_core():
    """After torch ran on several threads of the pool that both use."""
    assert run_alone(FORK_BEFORE_THE_CORE) == "done"


HOW_MANY_THREADS = """
import os
from fastdreamer import _native
before = os.listdir("/proc/self/task")
_native.peak(False, 3, 1e-3)
print(len(os.listdir("/proc/self/task")) - len(before))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="nobody counts threads here")
def test_forked_programs_of_tests_have_threads():
    """What they find equal for every number of threads was not computed on one each time."""
    done = forked.run("-c", HOW_MANY_THREADS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_while_other_threads_compute():
    """The child finds the memory pool and the packs whole."""
    code = """
import os, threading, torch
torch.set_num_threads(2)
given = company.case()
want = company.gradients(*given)
stop = threading.Event()
def work():
    mine = company.case(1)
    while not stop.is_set():
        company.packs.forget()
        company.gradients(*mine)
threads = [threading.Thread(target=work) for _ in range(3)]
for t in threads: t.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if all(map(torch.equal, company.gradients(*given), want)) else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop.set()
for t in threads: t.join()
print("done")
"""
    assert run(code, PYTHONWARNINGS="ignore") == "done"


# --- lifetimes ----------------------------------------------------------------------------------


def test_everything_may_be_freed_before_the_tape_is_used():
    want = gradients(*case())
    inputs, leaves = case()
    total = loss(inputs)
    del inputs  # the dynamics, the target critic, the noise and the start state
    packs.forget()
    filler = [torch.full((60, 64), float("nan")) for _ in range(200)]  # takes their memory
    got = torch.autograd.grad(total, leaves)
    assert all(map(torch.equal, got, want))
    del filler

    model = testing.observe_inputs(SIZES, 4, 3)
    embed = model["embed"].requires_grad_()
    expected = torch.autograd.grad(observe(**model, backend="native").state.stoch.sum(), embed)
    total = observe(**model, backend="native").state.stoch.sum()
    del model
    packs.forget()
    filler = [torch.full((60, 64), float("nan")) for _ in range(200)]
    assert torch.equal(torch.autograd.grad(total, embed)[0], expected[0])
    del filler


def test_outputs_and_gradients_outlive_the_tape():
    inputs, leaves = case()
    dream = imagine(**inputs, backend="native")
    grads = torch.autograd.grad(dream.returns.sum() + dream.value.sum(), leaves)
    kept = [t for t in (*dream, *grads) if t is not None]
    copies = [t.detach().clone() for t in kept]
    kept = [t.detach() for t in kept]
    del dream, grads
    for seed in range(1, 5):
        gradients(*case(seed))  # reuses the tape's memory
    assert all(map(torch.equal, kept, copies))


CHANGED = "modified by an inplace operation"


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs: inputs["state_noise"].add_(1),
        lambda inputs: inputs["action_noise"].zero_(),
        lambda inputs: inputs["start"].deter.mul_(2),
        lambda inputs: inputs["actor"].mlp.weights[1].detach().zero_(),
        lambda inputs: inputs["params"].gru.weight_hh.zero_(),
        lambda inputs: torch.optim.SGD(inputs["actor"].mlp.biases, lr=1.0).step(),
    ],
    ids=["state-noise", "action-noise", "start", "weight", "dynamics", "optimiser"],
)
def test_inputs_changed_before_backward_are_an_error(change):
    inputs, leaves = case()
    total = loss(inputs)
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    change(inputs)
    with pytest.raises(RuntimeError, match=CHANGED):
        total.backward()


def test_outputs_changed_before_backward_are_an_error_or_no_matter():
    inputs, leaves = case()
    want = torch.autograd.grad(imagine(**inputs, backend="native").returns.sum(), leaves[:4])
    dream = imagine(**inputs, backend="native")
    with torch.no_grad():
        dream.deter.zero_()  # kept apart for the tape
        dream.stoch.zero_()
    got = torch.autograd.grad(dream.returns.sum(), leaves[:4])
    assert all(map(torch.equal, got, want))
    dream = imagine(**inputs, backend="native")
    total = dream.returns.sum()
    with torch.no_grad():
        dream.action.zero_()
    with pytest.raises(RuntimeError, match=CHANGED):
        total.backward()


def test_the_graph_is_freed_after_backward():
    inputs, leaves = case()
    total = loss(inputs)
    torch.autograd.grad(total, leaves)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, leaves)


def test_exit_with_live_tapes():
    code = """
import torch
torch.set_num_threads(2)
given = company.case()
keep = [company.loss(given[0]) for _ in range(3)]
company.tape = keep[0]
cycle = [company.loss(given[0])]; cycle.append(cycle)
print("done")
"""
    assert run(code) == "done"


EXIT_BESIDE_A_THREAD = """
import threading, time, torch
from fastdreamer import _native

class Slow:
    def __del__(self, now=time.perf_counter):  # the interpreter is ending, the thread comes back
        end = now() + 0.05
        while now() < end:
            pass

def work():
    while True:
        _native.peak(False, 1, 1e-4)

slow = Slow()
threading.Thread(target=work, daemon=True).start()
time.sleep(0.02)
print("done")
"""


def test_exit_while_a_daemon_thread_computes():
    """It comes back when there is no interpreter any more, and stops."""
    for _ in range(3):
        assert run_alone(EXIT_BESIDE_A_THREAD) == "done"


def test_the_interpreter_s_lock_is_given_away_in_one_way():
    """By bindings/gil.h: pybind11's own guard aborts the process in the case above."""
    sources = Path(__file__).parents[2] / "csrc"
    files = [path for path in sources.rglob("*") if path.is_file()]
    assert any("WithoutGil" in path.read_text(encoding="utf-8") for path in files)
    for path in files:
        assert "gil_scoped_release" not in path.read_text(encoding="utf-8"), path


# --- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_around_the_ops(backend):
    """The ops break the graph, and what is compiled around them computes the same."""
    inputs, leaves = case()

    def step(noise: Tensor) -> Tensor:
        return 2 * loss({**inputs, "state_noise": noise * 1.5})

    noise = inputs["state_noise"]
    want = torch.autograd.grad(step(noise), leaves)
    compiled: Callable = torch.compile(step, backend=backend)
    for _ in range(3):
        got = torch.autograd.grad(compiled(noise), leaves)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    assert last_backend("imagine") == "native"
    with torch.no_grad():
        leaves[0].add_(0.1)  # no weights are baked in
    got = torch.autograd.grad(compiled(noise), leaves)
    for a, b in zip(got, torch.autograd.grad(step(noise), leaves), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


COMPILED_LATER = """
import sys, torch, warnings
warnings.simplefilter("ignore")  # of what dynamo traces in Op.select
inputs, leaves = company.case()
noise = inputs["state_noise"]
step = lambda noise: 2 * company.loss({**inputs, "state_noise": noise * 1.5})
want = torch.autograd.grad(step(noise), leaves)
print("torch._dynamo" in sys.modules)
compiled = torch.compile(step, backend="eager")
for _ in range(2):
    got = torch.autograd.grad(compiled(noise), leaves)
    print(all(map(torch.allclose, got, want)))
    with torch.no_grad():
        leaves[0].add_(0.1)
    want = torch.autograd.grad(step(noise), leaves)
"""


def test_the_compiler_is_loaded_by_who_compiles_and_hidden_from_all_the_same():
    """Importing it takes as long as torch: a worker that acts, or an evaluation, does without."""
    assert run(COMPILED_LATER).split() == ["False", "True", "True"]
