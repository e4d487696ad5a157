"""Ops beside a busy program, by how OpenMP waits: `python -m benchmarks.company`.

How they wait is read when torch is loaded, so each way has a process of its own. The busy program
computes on one core at the same priority, in a session of its own as another terminal's would.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import machine, ops, report
from benchmarks.variants import VARIANTS
from fastdreamer.machine.cores import SPINS

CASES = ("imagine", "observe + backward", "actor + critic update")
WAITING = {"OpenMP's default": None, f"{SPINS} turns": str(SPINS)}
LEAST = 5
"""Timed calls of each case, whatever they take."""


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Keep one core busy."""
    code = [sys.executable, "-c", "while True: pass"]
    process = subprocess.Popen(code, start_new_session=True)
    try:
        time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.wait()


def measure(threads: int, seconds: float, variant: str) -> dict[str, Any]:
    """Time the cases in this process, alone and then beside a busy program.

    Args:
        threads: of torch.
        seconds: for each case and circumstance, at least.
        variant: of the cases.

    Returns:
        JSON types: ``machine``; ``times["alone" | "beside"][case]``, median milliseconds.

    Raises:
        AssertionError: the variant is wrong. BackendError: it cannot run.
    """
    torch.set_num_threads(threads)
    circumstances = machine.record()
    run: dict[str, Callable[[], object]] = {}
    for case in ops.cases():
        if case.name in CASES:
            entries = case.entries({variant: VARIANTS[variant]})
            if reason := entries.left_out.get(variant):
                raise RuntimeError(f"{case.name}, {variant}: {reason}")
            run[case.name] = entries.run[variant]
    times = {"alone": {name: _median(f, seconds) for name, f in run.items()}}
    with busy():
        times["beside"] = {name: _median(f, seconds) for name, f in run.items()}
    return {"machine": circumstances, "times": times}


def _median(function: Callable[[], object], seconds: float) -> float:
    function()
    taken: list[float] = []
    until = time.monotonic() + seconds
    while len(taken) < LEAST or time.monotonic() < until:
        getattr(function, "before", lambda: None)()  # its weights have changed: see race.py
        start = time.perf_counter()
        function()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results by way of waiting as a Markdown table."""
    header = ["waiting", *(f"{case}, {how}" for case in CASES for how in ("alone", "beside"))]
    rows = [
        [name, *(f"{result['times'][how][c]:.1f}" for c in CASES for how in ("alone", "beside"))]
        for name, result in results.items()
    ]
    last = next(reversed(results.values()))
    return f"{report.table(header, rows)}\n\nMeasured on: {machine.describe(last['machine'])}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each number, at least")
    parser.add_argument("--variant", choices=VARIANTS, default="native bf16")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.threads, args.seconds, args.variant)))
        return
    results = {}
    for name, spins in WAITING.items():
        drop = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
        environment = {k: v for k, v in os.environ.items() if k not in drop}
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.company", "--child", *sys.argv[1:]],
            env=environment | ({} if spins is None else {"GOMP_SPINCOUNT": spins}),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        results[name] = json.loads(child.stdout)
    print(table(results))


if __name__ == "__main__":
    main()
