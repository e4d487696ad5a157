"""What this machine offers: CPU, renderer, GPU, versions, and the backend each op would take."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pkgutil
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastdreamer import ops
from fastdreamer._version import __version__
from fastdreamer.envs.gl import GL, GLError, probe_all, select_gl
from fastdreamer.ops.backend import BACKENDS, OPS, last_backend, why_slow
from fastdreamer.ops.cuda_graph import driver_state

_PACKAGES = ("torch", "triton", "numpy", "mujoco", "dm_control", "safetensors", "nvtx", "tyro")


def report(console: Console) -> None:
    """Print everything; a part that fails is printed with its reason."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in (*_machine(), *_rendering(), *_versions()):
        table.add_row(name, value)
    console.print(table)
    console.print()
    console.print(_backends())


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _machine() -> Iterator[tuple[str, str]]:
    yield "fastdreamer", __version__
    yield "system", f"{platform.platform()}, Python {platform.python_version()}"
    yield "CPU", f"{cpu_model()}, {os.cpu_count()} cores"
    yield "torch's CPU capability", torch.backends.cpu.get_cpu_capability()
    yield "threads", f"{torch.get_num_threads()} (torch)"
    try:
        from fastdreamer import _native
    except ImportError as error:
        yield "native core", f"not available: {error}"
    else:
        try:
            host = ", ".join(_native.host_isas())
            yield "native core", f"{_native.isa()} (this CPU has {host})"
        except ValueError as error:  # FASTDREAMER_ISA asks for what the CPU lacks
            yield "native core", str(error)
        yield from _tiles(_native.isa_reasons())
    if torch.cuda.is_available():
        yield (
            "GPU",
            ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        )
    else:
        yield "GPU", "none that torch can use"
    yield "NVIDIA driver", driver_state()


def _tiles(reasons: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
    """Why not AMX, and what can stand for it."""
    yield "  amx", f"no: {reasons['amx']}" if reasons["amx"] else "yes"
    if reasons["amx_emulated"] is None:
        yield "  amx_emulated", "for tests alone: amx, its instructions emulated in avx512bf16"


def _rendering() -> Iterator[tuple[str, str]]:
    try:
        yield "rendering", str(select_gl())
    except GLError as error:
        yield "rendering", f"none works: {error}"
    for name, answer in probe_all().items():
        text = answer.renderer if isinstance(answer, GL) else f"no: {answer}"
        yield f"  {name}", text


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
    table = Table(title=f"Backends on {device}", title_justify="left", show_lines=False)
    table.add_column("op")
    table.add_column("auto takes")
    table.add_column("why not the others")
    for name, op in sorted(OPS.items()):
        reasons = {backend: op.why_not(backend, device) for backend in BACKENDS}
        if device == "cpu" and reasons["native"] is None:
            reasons["native"] = why_slow()
        op.select("auto", torch.zeros(1, device=device))
        others = "; ".join(f"{b}: {why}" for b, why in reasons.items() if why is not None)
        table.add_row(name, last_backend(name), others or "-")
    return table
