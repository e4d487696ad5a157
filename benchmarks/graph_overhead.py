"""What the CUDA-graph loop costs the CPU: `python -m benchmarks.graph_overhead [--write]`.

On a stand-in driver that runs nothing (tests/cuda/standin.c), with the programs of preset
``report``, compiled for sm_90. So it is what fastdreamer adds to the driver's own time, which only
a machine with a GPU can tell.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import machine, report
from benchmarks.timing import MIN_REPEATS, summary
from fastdreamer import testing
from fastdreamer.ops.triton.program import Program, empty

sys.path.insert(0, str(machine.ROOT / "tests/cuda"))

H, B = 15, 400
REPLAYS = 200  # in one timed round
TARGETS = {"capture, a node": 2.0, "replay": 5.0}  # µs


def programs() -> dict[str, Program]:
    """The rollout of preset ``report``, without and with the heads."""
    from fastdreamer.ops.triton import rollout

    found = {}
    for name, heads in (("imagine", False), ("imagine + heads", True)):
        inputs = testing.imagine_inputs(testing.REPORT, 1, 1, heads=heads)
        call = rollout.Call("imagine", inputs["params"], inputs["actor"], inputs.get("returns"))
        found[name] = rollout.forward_program(call.spec(torch.empty(H, B, 30), False, False))
    return found


def measure(rounds: int = MIN_REPEATS) -> dict[str, Any]:
    """Time capture, replay and moved pointers of every program.

    Returns:
        JSON types: ``machine`` and ``works[name]`` with ``nodes`` and ``times``, summaries whose
        milliseconds are of one node, one replay, or one node written.
    """
    import standin

    if reason := standin.why_not():
        raise SystemExit(f"the stand-in driver cannot be built here: {reason}")
    works = {}
    circumstances = machine.record()
    with tempfile.TemporaryDirectory() as folder:
        library = standin.build(Path(folder), "-O2")
        os.environ["FASTDREAMER_LIBCUDA"] = str(library)
        driver = standin.Driver(library)
        driver.on_launch(None)
        for name, program in programs().items():
            print(f"{name} …", file=sys.stderr, flush=True)
            works[name] = _measure(program, rounds)
    return {"machine": circumstances, "works": works}


def _measure(program: Program, rounds: int) -> dict[str, Any]:
    from fastdreamer.ops.triton.cuda_graph import Graphs

    graphs = Graphs(on_host=True)
    device = torch.device("cpu")
    count = len(program.slots)
    here = [4096 * 1024 * (i + 1) for i in range(count)]
    there = [address + 256 for address in here]
    kinds = ("capture, a node", "replay", "replay with every pointer moved, a node", "whole call")
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    inputs = {s.name: torch.empty(s.shape, dtype=s.dtype) for s in program.of_kind("input")}
    outputs = {s.name: empty(s, device) for s in program.slots.values() if s.kind != "input"}
    keep = graphs._describe(program, device, 0, [])  # kernels stay loaded
    for _ in range(rounds):
        loop = graphs._describe(program, device, 0, [])._loop
        start = time.perf_counter()
        nodes = loop.replay(here, 0)
        seconds["capture, a node"].append((time.perf_counter() - start) / nodes)
        start = time.perf_counter()
        for _ in range(REPLAYS):
            loop.replay(here, 0)
        seconds["replay"].append((time.perf_counter() - start) / REPLAYS)
        start = time.perf_counter()
        for i in range(REPLAYS):
            loop.replay(here if i % 2 else there, 0)
        spent = (time.perf_counter() - start) / REPLAYS
        seconds["replay with every pointer moved, a node"].append(spent / nodes)
        with mock.patch(
            "fastdreamer.ops.triton.cuda_graph.empty", lambda slot, _: outputs[slot.name]
        ):
            graphs.run(program, inputs)
            start = time.perf_counter()
            for _ in range(REPLAYS):
                graphs.run(program, inputs)
        seconds["whole call"].append((time.perf_counter() - start) / REPLAYS)
    del keep
    return {"nodes": nodes, "times": {kind: summary(s) for kind, s in seconds.items()}}


def table(result: dict[str, Any]) -> str:
    """Return every time in microseconds as Markdown."""
    kinds = list(next(iter(result["works"].values()))["times"])
    rows = [
        [name, str(work["nodes"]), *(_cell(work["times"][kind]) for kind in kinds)]
        for name, work in result["works"].items()
    ]
    return report.table(["µs: median (p20–p80)", "nodes", *kinds], rows)


def _cell(times: dict[str, float]) -> str:
    median, p20, p80 = (f"{1e3 * times[k]:.2f}" for k in ("median_ms", "p20_ms", "p80_ms"))
    return f"{median} ({p20}–{p80})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the result: JSON and README")
    args = parser.parse_args()
    report.publish("graph_overhead", measure(), write=args.write)


if __name__ == "__main__":
    main()
