"""The graph loop end to end on the stand-in driver; run by test_loop.py with the interpreter on."""

import gc
import os
import subprocess
import sys
import threading
import warnings

import pytest
import standin
import torch
import toy

from fastdreamer import _native
from fastdreamer.ops import graph
from fastdreamer.ops.graph import Launch, Loop, Program

H, B = 4, 6
LIMIT = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="session")
def driver():
    return standin.Driver(os.environ["FASTDREAMER_LIBCUDA"])


@pytest.fixture(scope="session")
def compiler():
    compiler = standin.Compiler()
    yield compiler
    compiler.close()


@pytest.fixture
def bench(driver, compiler, monkeypatch):
    """A bench whose driver objects are all gone in the end."""
    bench = standin.Bench(driver, compiler)
    allocate = lambda slot, _: bench.arena.empty(slot.shape, slot.dtype)  # noqa: E731
    monkeypatch.setattr("fastdreamer.ops.cuda_graph.empty", allocate)
    driver.fault()
    driver.fail(-1)
    yield bench
    driver.fault()
    driver.fail(-1)
    driver.on_launch(None)
    bench.graphs.clear()
    gc.collect()
    assert driver.live() == {}
    assert driver.context_depth == 0


def forward_inputs(seed=0, H=H, B=B):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return {"start": draw(B, toy.D), "weight": draw(toy.D, toy.D), "noise": draw(H, B, toy.D)}


def check_forward(outputs, inputs):
    torch.testing.assert_close(outputs["y"], toy.eager_forward(**inputs)[0], **LIMIT)


def run_forward(bench, program, seed=0):
    inputs = bench.inputs(forward_inputs(seed))
    check_forward(bench.run(program, inputs), inputs)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("H, B", [(1, 1), (2, 4), (5, 7)])
def test_forward(bench, H, B):
    program = toy.forward(H, B)
    inputs = bench.inputs(forward_inputs(1, H, B))
    outputs = bench.run(program, inputs)
    check_forward(outputs, inputs)
    assert len(bench.launched) == H
    direct = graph.run_direct(program, inputs)
    assert torch.equal(outputs["y"], direct["y"])


@pytest.mark.parametrize("H, B", [(1, 3), (4, 5)])
def test_backward(bench, H, B):
    given = {name: x.requires_grad_() for name, x in forward_inputs(2, H, B).items()}
    y, states = toy.eager_forward(**given)
    after = y * toy.SCALE  # the state behind each step, without its constant noise
    grad = torch.randn(H, B, toy.D, generator=torch.Generator().manual_seed(3))
    total = (after * grad).sum()
    expected = torch.autograd.grad(total, [given["start"], given["weight"]])
    inputs = {"grad": grad, "y": y, "weight": given["weight"], "states": states}
    outputs = bench.run(
        toy.backward(H, B), bench.inputs({k: v.detach() for k, v in inputs.items()})
    )
    torch.testing.assert_close(outputs["grad_start"], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs["grad_weight"], expected[1], rtol=1e-4, atol=1e-5)
    assert len(bench.launched) == H + 1


def search_inputs(iterations=3, H=3, B=2, N=5):
    g = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return {"mean": draw(B, toy.D), "weight": draw(toy.D, toy.D),
            "spread": draw(iterations, B * N, toy.D), "noise": draw(B * N, toy.D)}  # fmt: skip


def test_nested_loops(bench):
    inputs = bench.inputs(search_inputs())
    program = toy.search(3, 3, 2, 5)
    outputs = bench.run(program, inputs)
    check_search(outputs, inputs)
    assert len(bench.launched) == 3 * (2 + 3)
    bench.check_launches(program, {**inputs, **outputs})


# ---------------------------------------------------------------- graphs


