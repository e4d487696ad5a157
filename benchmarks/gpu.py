"""Everything there is to measure on an NVIDIA GPU: `python -m benchmarks.gpu [--write]`.

`benchmarks/gpu_day.sh` is what a first visit runs: this, and what comes before it.

Correctness against eager in float64 comes first: nothing that is wrong is timed. Then every op and
a whole update: Triton kernels from graphs of their own, and in torch's CUDA graph; eager, and eager
in torch's CUDA graph; ``torch.compile(mode="reduce-overhead")``; what the device can do at most;
the bandwidth and FLOP/s reached. Without a GPU it says why there is none, and ends with exit
code 1, as it does where something is wrong, or a variant does not run that should.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    bench_lambda_return,
    bench_open_loop,
    bench_rssm_step,
    bench_train,
    machine,
    ops,
    report,
)
from benchmarks.learner import Learner
from benchmarks.ops import UPDATE
from benchmarks.race import Case, first_line, race
from benchmarks.timing import MIN_REPEATS, cell
from benchmarks.variants import Entries, Variant, gpu_variants
from fastdreamer.ops.backend import why_no_cuda
from fastdreamer.ops.gpu import driver_state

ROUNDS = 50  # at least, of an op
PRESET = "report"  # of the whole update
NO_PRODUCTS = "no matrix product that could be bfloat16"
FIRST = (
    "imagine + heads", "observe + backward", UPDATE, "actor + critic update", "cem, one action",
    "open_loop", "rssm_step, B 400", "observe", "imagine",
)  # fmt: skip
"""The works that tell most, so that they are there where the time runs out."""


def cases() -> list[Case]:
    """Those of ``ops``, and what its table for CPUs lacks: λ-returns, backward of plain steps."""
    more = [bench_rssm_step.BACKWARD, bench_open_loop.BACKWARD, *bench_lambda_return.CASES]
    works = [case for case in (*ops.cases(), *more) if not case.pause]  # of a CPU's threads
    return [dataclasses.replace(case, rounds=max(case.rounds, ROUNDS)) for case in works]


def waiter(device: str) -> Callable[[], object]:
    """What waits until everything that was started on the device is done."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def ceilings(device: str, size: int | None = None, seconds: float = 1.0) -> dict[str, float]:
    """Measure what the device can do at most, on matrices of that size.

    Returns:
        ``gb_per_s`` of a copy, reading and writing counted; ``fp32`` and ``bf16``, GFLOP/s of a
        square matrix product; fp32 without tensor cores, as the kernels' ``ieee`` products.
    """
    wait = waiter(device)
    size = size or (8192 if device == "cuda" else 512)

    def rate(work: Callable[[], object], amount: float) -> float:
        work()
        wait()
        times, end = [], time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            work()
            wait()
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


def demand(learner: Learner) -> tuple[int, int]:
    """FLOP of an update, as torch counts the products and convolutions of eager code, and bytes.

    The bytes are the least: the batch read once, every weight and its two moments read and written.
    """
    settings = learner.config.replay
    batch = learner.replay.sample(settings.batch, settings.length, learner.sample_rng)
    with FlopCounterMode(display=False) as counter:
        learner.step()
    states = [(p, *s.values()) for o in learner.optimizers.values() for p, s in o.state.items()]
    held = sum(tensor.nbytes for tensors in states for tensor in tensors)
    return counter.get_total_flops(), sum(x.nbytes for x in batch.values()) + 2 * held


