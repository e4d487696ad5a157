"""Everything there is to measure on an NVIDIA GPU: `python -m benchmarks.gpu [--write]`.

Correctness against eager in float64 comes first: nothing that is wrong is timed. Then every op and
a whole update: Triton kernels from a CUDA graph beside eager, eager in a torch CUDA graph, and
``torch.compile(mode="reduce-overhead")``; what the device can do at most; the bandwidth and FLOP/s
reached. Without a GPU it says why there is none, and ends with exit code 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks import bench_train, machine, report
from benchmarks.ops import UPDATE, cases
from benchmarks.race import Case, Entries, race
from benchmarks.timing import MIN_REPEATS, cell
from benchmarks.variants import GPU, OURS, Variant
from fastdreamer.ops.backend import why_no_cuda
from fastdreamer.ops.cuda_graph import driver_state

WHY_NOT_UPDATE = "the update as a whole is not captured: encoder, decoder and optimisers are torch"


def ceilings(device: str = "cuda", size: int = 8192, seconds: float = 1.0) -> dict[str, float]:
    """Measure what the device can do at most.

    Returns:
        ``gb_per_s`` of a copy, reading and writing counted; ``fp32`` and ``bf16``, GFLOP/s of a
        square matrix product; fp32 without tensor cores, as the kernels' ``ieee`` products.
    """

    def rate(work: Callable[[], object], amount: float) -> float:
        work()
        _wait(device)
        times, end = [], time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            work()
            _wait(device)
            times.append(time.perf_counter() - start)
        return amount / min(times) / 1e9

    source = torch.zeros(2 * size * size, device=device)
    target = torch.empty_like(source)
    found = {"gb_per_s": rate(lambda: target.copy_(source), 2.0 * source.nbytes)}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            a = torch.randn(size, size, device=device).to(dtype)
            found[name] = rate(lambda a=a: a @ a, 2.0 * size**3)
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def least_bytes(case: Case) -> int:
    """Bytes of a case's float32 inputs and outputs, each read or written once; no work needs less.

    With gradients, they are read, and the gradients written, as often again.
    """
    inputs, groups = case._prepared(torch.float32)
    with torch.no_grad():
        out = case.call(**inputs, backend="eager")
    total = sum(x.nbytes for x in pytree.tree_leaves((inputs, out)) if isinstance(x, Tensor))
    return 2 * total if groups else total


def measure(
    works: Iterable[Case],
    variants: dict[str, Variant] = GPU,
    *,
    update: str | None = "report",
    rounds: int | None = None,
    limits: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Check and time every variant of every case.

    Args:
        works: the cases.
        variants: all on one device.
        update: preset of the whole update; None leaves it out.
        rounds: instead of each case's own number.
        limits: what :func:`ceilings` returned; None measures it.

    Returns:
        JSON types: ``machine``, ``device``, ``ceilings``, and ``works[name]`` with ``gflop``,
        ``bytes``, ``times[variant]`` (a ``summary`` with ``gflop_per_s``, ``gb_per_s`` and their
        shares of the ceilings) and ``left_out[variant]``, a reason.

    Raises:
        AssertionError: a Triton variant is wrong.
    """
    device = next(iter(variants.values())).device
    limits = limits or ceilings(device)
    result = {"machine": machine.record(), "device": describe(device), "ceilings": limits}
    results = result["works"] = {}

    def add(name: str, flops: int, size: int, entries: Entries, **options: Any) -> None:
        times = race(entries.run, **options)
        for variant, t in times.items() if flops else ():
            t["gflop_per_s"] = flops / t["median_ms"] / 1e6
            t["gb_per_s"] = size / t["median_ms"] / 1e6
            t["flop_share"] = (
                t["gflop_per_s"] / limits["bf16" if variants[variant].bf16 else "fp32"]
            )
            t["byte_share"] = t["gb_per_s"] / limits["gb_per_s"]
        results[name] = {"gflop": flops / 1e9, "bytes": size, "times": times}
        results[name]["left_out"] = entries.left_out

    for case in works:
        print(f"{case.name} …", file=sys.stderr, flush=True)
        options = {"rounds": rounds or case.rounds, "calls": case.calls, "pause": case.pause}
        add(case.name, case.flops, least_bytes(case), case.entries(variants), **options)
    if update:
        print(f"{UPDATE} …", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            replay = bench_train.open_replay(Path(folder))
            able = {n: v for n, v in variants.items() if v.backend in (*OURS, "eager")}
            entries = bench_train.entries(replay, update, able)
            left = dict.fromkeys([n for n in variants if n not in able], WHY_NOT_UPDATE)
            entries = Entries(_waiting(entries.run, device), entries.left_out | left)
            add(UPDATE, 0, 0, entries, rounds=rounds or MIN_REPEATS, warmup=3)
    return result


def describe(device: str) -> dict[str, Any]:
    """Return the device, its driver and what drives it, as JSON types."""
    found: dict[str, Any] = {"name": machine.record()["cpu"], "driver": driver_state()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    found["triton"] = version("triton")
    return found


def table(result: dict[str, Any]) -> str:
    """Return every time, rate and reason as Markdown."""
    works, limits = result["works"], result["ceilings"]
    names = list(dict.fromkeys(n for w in works.values() for n in (*w["times"], *w["left_out"])))
    times = report.table(
        ["ms: median (p20–p80)", *names],
        [[name, *(cell(w["times"].get(n)) for n in names)] for name, w in works.items()],
    )
    rates = report.table(
        ["GFLOP/s (share), GB/s (share)", "GFLOP", "MB at least", *names],
        [
            [name, f"{w['gflop']:.3g}", f"{w['bytes'] / 1e6:.3g}",
             *(_rate(w["times"].get(n)) for n in names)]
            for name, w in works.items() if w["gflop"]
        ],
    )  # fmt: skip
    device = ", ".join(f"{key} {value}" for key, value in result["device"].items())
    most = ", ".join(f"{key} {value:.0f}" for key, value in limits.items())
    lines = [
        f"- {name} ({variant}): {reason}"
        for name, w in works.items()
        for variant, reason in w["left_out"].items()
    ]
    left_out = "\n\nLeft out:\n" + "\n".join(lines) if lines else ""
    return f"{times}\n\n{rates}\n\nDevice: {device}. Ceilings measured: {most}.{left_out}"


def _rate(times: dict[str, float] | None) -> str:
    if times is None:
        return "–"
    flop = f"{times['gflop_per_s']:.3g} ({times['flop_share']:.0%})"
    return f"{flop}, {times['gb_per_s']:.3g} ({times['byte_share']:.0%})"


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _waiting(run: dict[str, Callable[[], object]], device: str) -> dict[str, Callable[[], object]]:
    """The same functions, done when they return."""

    def wait(function: Callable[[], object]) -> Callable[[], object]:
        def call() -> None:
            function()
            _wait(device)

        return call

    return {name: wait(function) for name, function in run.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="words in the names of cases; all without")
    parser.add_argument("--write", action="store_true", help="keep the result: gpu.json, gpu.md")
    args = parser.parse_args()
    if reason := why_no_cuda():
        raise SystemExit(f"nothing to measure: {reason}")
    wanted = lambda name: not args.only or any(word in name for word in args.only)  # noqa: E731
    works = [dataclasses.replace(c, rounds=max(c.rounds, 50)) for c in cases() if wanted(c.name)]
    result = measure(works, update="report" if wanted(UPDATE) else None)
    text = f"{table(result)}\n\nMeasured on: {machine.describe(result['machine'])}."
    print(f"\n{text}")
    if args.write:
        report.RESULTS.mkdir(exist_ok=True)
        (report.RESULTS / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        (report.RESULTS / "gpu.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
