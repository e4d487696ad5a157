"""Threads, forks, and drivers that are missing, old or poor; run by test_loop.py."""

import gc
import os
import subprocess
import sys
import threading

import standin
import torch
import toy
from toy import check_forward, forward_inputs, run_forward

from fastdreamer import _native
from fastdreamer.ops.triton.cuda_graph import GRAPHS, _Graph

H, B = 4, 6


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


def in_a_child(function):
    """What a forked child's function returns, or its error."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = function()
        except BaseException as error:
            text = repr(error)
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


def test_a_forked_child_refuses_and_leaves_the_parents_objects_alone(bench, driver):
    program = toy.forward(H, B)
    run_forward(bench, program)
    inputs = bench.inputs(forward_inputs(1))

    def child():
        since = driver.calls
        try:
            bench.graphs.run(program, inputs)
            text = "it ran"
        except RuntimeError as error:
            text = str(error)
        bench.graphs.clear()
        gc.collect()
        return f"{text} | {driver.names(since)}"

    text = in_a_child(child)
    assert f"CUDA was initialised in process {os.getpid()}" in text
    assert "'spawn'" in text
    assert text.endswith("| []"), "a child makes no call"
    check_forward(bench.run(program, inputs), inputs)


def test_a_forked_child_frees_no_scratch(monkeypatch):
    """Freed there, it may end the child: torch's allocator calls CUDA."""
    freed = []

    class Scratch:
        def __del__(self):
            freed.append(os.getpid())

    graph = _Graph(toy.forward(H, B), torch.device("cpu"), None)
    graph._scratch["buffers"] = Scratch()
    monkeypatch.setitem(GRAPHS._graphs, "of the parent", graph)
    del graph

    def child():
        gc.collect()
        return f"{freed} {len(GRAPHS)}"

    assert in_a_child(child) == "[] 0"


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