def test_one_launch_a_call_and_one_capture(bench, driver):
    program = toy.forward(H, B)
    run_forward(bench, program, 0)
    inputs = bench.inputs(forward_inputs(1))
    since = driver.calls
    check_forward(bench.run(program, inputs), inputs)
    names = driver.names(since)
    assert names.count("cuGraphLaunch") == 1
    assert not {"cuLaunchKernel", "cuStreamBeginCapture_v2", "cuModuleLoadData"} & set(names)
    assert len(bench.graphs) == 1


def test_only_nodes_with_moved_pointers_are_written(bench, driver):
    program = toy.forward(H, B)
    inputs = bench.inputs(forward_inputs(0))
    bench.run(program, inputs)
    moved = {**inputs, "start": bench.arena.copy(inputs["start"] + 1)}
    graphs = bench.graphs
    since = driver.calls
    outputs = bench.run(program, moved)
    check_forward(outputs, moved)
    # y is new as well and is in every node; so here is one node that only `start` moves:
    assert driver.names(since).count("cuGraphExecKernelNodeSetParams_v2") == H
    (entry,) = graphs._graphs.values()
    since = driver.calls
    entry.replay({**moved, **outputs})
    assert driver.names(since) == ["cuCtxPushCurrent_v2", "cuGraphLaunch", "cuCtxPopCurrent_v2"]
    entry.replay({**inputs, **outputs})
    assert driver.names(since).count("cuGraphExecKernelNodeSetParams_v2") == 1
    check_forward(outputs, inputs)


def test_other_shapes_are_other_graphs_and_old_ones_are_given_up(driver, compiler, bench):
    bench.graphs._capacity = 2
    programs = [toy.forward(h, B) for h in (2, 3, 4)]
    for program, h in zip(programs, (2, 3, 4), strict=True):
        inputs = bench.inputs(forward_inputs(h, h))
        check_forward(bench.run(program, inputs), inputs)
    assert len(bench.graphs) == 2
    gc.collect()
    assert driver.live() == {"contexts": 1, "modules": 1, "graphs": 2, "execs": 2}
    inputs = bench.inputs(forward_inputs(2, 2))
    check_forward(bench.run(programs[0], inputs), inputs)  # captured anew


@pytest.mark.parametrize("name, shift", [("start", 4), ("noise", 8)])
def test_a_pointer_at_no_multiple_of_16_is_not_promised_to_be_one(bench, name, shift):
    program = toy.forward(H, B)
    run_forward(bench, program)
    inputs = bench.inputs(forward_inputs(5), **{name: shift})
    check_forward(bench.run(program, inputs), inputs)
    assert len(bench.graphs) == 2


def test_rows_at_no_multiple_of_16_are_not_promised_to_be_either():
    rows = graph.Slot("x", (5, 3), torch.float32)
    t = graph.index("t")
    assert rows.at(t * 4).aligned
    assert not rows.at(t * 3).aligned
    assert not rows.at(t % 2 * 3).aligned
    assert not rows.at(1).aligned


def test_wrong_inputs_are_refused(bench):
    program = toy.forward(H, B)
    inputs = bench.inputs(forward_inputs(0))
    with pytest.raises(ValueError, match="inputs must be"):
        bench.graphs.run(program, {"start": inputs["start"]})
    with pytest.raises(ValueError, match=r"start must be \[6, 8\] torch.float32"):
        bench.graphs.run(program, {**inputs, "start": inputs["start"].double()})
    with pytest.raises(ValueError, match="weight must be .* contiguous"):
        bench.graphs.run(program, {**inputs, "weight": inputs["weight"].T})


# ---------------------------------------------------------------- seeded faults


def changed(program, change):
    """The program with every launch of its loops replaced by change(launch, number)."""
    count = 0

    def copy(body):
        nonlocal count
        items = []
        for item in body:
            if isinstance(item, Loop):
                items.append(Loop(item.name, item.count, copy(item.body)))
                continue
            new = change(item, count)
            count += 1
            items.append(new)
        return items

    return Program(program.name, list(program.slots.values()), copy(program.body))


def with_args(launch, **args):
    return Launch(launch.kernel, launch.grid, {**launch.args, **args})


