"""What this machine offers: CPU, renderer, GPU, versions, and the backend each op would take."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastdreamer import ops
from fastdreamer._version import __version__
from fastdreamer.envs import EnvError, make_env
from fastdreamer.envs.gl import GL, GLError, forget, probe_all, select_gl
from fastdreamer.errors import ArgumentError, how_to_install
from fastdreamer.machine.container import cpu_quota, memory
from fastdreamer.machine.cores import cpu_model, within_quota
from fastdreamer.machine.device import TORCH_CORES, resolve_device, resolve_precision
from fastdreamer.ops.backend import (
    BACKENDS,
    OPS,
    describe_kernels,
    last_backend,
    why_not_loaded,
    why_slow,
)
from fastdreamer.ops.gpu import driver_state

_PACKAGES = ("torch", "triton", "numpy", "mujoco", "dm_control", "safetensors", "tyro")


def report(console: Console) -> None:
    """Print everything; a part that fails is printed with its reason."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in (*_machine(), *_simulator(), *_rendering(), *_versions()):
        table.add_row(name, escape(value))  # brackets are no markup
    console.print(table)
    console.print()
    console.print(_backends())


def _machine() -> Iterator[tuple[str, str]]:
    yield "fastdreamer", __version__
    yield "system", f"{platform.platform()}, Python {platform.python_version()}"
    quota = cpu_quota()
    yield "CPU", f"{cpu_model()}, {_cores(quota)}"
    most, whose = memory()
    yield "memory", f"{most / 2**30:.3g} GiB, of {whose}"
    yield "torch's CPU capability", torch.backends.cpu.get_cpu_capability()
    yield "threads", _threads(TORCH_CORES, quota, os.environ.get("OMP_NUM_THREADS"))
    yield from _core()
    if torch.cuda.is_available():
        yield (
            "GPU",
            ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        )
    else:
        yield "GPU", "none that torch can use"
    yield "NVIDIA driver", driver_state()


def _cores(quota: float | None) -> str:
    """How many there are, and how many of them this process may use."""
    count = os.cpu_count() or 1
    told = f"{count} core{'s'[: count > 1]}"
    if hasattr(os, "sched_getaffinity") and (usable := len(os.sched_getaffinity(0))) < count:
        told += f", {usable} of which this process may use"
    if quota is not None and quota < count:
        told += f"; a quota (cgroup) gives it the time of {quota:g}"
    return told


def _threads(torch_cores: int, quota: float | None, asked: str | None) -> str:
    """How many a command takes that is not told, and what holds them to that.

    torch_cores: physical cores as torch counts them. asked: ``OMP_NUM_THREADS``, or None.
    """
    taken = within_quota(torch_cores, quota)
    if taken < torch_cores:
        return f"{taken}, by the quota; torch counts {torch_cores} cores (--threads N takes more)"
    if asked:
        return f"{taken}, as OMP_NUM_THREADS={asked} says (--threads N takes others)"
    return f"{taken}, torch's count of physical cores"


def _core() -> Iterator[tuple[str, str]]:
    """What the native core measures, takes for each precision, and why."""
    try:
        from fastdreamer import _native
    except ImportError as error:
        yield "native core", f"not available: {why_not_loaded(error)}"
        return
    try:
        choice = _native.choice()
    except ValueError as error:  # a variable asks for what the CPU lacks
        yield "native core", str(error)
        return
    yield "native core", describe_kernels(choice)
    rates = _native.rates()
    for name, fp32, bf16 in rates:
        yield f"  {name}", f"{fp32:.0f} GFLOP/s in fp32, {bf16:.0f} in bf16, one thread"
    measured = {name for name, _, _ in rates}
    for name, reason in _native.isa_reasons().items():
        if reason is not None:
            yield f"  {name}", f"no: {reason}"
        elif name not in measured:
            yield f"  {name}", "for tests alone: amx, its instructions emulated in avx512bf16"
    yield from kernel_reasons(rates, choice, _precision(), os.environ)


