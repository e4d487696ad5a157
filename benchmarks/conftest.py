"""`pytest benchmarks/ --benchmark-only`: all variants of the same work, timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch._dynamo  # noqa: F401  (before any rendering: see below)

from benchmarks import machine, report
from benchmarks.race import Case, race, round_trip
from benchmarks.timing import MIN_REPEATS, cell
from benchmarks.variants import VARIANTS, Entries, Variant, check_complete

# torch.compile imports triton, and a process that has drawn with Mesa's llvmpipe has another LLVM
# loaded, with which importing triton ends in a segmentation fault. The other order works.

_ROWS = pytest.StashKey[list]()
_CIRCUMSTANCES = pytest.StashKey[dict]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.addoption(
        "--allow-missing", action="store_true", help="a variant that cannot run fails no benchmark"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []
    torch.set_num_threads(config.getoption("threads"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["fastdreamer"] = machine.record()


@pytest.fixture(name="race")
def race_fixture(benchmark, request: pytest.FixtureRequest) -> Callable:
    """Time variants in turn: ``race({"name": function, ...}, rounds=20)``; see ``race.race``.

    Or ``race(entries)``, of which none may be missing unless ``--allow-missing`` is given.

    pytest-benchmark runs one test, so one function, at a time, and on a shared machine the minutes
    between two tests can change more than the variants differ. So all variants are one test, and
    each of its rounds is a round of every variant. pytest-benchmark's own record is of the first
    variant; ``extra_info`` and the table at the end hold all of them. A time is never a reason to
    fail.
    """
    if benchmark.enabled and _CIRCUMSTANCES not in request.config.stash:  # before anything computes
        request.config.stash[_CIRCUMSTANCES] = machine.record()

    def run(
        variants: Mapping[str, Callable[[], object]] | Entries,
        *,
        rounds: int = MIN_REPEATS,
        warmup: int = 2,
        calls: int = 1,
        pause: float = 0.0,
    ) -> None:
        left_out: Mapping[str, str] = {}
        if isinstance(variants, Entries):
            check_complete(variants, request.config.getoption("allow_missing"))
            variants, left_out, _ = variants
        if not benchmark.enabled:
            benchmark(lambda: round_trip(variants))
            return

        def drive(first: Callable[[], object], others: Callable[[], object], rounds: int) -> None:
            benchmark.pedantic(first, setup=others, rounds=rounds)

        times = race(variants, rounds=rounds, warmup=warmup, calls=calls, pause=pause, drive=drive)
        benchmark.extra_info.update(times=times, calls=calls, left_out=dict(left_out))
        first = next(iter(times))
        request.config.stash[_ROWS].extend(
            [request.node.name, name, cell(t), f"{t['median_ms'] / times[first]['median_ms']:.2f}×"]
            for name, t in times.items()
        )
        request.config.stash[_ROWS].extend(
            [request.node.name, name, "–", reason] for name, reason in left_out.items()
        )

    return run


@pytest.fixture
def contest(race) -> Callable[..., None]:
    """Check and time variants of a ``Case``, by default all: ``contest(case, variants)``."""

    def run(case: Case, variants: Mapping[str, Variant] = VARIANTS) -> None:
        race(case.entries(variants), rounds=case.rounds, calls=case.calls, pause=case.pause)

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = terminalreporter.config.stash[_ROWS]
    if not rows:
        return
    header = ["work", "variant", "ms: median (p20–p80)", "÷ first"]
    terminalreporter.write_sep("=", "interleaved")
    terminalreporter.write_line(report.table(header, rows))
    circumstances = terminalreporter.config.stash[_CIRCUMSTANCES]
    terminalreporter.write_line(f"\nMeasured on: {machine.describe(circumstances)}.")