def wrong_stride(launch, number):
    if number == 0:
        return launch
    return with_args(launch, noise=launch.args["noise"].slot.at(B * toy.D + graph.index("t") * 8))


def no_double_buffer(launch, number):
    return launch if number == 0 else with_args(launch, after=launch.args["state"])


def step_too_few(program):
    loop = program.body[1]
    body = [program.body[0], Loop("t", loop.count - 1, loop.body)]
    return Program(program.name, list(program.slots.values()), body)


IN_THE_PROGRAM = {
    "wrong stride": lambda p: changed(p, wrong_stride),
    "no double buffer": lambda p: changed(p, no_double_buffer),
    "a step too few": step_too_few,
    "a wrong flag": lambda p: changed(p, lambda x, _: with_args(x, first_row=False)),
    "a wrong float": lambda p: changed(p, lambda x, _: with_args(x, scale=0.76)),
    "a row too few": lambda p: changed(p, lambda x, _: with_args(x, B=B - 1)),
    "a row too many": lambda p: changed(p, lambda x, _: with_args(x, B=B + 1)),
    "a short grid": lambda p: changed(p, lambda x, _: Launch(x.kernel, (1,), x.args)),
    "a swapped input": lambda p: changed(
        p, lambda x, n: with_args(x, state=p.slots["noise"]) if n == 0 else x
    ),
    "a written input": lambda p: changed(
        p, lambda x, n: with_args(x, after=p.slots["start"]) if n == 0 else x
    ),
}


@pytest.mark.parametrize("fault", IN_THE_PROGRAM)
def test_a_fault_in_the_program_is_caught(bench, fault):
    program = IN_THE_PROGRAM[fault](toy.forward(H, B))
    inputs = bench.inputs(forward_inputs(0))
    with pytest.raises(AssertionError):
        check_forward(bench.run(program, inputs), inputs)


def caught(bench, program, inputs, compare):
    """How a fault shows: by the launches' parameters, by the numbers."""
    ways = set()
    try:
        outputs = bench.run(program, inputs)
    except AssertionError:  # a stray pointer, a wrong block, a touched guard
        return {"launches", "numbers"}
    try:
        compare(outputs, inputs)
    except AssertionError:
        ways.add("numbers")
    try:
        bench.check_launches(program, {**inputs, **outputs})
    except AssertionError:
        ways.add("launches")
    return ways


# Twice the same launch gives the same numbers, and a row too many may be overwritten by the next.
MAY_LEAVE_THE_NUMBERS = ("repeat node", "wrong scalar")


@pytest.mark.parametrize("node", [0, 2])
@pytest.mark.parametrize("fault", standin.FAULTS)
def test_a_fault_of_the_loop_is_caught(bench, driver, fault, node):
    program = toy.forward(H, B)
    if fault == "stale pointers":  # the first call has none
        bench.run(program, bench.inputs(forward_inputs(0)))
    driver.fault(fault, node)
    ways = caught(bench, program, bench.inputs(forward_inputs(1)), check_forward)
    assert ("launches" in ways) == (fault != "none")
    if fault not in MAY_LEAVE_THE_NUMBERS:
        assert ("numbers" in ways) == (fault != "none")


def check_search(outputs, inputs):
    means, scores = toy.eager_search(**inputs, H=3)
    torch.testing.assert_close(outputs["means"], means, **LIMIT)
    torch.testing.assert_close(outputs["score"], scores, **LIMIT)


@pytest.mark.parametrize("fault", ["none", "reverse order", "drop node", "swap pointers"])
@pytest.mark.parametrize("node", [1, 8, 14])
def test_a_fault_in_nested_loops_is_caught(bench, driver, fault, node):
    driver.fault(fault, node)
    ways = caught(bench, toy.search(3, 3, 2, 5), bench.inputs(search_inputs()), check_search)
    assert ways == (set() if fault == "none" else {"launches", "numbers"})


# ---------------------------------------------------------------- errors and leaks

TWICE = toy.forward(2, 3)


