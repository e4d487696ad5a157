"""The cores that a learner and its collector share: whose, how many threads learn, how they wait.

Nothing here imports torch: how OpenMP's threads wait is read from the environment when torch loads
its library. The measurements behind the two choices are in docs/training.md.
"""

from __future__ import annotations

import math
import os
import platform
import sys
from pathlib import Path

SPINS = 1000
"""Turns that a thread polls for its next work, about ten microseconds, before it sleeps."""


def cpu_model() -> str:
    """The processor's name as the system gives it; on x86 with family and model, as virtual
    machines name several alike."""
    told: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            told.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    name = told.get("model name") or platform.processor() or platform.machine()
    if "cpu family" not in told:
        return name
    return f"{name} (family {told['cpu family']}, model {told['model']})"


def within_quota(threads: int, quota: float | None) -> int:
    """So many threads, or no more than a quota lets run side by side: of a part of a core one."""
    return threads if quota is None else min(threads, math.ceil(quota))


def bound_spinning() -> None:
    """Let OpenMP's threads wait for work by sleeping after ``SPINS`` turns of polling.

    By default they poll for milliseconds, and where another program wants the core that they poll
    on, the scheduler takes it from them when there is work. ``GOMP_SPINCOUNT`` and
    ``OMP_WAIT_POLICY`` given in the environment stay as they are.

    Raises:
        RuntimeError: torch is loaded already, and its OpenMP has read the environment.
    """
    if "torch" in sys.modules:
        raise RuntimeError("bound_spinning: torch is loaded already, it would have no effect")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def learner_threads(cores: int, convolutions: bool) -> int:
    """How many threads ``--threads 0`` means.

    A thread a core, though the collector's process runs beside them: it works for a part of the
    time, and the kernels' rows go to whichever thread is free. PyTorch's own convolutions are
    another matter. In their backward pass oneDNN's threads wait for each other without ever
    sleeping, whatever else wants their cores: then a core stays free, where there are two.

    Args:
        cores: of the machine, at least 1.
        convolutions: whether PyTorch's own learn on the CPU.
    """
    return max(1, cores - 1) if convolutions else cores
