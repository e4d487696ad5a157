"""How native and eager scale: `python -m benchmarks.curves [--write]`.

Imagination with heads, forward, against batch, horizon, threads and deterministic size; everything
else as in preset `report`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks import machine, report
from benchmarks.bench_imagine import B, H, heads_case
from benchmarks.race import race
from benchmarks.timing import MIN_REPEATS, cell
from benchmarks.variants import VARIANTS, check_complete
from fastdreamer import testing

CAPTION = "time of native and eager against batch, horizon, threads and deterministic size"
CORES = len(os.sched_getaffinity(0))
AXES = {
    "B": [4**i for i in range(7)],  # 1 .. 4096
    "H": [1, 2, 4, 8, 16, 32, 64],
    "threads": list(range(1, CORES + 1)),
    "D": [64, 128, 256, 512, 1024],
}
LABELS = {"B": "batch B", "H": "horizon H", "threads": "threads", "D": "deterministic size D"}
NAMES = ("native fp32", "native bf16", "eager fp32", "eager bf16")


def measure(
    threads: int,
    axes: dict[str, Sequence[int]],
    *,
    rounds: int = MIN_REPEATS,
    sizes: testing.Sizes = testing.REPORT,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Check and time native and eager along each axis.

    Args:
        threads: of torch, but for the axis ``threads``.
        axes: points by axis, ``B``, ``H``, ``threads`` or ``D``.
        rounds: of each point.
        sizes: of what is not varied.
        allow_missing: whether a variant may be left out.

    Returns:
        JSON types: ``machine``; ``axes[axis]`` with ``points`` and ``times[variant]``, a
        ``summary`` for each point; ``left_out[variant]``, a reason.

    Raises:
        AssertionError: a native variant is wrong. MissingVariant: one does not run.
    """
    torch.set_num_threads(threads)
    circumstances = machine.record()
    variants = {name: VARIANTS[name] for name in NAMES}
    results: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for axis, points in axes.items():
        times: dict[str, list[dict[str, float]]] = {}
        for point in points:
            print(f"{axis} = {point} …", file=sys.stderr, flush=True)
            at = {"B": B, "H": H, "threads": threads, "D": sizes.D} | {axis: point}
            torch.set_num_threads(at["threads"])
            case = heads_case(at["H"], at["B"], sizes._replace(D=at["D"]))
            entries = case.entries(variants)
            check_complete(entries, allow_missing)
            left_out |= entries.left_out
            for name, summary in race(entries.run, rounds=rounds).items():
                times.setdefault(name, []).append(summary)
        torch.set_num_threads(threads)
        results[axis] = {"points": list(points), "times": times}
    return {"machine": circumstances, "axes": results, "left_out": left_out}


def table(result: dict[str, Any]) -> str:
    """Return the medians as a Markdown table."""
    rows = [
        [f"{axis} = {point}", *(cell(_at(r["times"], name, i)) for name in NAMES)]
        for axis, r in result["axes"].items()
        for i, point in enumerate(r["points"])
    ]
    reasons = [f"\n\nLeft out: {name}: {why}" for name, why in result["left_out"].items()]
    return report.table(["ms: median (p20–p80)", *NAMES], rows) + "".join(reasons)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw one panel an axis, medians and their 20th to 80th percentile, logarithmic."""
    with report.style():
        figure = Figure(figsize=(9, 6.5), layout="constrained")
        panels = figure.subplots(2, 2).flat
        for axes, (axis, r) in zip(panels, result["axes"].items(), strict=False):
            for i, name in enumerate(NAMES):
                if name not in r["times"]:
                    continue
                columns = {k: [t[k] for t in r["times"][name]] for k in r["times"][name][0]}
                style = {"color": report.COLOURS[i], "label": name}
                axes.plot(r["points"], columns["median_ms"], "o-", markersize=3, **style)
                band = columns["p20_ms"], columns["p80_ms"]
                axes.fill_between(r["points"], *band, color=report.COLOURS[i], alpha=0.2, lw=0)
            axes.set_yscale("log")
            if axis != "threads":
                axes.set_xscale("log", base=2)
            axes.set_xticks(r["points"], [str(point) for point in r["points"]])
            axes.minorticks_off()
            axes.set_xlabel(LABELS[axis])
            axes.set_ylabel("ms")
        figure.axes[0].legend()
        figure.suptitle("imagine + heads, forward")
        figure.savefig(path, dpi=100)


def _at(times: dict[str, list], name: str, index: int) -> dict[str, float] | None:
    return times[name][index] if name in times else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--allow-missing", action="store_true", help="go on without what can't run")
    parser.add_argument("--write", action="store_true", help="keep the result: JSON, table, plot")
    args = parser.parse_args()
    result = measure(args.threads, AXES, allow_missing=args.allow_missing)
    report.publish("curves", result, write=args.write)


if __name__ == "__main__":
    main()