def scenario(bench, compare=True):
    """Capture, replay with moved pointers, give up everything."""
    for seed in (0, 1):
        inputs = bench.inputs(forward_inputs(seed, 2, 3))
        outputs = bench.run(TWICE, inputs)
        if compare:
            check_forward(outputs, inputs)
    bench.graphs.clear()
    gc.collect()


def calls_of_scenario(bench, driver):
    since = driver.calls
    scenario(bench)
    return driver.names(since)


def test_an_error_of_every_single_call_is_one_error_and_leaks_nothing(bench, driver):
    names = calls_of_scenario(bench, driver)
    wanted = {
        "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2",
        "cuModuleLoadData", "cuModuleGetFunction", "cuFuncGetParamInfo", "cuStreamCreate",
        "cuStreamBeginCapture_v2", "cuLaunchKernel", "cuStreamGetCaptureInfo_v2",
        "cuStreamEndCapture", "cuGraphInstantiateWithFlags", "cuGraphLaunch",
        "cuGraphExecKernelNodeSetParams_v2", "cuCtxPopCurrent_v2", "cuStreamDestroy_v2",
        "cuGraphExecDestroy", "cuGraphDestroy", "cuModuleUnload", "cuDevicePrimaryCtxRelease_v2",
    }  # fmt: skip
    assert set(names) == wanted, "every kind of call is made"
    driver.on_launch(None)  # which calls are made is all that matters here
    gc.freeze()  # else each collection looks through all of torch
    for i, name in enumerate(names):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            driver.fail(i)
            raised = []
            try:
                scenario(bench, compare=False)
            except _native.DriverError as error:
                raised.append(str(error))
                del error
            bench.graphs.clear()
            gc.collect()
        driver.fail(-1)
        messages = raised + [str(w.message) for w in warned]
        assert messages == [f"{name}: CUDA_ERROR_OUT_OF_MEMORY: out of memory"], f"call {i}"
        assert driver.live() == {}, f"call {i}, {name}"
        assert driver.context_depth == 0, f"call {i}, {name}"
    gc.unfreeze()
    driver.on_launch(bench._launch)
    scenario(bench)  # and all is well again


def test_after_an_error_in_the_middle_of_an_update_every_pointer_is_written(bench, driver):
    program = toy.forward(H, B)
    run_forward(bench, program, 0)
    inputs = bench.inputs(forward_inputs(1))
    driver.fail(2)  # the third node
    with pytest.raises(_native.DriverError, match="cuGraphExecKernelNodeSetParams_v2"):
        bench.run(program, inputs)
    run_forward(bench, program, 2)
    run_forward(bench, program, 3)


def test_a_kernel_with_other_parameters_is_refused(bench, compiler):
    spec = toy.forward(H, B).body[0].spec({})
    made = compiler(spec, 90)
    device = _native.CudaDevice(0)
    kinds = list(made.kinds)
    good = dict(device=device, name=made.name, image=made.image, kinds=kinds, hidden=made.hidden,
                threads=made.threads, shared_bytes=made.shared_bytes)  # fmt: skip
    _native.CudaKernel(**good)
    with pytest.raises(_native.DriverError, match="parameter 5 is of 4 bytes at 40, expected 8"):
        _native.CudaKernel(**good | {"kinds": [*kinds[:5], "i64", *kinds[6:]]})
    with pytest.raises(_native.DriverError, match="has more than the 9 parameters"):
        _native.CudaKernel(**good | {"hidden": 1})
    with pytest.raises(_native.DriverError, match="cuFuncGetParamInfo"):
        _native.CudaKernel(**good | {"hidden": 3})
    with pytest.raises(_native.DriverError, match="cuModuleGetFunction: CUDA_ERROR_NOT_FOUND"):
        _native.CudaKernel(**good | {"name": "another"})
    with pytest.raises(ValueError, match="wants 200000 bytes of shared memory"):
        _native.CudaKernel(**good | {"shared_bytes": 200_000})


