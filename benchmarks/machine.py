"""What a number was measured on: machine, versions, threads, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastdreamer.ops.backend import describe_kernels, kernel_choice

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "mujoco", "dm_control", "numpy")
_ISA = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")  # as the kernel says


def record() -> dict[str, Any]:
    """Return the circumstances of a measurement, as JSON types.

    Call it right before measuring: ``load`` is the 1-minute load average, so a value near or
    above the number of cores says that something else was running.
    """
    cpu = _cpuinfo()
    return {
        "cpu": cpu.get("model name", platform.processor() or "unknown"),
        "cpu_family_model": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "isa": [flag for flag in _ISA if flag in cpu.get("flags", "").split()],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_kernels": kernel_choice(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "os": f"{platform.system()} {platform.release()}",
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in PACKAGES if (found := _version(name))},
        },
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def cpu(machine: dict[str, Any]) -> str:
    """Return the CPU model of a record; clouds give one name to many, family and model tell."""
    return f"{machine['cpu']} (family/model {machine['cpu_family_model']})"


def cpu_slug(machine: dict[str, Any]) -> str:
    """Return the same as the name of a file: ``amd-epyc-25-17``."""
    name = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*", " ", machine["cpu"])
    words = re.findall(r"[a-z0-9]+", f"{name} {machine['cpu_family_model']}".lower())
    return "-".join(words)


def describe(machine: dict[str, Any]) -> str:
    """Return a record as the one line that stands beside a table."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    kernels = machine.get("native_kernels")  # None: not built; older records lack it
    native = f"; native: {describe_kernels(kernels)}" if kernels else ""
    return (
        f"{machine['cpu']} (family/model {machine['cpu_family_model']}; "
        f"{' '.join(machine['isa'])}), {machine['cores']} cores, {threads}{native}; {versions}; "
        f"commit {machine['commit']}; {machine['date']}; load average before {machine['load']}"
    )


def _version(package: str) -> str | None:
    """None where it is not installed; ops want no simulator."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {k.strip(): v.strip() for k, _, v in (x.partition(":") for x in text.splitlines())}


def commit(checkout: Path = ROOT) -> str:
    """The commit, marked ``+changes`` when the code measured is not exactly that."""
    found = _git(checkout, "rev-parse", "--short=12", "HEAD")
    if found is None:
        return "none (no commit yet)"
    # Results and their tables change with every measurement; the code measured does not.
    code = ("fastdreamer", "csrc", "benchmarks/*.py")
    return f"{found}+changes" if _git(checkout, "status", "--porcelain", "--", *code) else found


def _git(checkout: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", checkout, *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
