"""What doctor says of cores, threads and precision, and of a machine that lacks something."""

import importlib.util
import sys

import pytest
import torch

import fastdreamer
from fastdreamer import _native
from fastdreamer.machine import device, doctor
from fastdreamer.ops import backend


def test_cores_and_what_this_process_may_use_of_them(monkeypatch):
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: {*range(64)}, raising=False)
    assert doctor._cores(None) == doctor._cores(64.0) == "64 cores"
    assert doctor._cores(1.5) == "64 cores; a quota (cgroup) gives it the time of 1.5"
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: {3, 4}, raising=False)
    assert doctor._cores(None) == "64 cores, 2 of which this process may use"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((8, None, None), "8, torch's count of physical cores"),
        ((2, None, "2"), "2, as OMP_NUM_THREADS=2 says (--threads N takes others)"),
        ((32, 2.0, None), "2, by the quota; torch counts 32 cores (--threads N takes more)"),
        ((2, 2.0, "2"), "2, as OMP_NUM_THREADS=2 says (--threads N takes others)"),
    ],
)
def test_threads_and_who_says_so(given, said):
    assert doctor._threads(*given) == said


def test_precision_is_that_of_who_computes(monkeypatch):
    """Where auto passes over the scalar core, PyTorch's rates decide, not the core's."""
    core = _native.faster()
    other = {"fp32": "bf16", "bf16": "fp32"}[core]
    monkeypatch.setattr(device, "why_no_kernels", lambda: "no GPU here")
    monkeypatch.delenv("FASTDREAMER_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_torch_faster", lambda: other)
    assert dict(doctor._core())["precision auto is"] == core
    monkeypatch.setattr(backend, "why_slow", lambda: "this CPU has no AVX2")
    assert dict(doctor._core())["precision auto is"] == other
    monkeypatch.setenv("FASTDREAMER_BACKEND", "fast")
    said = dict(doctor._core())["precision auto is"]
    assert said.startswith("not known: FASTDREAMER_BACKEND must be one of eager, native, triton")
    monkeypatch.setattr(device, "why_no_kernels", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert dict(doctor._core())["precision auto is"] == "bf16, on cuda"


@pytest.mark.parametrize("absent", ["mujoco", "dm_control"])
def test_either_half_of_the_simulator_may_be_missing(absent, monkeypatch):
    """dm_control alone is on Python 3.13, where the extra does not bring it."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == absent else found(name)
    )
    monkeypatch.setattr(doctor, "select_gl", lambda: pytest.fail("there is nothing to draw with"))
    (line,) = doctor._rendering()
    assert line[1].startswith(f"no: {absent} is not installed: pip install 'fastdreamer[train]'")


def test_a_remembered_renderer_that_works_no_more_is_not_named(monkeypatch):
    egl, osmesa = (doctor.GL(name, "a renderer", "OpenGL 4.5") for name in ("egl", "osmesa"))
    remembered = [egl]
    gone = "libEGL.so.1 is missing (package libegl1)"
    monkeypatch.setattr(doctor, "probe_all", lambda: {"egl": gone, "osmesa": osmesa})
    monkeypatch.setattr(doctor, "select_gl", lambda: remembered[0] if remembered else osmesa)
    monkeypatch.setattr(doctor, "forget", remembered.remove)
    lines = doctor._rendering()
    told = [next(lines) for _ in range(3)]
    assert told[0] == ("rendering", "osmesa (a renderer)") and not remembered
    assert told[1:] == [("  egl", f"no: {gone}"), ("  osmesa", "a renderer")]


def test_without_the_core_it_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastdreamer._native", None)
    monkeypatch.delattr(fastdreamer, "_native")
    (line,) = doctor._core()
    assert line[1].startswith("not available: extension not built: ")
    assert "pip install -e " in line[1]