def test_much_shared_memory_is_asked_for(bench, driver, compiler):
    made = compiler(toy.forward(H, B).body[0].spec({}), 90)
    device = _native.CudaDevice(0)
    args = (device, made.name, made.image, list(made.kinds), made.hidden, made.threads)
    since = driver.calls
    little = _native.CudaKernel(*args, 48 * 1024)
    assert "cuFuncSetAttribute" not in driver.names(since)
    much = _native.CudaKernel(*args, 64 * 1024)
    assert driver.names(since).count("cuFuncSetAttribute") == 1
    for kernel in (little, much):  # the stand-in refuses more than was asked for
        loop = _native.CudaLoop(device, [4096] * 5)
        pointers = tuple((i, 0, ()) for i in range(5))
        loop.launch(kernel, (1, 1, 1), (*pointers, (B, ()), 0.5, (0, ())))
        driver.on_launch(None)
        assert loop.replay([4096 * (i + 1) for i in range(5)], 0) == 1


def test_a_loop_that_makes_no_sense_is_refused(bench, compiler):
    made = compiler(toy.forward(H, B).body[0].spec({}), 90)
    device = _native.CudaDevice(0)
    kernel = _native.CudaKernel(device, made.name, made.image, list(made.kinds), made.hidden,
                                made.threads, made.shared_bytes)  # fmt: skip
    pointers = tuple((i, 0, ()) for i in range(5))
    good = (*pointers, (B, ()), 0.5, (0, ()))
    addresses = [4096 * (i + 1) for i in range(5)]

    def loop(*args, grid=(1, 1, 1), count=None):
        loop = _native.CudaLoop(device, [64] * 5)
        if count is not None:
            loop.begin(count)
        loop.launch(kernel, grid, args or good)
        if count is not None:
            loop.end()
        loop.replay(addresses, 0)

    with pytest.raises(ValueError, match="takes 8 arguments, got 7"):
        loop(*good[:-1])
    with pytest.raises(ValueError, match="argument 0 points into no slot"):
        loop((5, 0, ()), *good[1:])
    with pytest.raises(ValueError, match="argument 0 leaves its slot, its value is 64"):
        loop((0, 64, ()), *good[1:])
    with pytest.raises(ValueError, match="argument 0 leaves its slot, its value is -32"):
        loop((0, 0, ((0, 32, 0, -1, 0),)), *good[1:], count=3)
    with pytest.raises(ValueError, match="uses a loop that is not open"):
        loop((0, 0, ((0, 32, 0, 1, 0),)), *good[1:])
    with pytest.raises(ValueError, match="argument 5 does not fit 32 bits"):
        loop(*pointers, (2**31, ()), 0.5, (0, ()))
    with pytest.raises(ValueError, match="argument 7 is no truth value"):
        loop(*pointers, (B, ()), 0.5, (2, ()))
    with pytest.raises(ValueError, match="grid's sizes must be positive"):
        loop(grid=(1, 0, 1))
    with pytest.raises(ValueError, match="nothing to launch"):
        loop(count=0)
    with pytest.raises(ValueError, match="end\\(\\) without begin"):
        _native.CudaLoop(device, [64]).end()
    empty = _native.CudaLoop(device, [64] * 5)
    empty.begin(1)
    empty.launch(kernel, (1, 1, 1), good)
    with pytest.raises(ValueError, match="begin\\(\\) without end"):
        empty.replay(addresses, 0)
    whole = _native.CudaLoop(device, [64] * 5)
    whole.launch(kernel, (1, 1, 1), good)
    with pytest.raises(ValueError, match="there are 5 slots, got 1"):
        whole.replay([1], 0)
    with pytest.raises(ValueError, match="address is null"):
        whole.replay([0] * 5, 0)
    whole.replay(addresses, 0)
    with pytest.raises(ValueError, match="cannot be added to"):
        whole.launch(kernel, (1, 1, 1), good)


# ---------------------------------------------------------------- threads and processes