def _precision() -> str:
    """What ``--precision auto`` is where ``--device auto`` computes, whoever does there."""
    device = resolve_device("auto")
    try:
        precision = resolve_precision("auto", device)
    except ArgumentError as error:  # of a variable
        return f"not known: {error}"
    return precision if device == "cpu" else f"{precision}, on {device}"


def kernel_reasons(
    rates: Sequence[tuple[str, float, float]],
    choice: Mapping[str, str],
    faster: str,
    environ: Mapping[str, str],
) -> Iterator[tuple[str, str]]:
    """Which of the core's kernels each precision takes, ``auto`` among them, and why.

    Args:
        rates: instruction set, GFLOP/s in fp32 and in bf16.
        choice: see :func:`fastdreamer.ops.backend.kernel_choice`.
        faster: what ``--precision auto`` is.
        environ: where ``FASTDREAMER_ISA`` and ``FASTDREAMER_ARITHMETIC`` may be.
    """
    isa, arithmetic = (
        f"as {name}={environ[name]} says" if environ.get(name) else None
        for name in ("FASTDREAMER_ISA", "FASTDREAMER_ARITHMETIC")
    )
    fp32 = next(rate for name, rate, _ in rates if name == choice["fp32"])
    bf16 = next(rate for name, _, rate in rates if name == choice["bf16"])
    ratio = f"{choice['bf16']}'s bf16 has {bf16 / fp32:.2f} times the rate of fp32"
    yield "fp32 takes", f"{choice['fp32']}, {isa or 'by these rates'}"
    taken = choice["bf16"] if choice["for_bf16"] == "bf16" else "the kernels of fp32"
    yield "bf16 takes", f"{taken}, {arithmetic or isa or 'by these rates'}: {ratio}"
    yield "precision auto is", faster


def _simulator() -> Iterator[tuple[str, str]]:
    """Whether a task loads and steps: versions that do not fit each other show there."""
    try:
        env = make_env("walker-walk", obs="state")
        env.reset(seed=0)
        env.step(np.zeros(env.action_dim))
        env.close()
        yield "simulator", "walker-walk loads and steps"
    except EnvError as error:
        yield "simulator", f"no: {error}"


def _rendering() -> Iterator[tuple[str, str]]:
    for module in ("mujoco", "dm_control"):
        if importlib.util.find_spec(module) is None:
            yield "rendering", f"no: {how_to_install(ModuleNotFoundError(name=module))}"
            return
    answers = probe_all()
    try:
        gl = select_gl()
        if not isinstance(answers[gl.name], GL):  # it was remembered, and works no more
            forget(gl)
            gl = select_gl()
        yield "rendering", str(gl)
    except GLError as error:
        yield "rendering", f"none works: {error}"
    for name, answer in answers.items():
        text = answer.renderer if isinstance(answer, GL) else f"no: {answer}"
        yield f"  {name}", text
    try:
        env = make_env("walker-walk", render="rays")
        env.reset(seed=0)
        env.close()
        yield "  rays", "draws without OpenGL (--render rays)"
    except (EnvError, ArgumentError) as error:
        yield "  rays", f"no: {error}"


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"


def _backends() -> Table:
    for module in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
        if not module.ispkg:
            importlib.import_module(module.name)  # an op is known once its module is imported
    device = "cuda" if torch.cuda.is_available() else "cpu"
    asked = os.environ.get("FASTDREAMER_BACKEND")
    named = asked and asked != "auto"
    instead = f" (FASTDREAMER_BACKEND={asked} is taken in auto's place)" if named else ""
    title = escape(f"Backends on {device}{instead}")
    table = Table(title=title, title_justify="left", show_lines=False)
    table.add_column("op")
    table.add_column("auto takes")
    table.add_column("why not the others")
    for name, op in sorted(OPS.items()):
        reasons = {backend: op.why_not(backend, device) for backend in BACKENDS}
        if device == "cpu" and reasons["native"] is None:
            reasons["native"] = why_slow()
        op.select("auto", torch.zeros(1, device=device))
        others = "; ".join(f"{b}: {why}" for b, why in reasons.items() if why is not None)
        table.add_row(name, last_backend(name), escape(others) or "-")
    return table
