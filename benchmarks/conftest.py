"""`pytest benchmarks/ --benchmark-only`: every time beside a reference timed in turn with it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch._dynamo  # noqa: F401  (before any rendering: see below)

from benchmarks import machine, report
from benchmarks.timing import MIN_REPEATS, cell, summary

# torch.compile imports triton, and a process that has drawn with Mesa's llvmpipe has another LLVM
# loaded, with which importing triton ends in a segmentation fault. The other order works.

_ROWS = pytest.StashKey[list]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=2, help="torch threads (default 2)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []
    torch.set_num_threads(config.getoption("threads"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["fastdreamer"] = machine.record()


@pytest.fixture
def versus(benchmark, request: pytest.FixtureRequest) -> Callable:
    """Time a function against a reference: ``versus(target, reference, rounds=20)``.

    pytest-benchmark runs one test, so one variant, at a time, and on a shared machine the minutes
    between two tests can change more than the variants differ. So a round of the reference is run
    and timed before every round of the target; both medians, and their ratio, come from the same
    stretch of time. They go to ``extra_info`` and to the table at the end; pytest-benchmark's own
    table has the target alone. A time is never a reason to fail.
    """

    def run(
        target: Callable[[], object],
        reference: Callable[[], object],
        *,
        rounds: int = MIN_REPEATS,
        warmup: int = 2,
    ) -> None:
        assert rounds >= MIN_REPEATS
        reference_seconds = []

        def turn() -> None:
            start = time.perf_counter()
            reference()
            reference_seconds.append(time.perf_counter() - start)

        if benchmark.enabled:
            for _ in range(warmup):
                reference()
                target()
        benchmark.pedantic(target, setup=turn, rounds=rounds)
        if not benchmark.enabled:
            return
        ours, theirs = summary(benchmark.stats.stats.data), summary(reference_seconds)
        ratio = theirs["median_ms"] / ours["median_ms"]
        benchmark.extra_info.update(ours=ours, reference=theirs, speedup=ratio)
        request.config.stash[_ROWS].append(
            [request.node.name, cell(ours), cell(theirs), f"{ratio:.2f}×", str(rounds)]
        )

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = terminalreporter.config.stash[_ROWS]
    if not rows:
        return
    header = ["ms: median (p20–p80)", "this", "eager fp32 in turn", "speed-up", "rounds"]
    terminalreporter.write_sep("=", "interleaved")
    terminalreporter.write_line(report.table(header, rows))
    terminalreporter.write_line(f"\nMeasured on: {machine.describe(machine.record())}.")
