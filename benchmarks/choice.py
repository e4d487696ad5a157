"""What ``auto`` takes against PyTorch, op by op: `python -m benchmarks.choice [--quick]`.

Exits with 1 where the native core, taken by ``auto`` for an op, is slower than eager in fp32, eager
in bf16 or compiled bf16 by more than the noise of interleaved medians.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks import (
    bench_imagine,
    bench_lambda_return,
    bench_open_loop,
    bench_rssm_step,
    compiled,
    machine,
    ops,
    report,
)
from benchmarks.race import Case, race
from benchmarks.timing import MIN_REPEATS, cell
from benchmarks.variants import VARIANTS, Variant
from fastdreamer import testing
from fastdreamer.ops.backend import faster_precision, kernel_choice, why_slow

AUTO = "auto"
BASELINES = ("eager fp32", "eager bf16", "compiled bf16")
MARGIN = 1.05
"""A median that is longer by less says nothing."""
RACES = 3
"""Of a case that looks lost; it is where all of them say so."""
ROWS = (400, 1000, 2500)
"""Of somebody's model, rolled out with heads and trained through all of it."""

Times = Mapping[str, Mapping[str, float]]


def cases() -> list[Case]:
    """Those of ``benchmarks.ops``, other sizes and directions, and the work of other people."""
    more = [bench_rssm_step.SMALL, bench_rssm_step.BACKWARD, bench_open_loop.BACKWARD]
    more += bench_lambda_return.CASES[:2]
    return [*ops.cases(), *more, *(bench_imagine.everything_case(rows) for rows in ROWS)]


def taken(case: Case) -> Variant:
    """What ``auto`` takes for a case on the CPU, with ``--precision auto``."""
    native = case.op.why_not("native", "cpu") is None and why_slow() is None
    bf16 = faster_precision() == "bf16"
    return _precise(case, Variant("native" if native else "eager", bf16=bf16))


def _precise(case: Case, variant: Variant) -> Variant:
    """A variant for a case: what has no matrix product has no bf16 limits, autocast leaves it."""
    return variant._replace(bf16=variant.bf16 and case.op.name in testing.BF16_LIMITS)


def slower(times: Times) -> dict[str, float]:
    """Return the baselines that beat ``auto`` by more than the margin, and by which factor."""
    own = times[AUTO]["median_ms"]
    factors = {name: own / t["median_ms"] for name, t in times.items() if name != AUTO}
    return {name: factor for name, factor in factors.items() if factor > MARGIN}


def judge(run: Callable[[], Times]) -> tuple[Times, dict[str, float]]:
    """Race, again where it looks lost, and return the last times and who won every race."""
    times = run()
    lost = slower(times)
    for _ in range(RACES - 1):
        if lost:
            times = run()
            lost = {name: factor for name, factor in slower(times).items() if name in lost}
    return times, lost


def measure(threads: int, works: Sequence[Case], rounds: int | None = None) -> dict[str, Any]:
    """Check and time what ``auto`` takes and the baselines of every case.

    Args:
        threads: of torch.
        works: the cases.
        rounds: instead of each case's own number.

    Returns:
        JSON types: ``machine``; ``works[name]`` with ``taken`` (backend and precision),
        ``times[variant]``, ``slower[baseline]``, a factor, and ``left_out[variant]``, a reason.

    Raises:
        AssertionError: a native result is wrong.
    """
    torch.set_num_threads(threads)
    result: dict[str, Any] = {"machine": machine.record(), "works": {}}
    for case in works:
        print(f"{case.name} …", end=" ", file=sys.stderr, flush=True)
        variant = taken(case)
        baselines = {name: _precise(case, VARIANTS[name]) for name in BASELINES}
        entries = case.entries({AUTO: variant} | baselines)
        options = {"rounds": rounds or case.rounds, "calls": case.calls, "pause": case.pause}
        times, lost = judge(lambda run=entries.run, options=options: race(run, **options))
        result["works"][case.name] = {
            "taken": [variant.backend, "bf16" if variant.bf16 else "fp32"],
            "times": times,
            "slower": lost if variant.backend == "native" else {},
            "left_out": entries.left_out,
        }
        medians = (f"{name} {t['median_ms']:.3g}" for name, t in times.items())
        print(", ".join(medians), "ms", file=sys.stderr, flush=True)
    return result


def table(result: dict[str, Any]) -> str:
    """Return what was taken, all times and how many times faster it is, as Markdown."""
    rows = []
    for name, work in result["works"].items():
        times = work["times"]
        cells = [f"{cell(times.get(b))}, {ops.ratio(times, AUTO, b)}" for b in BASELINES]
        rows.append([name, " ".join(work["taken"]), cell(times.get(AUTO)), *cells])
    return report.table(["ms: median (p20–p80)", "auto takes", "auto", *BASELINES], rows)


def complaints(result: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence for every case in which the choice is wrong, or was not measured."""
    for name, work in result["works"].items():
        for baseline, factor in work["slower"].items():
            what = " ".join(work["taken"])
            yield f"{name}: {what} takes {factor:.2f} times as long as {baseline}"
        for variant, reason in work["left_out"].items():
            yield f"{name}: {variant} was not measured: {reason}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="words in the names of cases; all without")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--quick", action="store_true", help="steps compiled, not whole loops; fewer rounds, rows"
    )
    args = parser.parse_args()
    if kernel_choice() is None:
        parser.error("the native core is not built")
    works = [c for c in cases() if not args.only or any(word in c.name for word in args.only)]
    if args.quick:
        works = [c for c in works if not c.name.endswith(tuple(f"B {n}" for n in ROWS[1:]))]
        works = [dataclasses.replace(c, rounds=MIN_REPEATS) for c in works]
    with contextlib.nullcontext() if args.quick else compiled.unrolled():
        result = measure(args.threads, works)
    print(f"\n{table(result)}\n\nMeasured on: {machine.describe(result['machine'])}.\n")
    found = list(complaints(result))
    for sentence in found:
        print(sentence)
    if found:
        raise SystemExit(1)
    print(f"auto is nowhere slower by more than {MARGIN - 1:.0%}.")


if __name__ == "__main__":
    main()
