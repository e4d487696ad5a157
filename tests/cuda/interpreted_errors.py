"""Errors of the driver at every call, leaks, and what the loop refuses; run by test_loop.py."""

import gc
import re
import warnings

import pytest
import standin
import torch
import toy
from toy import check_forward, forward_inputs, run_forward

from fastdreamer import _native

H, B = 4, 6
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
        "cuCtxSynchronize",
    }  # fmt: skip
    assert set(names) == wanted, "every kind of call is made"
    driver.on_launch(None)  # which calls are made is all that matters here
    gc.freeze()  # else each collection looks through all of torch
    for i, name in enumerate(names):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            driver.fail(i, standin.INVALID_HANDLE)
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
        text = f"{name}: CUDA_ERROR_INVALID_HANDLE: some other error"
        if name == "cuModuleLoadData":  # which kernel, for what, and what the driver is
            versions = r"\(compiled for compute capability \d+\.\d, the driver is of CUDA \d+\.\d\)"
            assert re.fullmatch(rf"\w+: {text} {versions}", messages[0]), messages
            text = messages[0]
        assert messages == [text], f"call {i}"
        assert driver.live() == {}, f"call {i}, {name}"
        assert driver.context_depth == 0, f"call {i}, {name}"
    gc.unfreeze()
    driver.on_launch(bench._launch)
    scenario(bench)  # and all is well again


@pytest.mark.parametrize("name", ["cuModuleLoadData", "cuGraphInstantiateWithFlags"])
def test_what_torch_does_not_use_is_given_back_once(bench, driver, monkeypatch, name):
    names = calls_of_scenario(bench, driver)
    at = names.index(name)
    since = names[:at][::-1].index("cuCtxPushCurrent_v2") + 1  # calls of what is made once more
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(name))
    driver.fail(at)
    scenario(bench)
    assert emptied == [name]
    driver.fail(at)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: driver.fail(since))
    with pytest.raises(_native.DriverError, match=f"{name}: CUDA_ERROR_OUT_OF_MEMORY: out of"):
        scenario(bench)
    bench.graphs.clear()
    gc.collect()
    assert driver.live() == {}
    scenario(bench)


def test_after_an_error_in_the_middle_of_an_update_every_pointer_is_written(bench, driver):
    program = toy.forward(H, B)
    run_forward(bench, program, 0)
    inputs = bench.inputs(forward_inputs(1))
    driver.fail(3, standin.INVALID_HANDLE)  # the third node
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
