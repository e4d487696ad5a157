"""Programs inside a CUDA graph that somebody else captures; run by test_loop.py."""

import ctypes
import gc
import os

import pytest
import toy
from toy import check_forward, check_search, forward_inputs, run_forward, search_inputs

from fastdreamer import _native

H, B = 4, 6
LOADING = {"cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuGraphLaunch",
           "cuStreamBeginCapture_v2", "cuGraphInstantiateWithFlags"}  # fmt: skip


@pytest.fixture
def capture(driver):
    """As if torch captured on the current stream, which the stand-in runs at once."""
    yield driver.capturing
    driver.capturing(False)


def enqueue(bench, program, inputs):
    bench.failure, bench.launched = None, []
    outputs = bench.graphs.enqueue(program, inputs)
    assert bench.failure is None, bench.failure
    bench.arena.check_guards()
    return outputs


def test_the_launches_of_a_graph_go_to_the_capture(bench, driver, capture):
    program = toy.search(3, 3, 2, 5)
    inputs = bench.inputs(search_inputs())
    bench.run(program, inputs)
    launched = [(name, grid) for name, grid, _ in bench.launched]
    capture()
    since = driver.calls
    inputs = bench.inputs(search_inputs())
    check_search(enqueue(bench, program, inputs), inputs)
    assert [(name, grid) for name, grid, _ in bench.launched] == launched
    names = driver.names(since)
    assert names == ["cuCtxPushCurrent_v2", *["cuLaunchKernel"] * len(launched),
                     "cuCtxPopCurrent_v2"]  # fmt: skip


def test_replays_before_and_after_use_their_own_tensors(bench):
    program = toy.forward(H, B)
    first, second = bench.inputs(forward_inputs(1)), bench.inputs(forward_inputs(2))
    for inputs in (first, second, first):
        check_forward(bench.run(program, inputs), inputs)
        check_forward(enqueue(bench, program, second), second)
    check_forward(bench.run(program, second), second)


def test_kernels_stay_loaded_when_their_graph_is_given_up(bench, driver, capture):
    bench.graphs._capacity = 1
    run_forward(bench, toy.forward(H, B))
    program = toy.search(1, 1, 1, 2)
    bench.run(program, bench.inputs(search_inputs(1, 1, 1, 2)))
    assert len(bench.graphs) == 1
    assert driver.live() == {"contexts": 1, "modules": 3, "graphs": 1, "execs": 1}
    capture()
    since = driver.calls
    inputs = bench.inputs(forward_inputs(3))
    check_forward(enqueue(bench, toy.forward(H, B), inputs), inputs)  # a program never seen
    assert not LOADING & set(driver.names(since))
    assert len(bench.graphs) == 1


def test_a_kernel_that_is_not_loaded_is_one_clear_error(bench, driver, capture):
    program, inputs = toy.forward(H, B), bench.inputs(forward_inputs(1))
    run_forward(bench, toy.forward(H, B))
    shifted = bench.inputs(forward_inputs(1), start=4)  # takes a kernel of its own
    capture()
    since = driver.calls
    with pytest.raises(RuntimeError, match="step_kernel is not loaded.*make the same call once"):
        enqueue(bench, program, shifted)
    assert driver.names(since) == []
    with pytest.raises(_native.DriverError, match="LoadData: CUDA_ERROR_STREAM_CAPTURE_UNSUPP"):
        bench.run(program, shifted)  # which is why
    check_forward(enqueue(bench, program, inputs), inputs)


def test_an_error_of_any_launch_is_one_error_and_the_graph_goes_on(bench, driver):
    program = toy.forward(2, 3)
    inputs = bench.inputs(forward_inputs(1, 2, 3))
    bench.run(program, inputs)
    for i, name in enumerate(["cuCtxPush", "cuLaunchKernel", "cuLaunchKernel", "cuCtxPop"]):
        driver.fail(i)
        with pytest.raises(_native.DriverError, match=name):
            enqueue(bench, program, inputs)
        driver.fail(-1)
        assert driver.context_depth == 0
        check_forward(bench.run(program, inputs), inputs)


def test_in_a_captured_stream_they_are_nodes_of_that_graph(bench, driver):
    """Nothing runs until somebody launches the graph; then the order is the program's."""
    program = toy.forward(H, B)
    inputs = bench.inputs(forward_inputs(1))
    outputs = bench.run(program, inputs)
    expected = list(bench.launched)
    (entry,) = bench.graphs._graphs.values()
    tensors = {**inputs, **outputs, **entry._scratch}
    cuda = ctypes.CDLL(os.environ["FASTDREAMER_LIBCUDA"])

    def call(name, *args):
        assert getattr(cuda, name)(*args) == 0, name

    context, stream, graph, exec_ = (ctypes.c_void_p() for _ in range(4))
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    call("cuCtxPushCurrent_v2", context)
    call("cuStreamCreate", ctypes.byref(stream), 0)
    call("cuStreamBeginCapture_v2", stream, 1)
    bench.launched = []
    entry.loop.enqueue([tensors[name].data_ptr() for name in program.slots], stream.value)
    call("cuStreamEndCapture", stream, ctypes.byref(graph))
    assert bench.launched == []
    call("cuGraphInstantiateWithFlags", ctypes.byref(exec_), graph, ctypes.c_ulonglong(0))
    outputs["y"].zero_()
    call("cuGraphLaunch", exec_, stream)
    assert bench.failure is None, bench.failure
    assert bench.launched == expected
    check_forward(outputs, inputs)
    call("cuGraphExecDestroy", exec_)
    call("cuGraphDestroy", graph)
    call("cuStreamDestroy_v2", stream)
    call("cuCtxPopCurrent_v2", ctypes.byref(context))
    call("cuDevicePrimaryCtxRelease_v2", 0)


def test_kernels_are_unloaded_behind_all_work(bench, driver):
    run_forward(bench, toy.forward(H, B))
    since = driver.calls
    bench.graphs.clear()
    gc.collect()
    names = driver.names(since)
    assert names.index("cuCtxSynchronize") + 1 == names.index("cuModuleUnload")
    assert names.count("cuModuleUnload") == 1