def measure(
    works: Iterable[Case],
    variants: Mapping[str, Variant],
    *,
    update: str | None = "report",
    rounds: int | None = None,
    limits: dict[str, float] | None = None,
    until: float = math.inf,
    done: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Check and time every variant of every case, those of :data:`FIRST` first.

    Args:
        works: the cases.
        variants: all on one device, "eager fp32" among them.
        update: preset of the whole update; None leaves it out.
        rounds: instead of each case's own number.
        limits: what :func:`ceilings` returned; None measures it.
        until: on ``time.monotonic``; a work that would begin later is left out.
        done: called with the result so far behind every work, so that a run that is cut off
            keeps what it had.

    Returns:
        JSON types: ``machine``, ``device``, ``ceilings``, ``variants``, their names,
        ``not_reached``, names of works, and ``works[name]`` with ``gflop``, ``bytes``,
        ``times[variant]`` (a ``summary`` with ``gflop_per_s``, ``gb_per_s`` and their shares of the
        ceilings; no FLOP where there is no product), ``left_out[variant]``, a reason, ``missing``,
        those of them that should run, and ``wrong``: None, or what a check of ours found. Then
        nothing of the work is timed.
    """
    device = next(iter(variants.values())).device
    limits = limits or ceilings(device)
    result = {"machine": machine.record(), "device": describe(device), "ceilings": limits}
    result["variants"] = list(variants)
    results, not_reached = {}, []
    result |= {"works": results, "not_reached": not_reached}

    def add(name: str, prepare: Callable[[], tuple[int, int, Entries]], **options: Any) -> None:
        if time.monotonic() > until:
            not_reached.append(name)
            return
        print(f"{name} …", file=sys.stderr, flush=True)
        work = results[name] = {"gflop": 0.0, "bytes": 0, "times": {}, "left_out": {}}
        work |= {"missing": [], "wrong": None}
        try:
            flops, size, entries = prepare()
            times = race(entries.run, wait=waiter(device), **options)
        except Exception as error:  # Triton's are of no kind; the other works are worth a look
            kind = "" if isinstance(error, (AssertionError, RuntimeError)) else type(error).__name__
            work["wrong"] = f"{kind}{': ' * bool(kind)}{first_line(error)}"
            print(f"  WRONG: {work['wrong']}", file=sys.stderr, flush=True)  # of a run cut off, too
        else:
            for variant, t in times.items():
                t["gb_per_s"] = size / t["median_ms"] / 1e6
                t["byte_share"] = t["gb_per_s"] / limits["gb_per_s"]
                if flops:
                    t["gflop_per_s"] = flops / t["median_ms"] / 1e6
                    most = limits["bf16" if variants[variant].bf16 else "fp32"]
                    t["flop_share"] = t["gflop_per_s"] / most
            work |= {"gflop": flops / 1e9, "bytes": size, "times": times}
            work |= {"left_out": entries.left_out, "missing": list(entries.missing)}
        done(result)

    def prepare_case(case: Case) -> tuple[int, int, Entries]:
        able = {n: v for n, v in variants.items() if case.flops or not v.bf16}
        rest = dict.fromkeys((n for n in variants if n not in able), NO_PRODUCTS)
        entries = case.entries(able)
        return case.flops, least_bytes(case), entries._replace(left_out=entries.left_out | rest)

    def prepare_update(folder: str) -> tuple[int, int, Entries]:
        replay = bench_train.open_replay(Path(folder))
        asked = demand(Learner(bench_train.REFERENCE, replay, update, variants))
        return *asked, bench_train.entries(replay, update, variants)

    by_name = {case.name: case for case in works}
    names = [*by_name, *([UPDATE] if update else [])]
    for name in [*(n for n in FIRST if n in names), *(n for n in names if n not in FIRST)]:
        if case := by_name.get(name):
            options = {"rounds": rounds or case.rounds, "calls": case.calls, "pause": case.pause}
            add(name, partial(prepare_case, case), **options)
        else:
            with tempfile.TemporaryDirectory() as folder:
                options = {"rounds": rounds or MIN_REPEATS, "warmup": 3}
                add(name, partial(prepare_update, folder), **options)
    done(result)
    return result


def describe(device: str) -> dict[str, Any]:
    """Return the device, its driver and what drives it, as JSON types."""
    found: dict[str, Any] = {"name": machine.record()["cpu"], "driver": driver_state()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    found |= nvidia_smi()
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found | {"torch": torch.__version__, "triton": _triton()}


def _triton() -> str:
    """Its version; it has other names among the packages of other builds of PyTorch."""
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def nvidia_smi() -> dict[str, str]:
    """The driver's version, clock and power limit of the first GPU; nothing without the tool."""
    names = ("driver_version", "clocks.max.sm", "power.limit")
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {}
    values = done.stdout.splitlines()[0].split(",")
    return dict(zip(names, (value.strip() for value in values), strict=True))


def table(result: dict[str, Any]) -> str:
    """Return every time, rate and reason as Markdown."""
    works, limits = result["works"], result["ceilings"]
    names = result["variants"]
    times = report.table(
        ["ms: median (p20–p80)", *names],
        [[name, *(cell(w["times"].get(n)) for n in names)] for name, w in works.items()],
    )
    rates = report.table(
        ["GFLOP/s (share), GB/s (share)", "GFLOP", "MB at least", *names],
        [
            [name, f"{w['gflop']:.3g}" if w["gflop"] else "–", f"{w['bytes'] / 1e6:.3g}",
             *(_rate(w["times"].get(n)) for n in names)]
            for name, w in works.items() if w["times"]
        ],
    )  # fmt: skip
    device = ", ".join(f"{key} {value}" for key, value in result["device"].items())
    most = ", ".join(f"{key} {value:.0f}" for key, value in limits.items())
    wrong = [f"- {name}: {w['wrong']}" for name, w in works.items() if w["wrong"]]
    left_out: dict[str, list[str]] = {}
    for name, work in works.items():
        for variant, reason in work["left_out"].items():
            left_out.setdefault(reason, []).append(f"{name} ({variant})")
    text = f"{times}\n\n{rates}\n\nDevice: {device}. Ceilings measured: {most}."
    if wrong:
        text = "\n".join(["Wrong, so not timed:", *wrong]) + f"\n\n{text}"
    if result["not_reached"]:
        text += f"\n\nNot reached in time: {'; '.join(result['not_reached'])}."
    if left_out:
        lines = (f"- {'; '.join(places)}: {reason}" for reason, places in left_out.items())
        text += "\n\nLeft out:\n" + "\n".join(lines)
    return text


def _rate(times: dict[str, float] | None) -> str:
    if times is None:
        return "–"
    parts = [f"{times['gb_per_s']:.3g} ({times['byte_share']:.0%})"]
    if "gflop_per_s" in times:
        parts.insert(0, f"{times['gflop_per_s']:.3g} ({times['flop_share']:.0%})")
    return ", ".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="words in the names of cases; all without")
    parser.add_argument("--write", action="store_true", help="keep the result: gpu.json, gpu.md")
    parser.add_argument("--out", type=Path, help="keep it in this folder instead of results/")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no work later")
    parser.add_argument(
        "--without", metavar="WORD", help="leave out the variants with it: reduce-overhead compiles"
    )
    parser.add_argument("--allow-missing", action="store_true", help="go on without what can't run")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: a rehearsal with the variants that run there; its numbers are no GPU's",
    )
    args = parser.parse_args(arguments)
    until = time.monotonic() + 60 * args.minutes
    if args.write and args.device == "cpu":
        parser.error("--write keeps what a GPU did, not a rehearsal")
    wanted = lambda name: not args.only or any(word in name for word in args.only)  # noqa: E731
    works = [case for case in cases() if wanted(case.name)]
    update = PRESET if wanted(UPDATE) else None
    variants = gpu_variants(args.device)
    if args.without:
        variants = {name: v for name, v in variants.items() if args.without not in name}
    if args.device == "cuda" and (reason := why_no_cuda()):
        count = f"{len(works)} ops' works{' and a whole update' if update else ''}"
        print(f"Ready: {count}, in up to {len(variants)} variants each.")
        print(f"No GPU, so nothing was measured: {reason}")
        raise SystemExit(1)

    def show(result: dict[str, Any]) -> str:
        return f"{table(result)}\n\nMeasured on: {machine.describe(result['machine'])}."

    def keep(result: dict[str, Any]) -> None:
        folder = args.out or report.RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / "gpu.md").write_text(show(result) + "\n")

    done = keep if args.write or args.out else lambda result: None
    rounds = MIN_REPEATS if args.device == "cpu" else None
    result = measure(works, variants, update=update, rounds=rounds, until=until, done=done)
    print(f"\n{show(result)}")
    works_done = result["works"].values()
    missing = args.device == "cuda" and any(work["missing"] for work in works_done)
    if any(work["wrong"] for work in works_done) or (missing and not args.allow_missing):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
