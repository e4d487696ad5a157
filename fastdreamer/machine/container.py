"""What a container, or whatever control group this process is in, lets it take: time and memory.

Neither the count of cores nor that of memory's pages knows of it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def cpu_quota(root: Path = Path("/")) -> float | None:
    """How many cores' worth of time, as `docker --cpus` and Kubernetes bound it; None where nothing
    does. Threads beyond it are stopped for a part of every tenth of a second.

    Args:
        root: of the file system.
    """
    files = ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    # -1 is none
    shares = [quota / period for quota, period in _limits(root, "cpu", *files) if quota > 0]
    return min(shares, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """How many bytes, as `docker --memory` and Kubernetes bound it; None where nothing does.
    A process beyond it is killed.

    Args:
        root: of the file system.
    """
    files = ("memory.max",), ("memory.limit_in_bytes",)
    return min((most for (most,) in _limits(root, "memory", *files)), default=None)


def memory() -> tuple[int, str]:
    """How many bytes this process can have at most, and whose they are, for messages."""
    there, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), memory_limit()
    if limit is None or limit >= there:  # none is a very large one under the first version
        return there, "this machine"
    return limit, "this container"


def _limits(
    root: Path, controller: str, second: tuple[str, ...], first: tuple[str, ...]
) -> Iterator[list[int]]:
    """The numbers in the files of this process's groups, and of those around them, where they bound
    anything.

    Args:
        second: names of the files under the second version of control groups.
        first: under the first, where a controller has a tree of its own.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        parts = Path(path).parts[1:]
        # Its own and its parents'; a container may see its own in the place of the topmost.
        for group in (top.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)):
            with contextlib.suppress(OSError, ValueError):  # no such file; "max"
                told = [(group / name).read_text(encoding="utf-8").split()
                        for name in (first if controllers else second)]  # fmt: skip
                yield [int(number) for numbers in told for number in numbers]
