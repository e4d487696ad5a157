"""Every op and one whole update, every variant: `python -m benchmarks.ops [--write]`.

The benches of `pytest benchmarks/ --benchmark-only`, with the machine's measured peak beside them
and, unless `--steps` is given, whole loops compiled: ten minutes more.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks import compiled, machine, report
from benchmarks.race import Case, peak, race
from benchmarks.timing import cell
from benchmarks.variants import VARIANTS, Entries, Variant, check_complete

BENCHES = ("rssm_step", "observe", "imagine", "open_loop", "cem", "decide", "codec")
PER_CPU = True
CAPTION = "time of every baseline against native"
UPDATE = "whole update, data included"
BASELINES = [name for name, variant in VARIANTS.items() if variant.backend != "native"]
NATIVE = [name for name, variant in VARIANTS.items() if variant.backend == "native"]


def cases() -> list[Case]:
    """The cases of every bench."""
    return [c for b in BENCHES for c in importlib.import_module(f"benchmarks.bench_{b}").CASES]


def measure(
    threads: int,
    works: Sequence[Case],
    *,
    update: str | None = "report",
    rounds: int | None = None,
    variants: Mapping[str, Variant] = VARIANTS,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Check and time every variant of every case.

    Args:
        threads: of torch.
        works: the cases.
        update: preset of the whole update; None leaves it out.
        rounds: instead of each case's own number.
        variants: of the cases; the whole update has all.
        allow_missing: whether one that should run may be left out.

    Returns:
        JSON types: ``machine``; ``compiled``, "whole loops" or "steps"; ``works[name]`` with
        ``gflop`` (None where it is not counted), ``peak`` (GFLOP/s just before, by precision; None
        without the native core), ``times[variant]``, a ``summary`` with ``gflop_per_s`` and
        ``share`` of the peak where they are known, and ``left_out[variant]``, a reason.

    Raises:
        AssertionError: a native variant is wrong. MissingVariant: one does not run.
    """
    torch.set_num_threads(threads)
    circumstances = machine.record()
    results = {}

    def add(name: str, flops: int, build: Callable[[], Entries], **options: Any) -> None:
        print(f"{name} …", file=sys.stderr, flush=True)
        entries = build()
        check_complete(entries, allow_missing)
        limits = peak(threads) if flops else None
        times = race(entries.run, **options)
        found = ", ".join(f"{variant} {t['median_ms']:.4g}" for variant, t in times.items())
        print(f"  median ms: {found}", file=sys.stderr, flush=True)  # of a run cut short, too
        for t in times.values() if flops else ():
            t["gflop_per_s"] = flops / t["median_ms"] / 1e6
        gflop = flops / 1e9 if flops else None
        results[name] = {"gflop": gflop, "peak": limits, "times": times} | {
            "left_out": entries.left_out
        }

    for c in works:
        options = {"rounds": rounds or c.rounds, "calls": c.calls, "pause": c.pause}
        add(c.name, c.flops, functools.partial(c.entries, variants), **options)
    if update:
        from benchmarks import bench_train

        with tempfile.TemporaryDirectory() as folder:
            replay = bench_train.open_replay(Path(folder))
            build = lambda: bench_train.entries(replay, update)  # noqa: E731
            add(UPDATE, 0, build, rounds=rounds or 20, warmup=1)
    _add_shares(results)
    how = "whole loops" if compiled.unrolling() else "steps"
    return {"machine": circumstances, "compiled": how, "works": results}


def _add_shares(works: dict[str, Any]) -> None:
    """Every rate's share of the machine's peak: the best reading, for noise only lowers one."""
    peaks = [work["peak"] for work in works.values() if work["peak"]]
    for work in works.values() if peaks else ():
        for variant, t in work["times"].items() if work["gflop"] else ():
            how = VARIANTS[variant]
            precision = "bf16" if how.bf16 or how.medium else "fp32"
            t["share"] = t["gflop_per_s"] / max(p[precision] for p in peaks)


def table(result: dict[str, Any]) -> str:
    """Return every time, rate and reason as Markdown."""
    works = result["works"]
    times = report.table(
        ["ms: median (p20–p80)", *VARIANTS],
        [[name, *(cell(w["times"].get(v)) for v in VARIANTS)] for name, w in works.items()],
    )
    rates = report.table(
        ["GFLOP/s (share of the peak)", "GFLOP", "peak fp32", "peak bf16", *VARIANTS],
        [
            [name, f"{w['gflop']:.3g}", *_peaks(w), *(_rate(w["times"].get(v)) for v in VARIANTS)]
            for name, w in works.items()
            if w["gflop"]
        ],
    )
    return f"{times}\n\n{rates}{_reasons(works)}\n\n{_compiled(result)}"