def test_two_threads_share_a_graph_and_have_their_own(bench):
    shared, own = toy.forward(2, 3), [toy.forward(2, 3), toy.forward(3, 3)]
    ready = threading.Barrier(2)
    found: list = []
    allocating = threading.Lock()
    allocate = bench.arena.empty

    def locked(*args, **kwargs):
        with allocating:
            return allocate(*args, **kwargs)

    bench.arena.empty = locked

    def work(which):
        try:
            ready.wait(30)
            for seed in range(4):
                for program, h in ((shared, 2), (own[which], 2 + which)):
                    inputs = bench.inputs(forward_inputs(10 * which + seed, h, 3))
                    check_forward(bench.graphs.run(program, inputs), inputs)
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not found and bench.failure is None
    assert len(bench.graphs) == 3


def test_a_forked_child_refuses_and_leaves_the_parents_objects_alone(bench, driver):
    program = toy.forward(H, B)
    run_forward(bench, program)
    inputs = bench.inputs(forward_inputs(1))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            since = driver.calls
            try:
                bench.graphs.run(program, inputs)
                text = "it ran"
            except RuntimeError as error:
                text = str(error)
            bench.graphs.clear()
            gc.collect()
            text += f" | {driver.names(since)}"
        except BaseException as error:
            text = repr(error)
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    assert f"CUDA was initialised in process {os.getpid()}" in text
    assert "'spawn'" in text
    assert text.endswith("| []"), "a child makes no call"
    check_forward(bench.run(program, inputs), inputs)


# ---------------------------------------------------------------- the driver


def in_a_process(code, **environment):
    """What it prints, or the last line of its error; the extension comes alone, without torch."""
    load = "import importlib.util as u\n"
    load += f"spec = u.spec_from_file_location('_native', {_native.__file__!r})\n"
    load += "_native = u.module_from_spec(spec)\nspec.loader.exec_module(_native)\n"
    done = subprocess.run(
        [sys.executable, "-c", load + code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


INFO = "print(_native.cuda_driver())"


def test_what_is_missing_is_said(tmp_path):
    path = os.environ["FASTDREAMER_LIBCUDA"]
    assert in_a_process(INFO) == f"{{'path': '{path}', 'version': (12, 8), 'devices': 1}}"
    text = in_a_process(INFO, FASTDREAMER_LIBCUDA="/nonexistent/libcuda.so")
    assert "DriverError: no NVIDIA driver: /nonexistent/libcuda.so: cannot open" in text
    (tmp_path / "empty.c").write_text("int nothing;\n")
    library = tmp_path / "libempty.so"
    subprocess.run(["cc", "-shared", "-o", library, tmp_path / "empty.c"], check=True)
    text = in_a_process(INFO, FASTDREAMER_LIBCUDA=str(library))
    assert "is too old, CUDA 12.0 is the oldest that will do; it lacks cuInit" in text


def test_an_old_driver_is_refused_and_one_that_cannot_start_says_why():
    path = os.environ["FASTDREAMER_LIBCUDA"]
    load = f"import ctypes; lib = ctypes.CDLL('{path}')\n"
    text = in_a_process(f"{load}lib.standin_device(11080, 1, 80)\n{INFO}")
    assert text.endswith("is too old: it is of CUDA 11.8, 12.0 is the oldest that will do")
    text = in_a_process(f"{load}lib.standin_fail(ctypes.c_long(0), 2)\n{INFO}")
    assert text.endswith("cuInit: CUDA_ERROR_OUT_OF_MEMORY: out of memory")
    twice = f"{load}lib.standin_fail(ctypes.c_long(0), 2)\ntry: _native.cuda_driver()\n"
    twice += f"except RuntimeError: {INFO}"
    assert "'devices': 1" in in_a_process(twice), "it is tried again"


def test_without_parameter_information_there_is_no_check_and_no_error(tmp_path):
    library = standin.build(tmp_path, "-DWITHOUT_PARAM_INFO")
    assert "'devices': 1" in in_a_process(INFO, FASTDREAMER_LIBCUDA=str(library))