def headline(result: dict[str, Any]) -> str:
    """Return native times and their ratios to the baselines as Markdown."""
    against = ("eager fp32", "eager bf16", "compiled bf16")
    header = ["", *(f"{n}, ms (share of peak)" for n in NATIVE)]
    header += [f"bf16 against {name}" for name in against]
    header += ["fp32 against eager fp32", "fp32 against medium"]
    rows = []
    for name, work in result["works"].items():
        times = work["times"]
        cells = [_with_share(times.get(n)) for n in NATIVE]
        cells += [ratio(times, "native bf16", baseline) for baseline in against]
        cells += [ratio(times, "native fp32", n) for n in ("eager fp32", "eager medium")]
        rows.append([name, *cells])
    return f"{report.table(header, rows)}\n\n{_compiled(result)}"


def _compiled(result: dict[str, Any]) -> str:
    how = {
        "whole loops": "the loops of imagine and open_loop whole; "
        "of `observe` and `cem` single steps",
        "steps": "single steps of the loops",
    }
    return f"Compiled here: {how[result['compiled']]}."


def ratio(times: dict[str, Any], ours: str, baseline: str) -> str:
    """Return how many times faster ours is, for a table."""
    if ours not in times or baseline not in times:
        return "–"
    return f"{times[baseline]['median_ms'] / times[ours]['median_ms']:.2f}×"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw how many times longer every baseline takes than the fastest precision of native.

    Without native, than eager fp32.
    """
    with report.style():
        works = result["works"]
        names = list(works)
        figure = Figure(figsize=(8, 0.75 * len(names) + 1.2), layout="constrained")
        axes = figure.subplots()
        height = 0.8 / len(BASELINES)
        for i, baseline in enumerate(BASELINES):
            places, ratios = [], []
            for row, name in enumerate(names):
                times = works[name]["times"]
                ours = "native bf16" if "native bf16" in times else "eager fp32"
                if baseline in times and ours in times:
                    places.append(row + (i - (len(BASELINES) - 1) / 2) * height)
                    ratios.append(times[baseline]["median_ms"] / times[ours]["median_ms"])
            axes.barh(places, ratios, height, label=baseline, color=report.COLOURS[i])
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        native = any("native bf16" in work["times"] for work in works.values())
        axes.set_xlabel(f"time ÷ time of {'native bf16' if native else 'eager fp32'}")
        axes.legend(loc="lower right")
        figure.savefig(path, dpi=110)


def _peaks(work: dict[str, Any]) -> list[str]:
    return [f"{work['peak'][p]:.0f}" if work["peak"] else "–" for p in ("fp32", "bf16")]


def _rate(times: dict[str, float] | None) -> str:
    if times is None:
        return "–"
    share = f" ({times['share']:.0%})" if "share" in times else ""
    return f"{times['gflop_per_s']:.3g}{share}"


def _with_share(times: dict[str, float] | None) -> str:
    if times is None:
        return "–"
    share = f" ({times['share']:.0%})" if "share" in times else ""
    return f"{cell(times).partition(' ')[0]}{share}"


def _reasons(works: dict[str, Any]) -> str:
    """Why variants are left out, one line a reason."""
    found: dict[str, list[str]] = {}
    for name, work in works.items():
        for variant, reason in work["left_out"].items():
            found.setdefault(reason, []).append(f"{name} ({variant})")
    lines = [f"- {'; '.join(places)}: {reason}" for reason, places in found.items()]
    return "\n\nLeft out:\n" + "\n".join(lines) if lines else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="words in the names of cases; all without")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", action="store_true", help="compile steps, not whole loops")
    parser.add_argument("--allow-missing", action="store_true", help="go on without what can't run")
    parser.add_argument("--write", action="store_true", help="keep the result: JSON, tables, plot")
    args = parser.parse_args()
    if args.only and args.write:
        parser.error("--write keeps everything or nothing")
    wanted = lambda name: not args.only or any(word in name for word in args.only)  # noqa: E731
    works = [c for c in cases() if wanted(c.name)]
    update = "report" if wanted(UPDATE) else None
    with contextlib.nullcontext() if args.steps else compiled.unrolled():
        result = measure(args.threads, works, update=update, allow_missing=args.allow_missing)
    report.publish("ops", result, write=args.write)


if __name__ == "__main__":
    main()
