"""Milliseconds per phase of one `report` update: `python -m benchmarks.phases [--write]`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import machine, report, synthetic
from benchmarks.bench_train import REFERENCE, differing
from benchmarks.learner import Learner, variants
from benchmarks.timing import MIN_REPEATS, PhaseRecorder, cell, summary
from fastdreamer.machine import nvtx

# The phases are the ranges that the trainer and the agent mark for profilers. While a recorder
# stands in for nvtx.annotate, the code that runs is the code that trains, to the letter; there is
# no second copy of the update that could drift from it or be arranged to look better. The recorder
# reads the clock about 30 times an update, microseconds in all, and the whole update is timed from
# outside, so what no range covers cannot hide: it is the row "other".
ROWS = {
    "data": "data: sample from replay",
    "encode": "encode",
    "observe": "observe",
    "decode": "decode (pixels and reward)",
    "model backward": "model backward, clipping",
    "imagine": "imagine, with reward, value and λ-return",
    "behavior backward": "actor and critic backward, clipping",
    "optimizer": "optimisers (all three steps)",
    "other": "other (noise, losses, checks)",
    "whole": "**whole update**",
}


def measure(
    repeats: int,
    warmup: int,
    threads: int,
    preset_name: str = "report",
    *,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Check the first update of every variant by its losses, and time the phases of later ones.

    The variants take turns update by update.

    Args:
        repeats: timed updates per variant.
        warmup: untimed ones before.
        threads: of torch.
        preset_name: of the configuration.
        allow_missing: whether native may be left out.

    Returns:
        JSON types: ``machine``, ``settings`` and ``phases[variant][phase]``, a ``summary``.

    Raises:
        ValueError: too few repeats. MissingVariant: native cannot run here. AssertionError: losses
            of the first update are not those of eager fp32.
    """
    if repeats < MIN_REPEATS:
        raise ValueError(f"at least {MIN_REPEATS} repeats, got {repeats}")
    torch.set_num_threads(threads)
    circumstances = machine.record()
    with tempfile.TemporaryDirectory() as folder:
        synthetic.write_episodes(Path(folder), 5)
        replay = synthetic.open_replay(Path(folder))
        replay.load()
        learners = {name: Learner(name, replay, preset_name) for name in variants(allow_missing)}
        first = {name: learner.step() for name, learner in learners.items()}
        for name, losses in first.items():
            wrong = differing(losses, first[REFERENCE])
            assert not wrong, f"{name}: {wrong}"
        recorders = {name: PhaseRecorder() for name in learners}
        for i in range(warmup + repeats):
            for name, learner in learners.items():
                if i < warmup:
                    learner.step()
                    continue
                recorder = recorders[name]
                with (
                    mock.patch.object(nvtx, "annotate", recorder.annotate),
                    recorder.repeat(containers=["update"]),
                ):
                    learner.step()
    phases = {
        name: {phase: summary(seconds) for phase, seconds in recorder.samples.items()}
        for name, recorder in recorders.items()
    }
    for name, measured in phases.items():
        if unknown := measured.keys() - ROWS.keys():
            raise ValueError(f"{name}: unknown phases {sorted(unknown)}")
    config = learners[next(iter(learners))].config
    settings = {
        "preset": preset_name,
        "batch": config.replay.batch,
        "length": config.replay.length,
        "imag_horizon": config.behavior.imag_horizon,
        "warmup": warmup,
    }
    return {"machine": circumstances, "settings": settings, "phases": phases}


def table(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    phases = result["phases"]
    reference = next(iter(phases))
    others = [name for name in phases if name != reference]
    header = ["ms: median (p20–p80)", *phases, *(f"{reference} / {name}" for name in others)]
    rows = []
    for phase, label in ROWS.items():
        times = {name: measured.get(phase) for name, measured in phases.items()}
        if not any(times.values()):
            continue
        pairs = [(times[reference], times[name]) for name in others]
        ratios = [f"{a['median_ms'] / b['median_ms']:.2f}×" if a and b else "–" for a, b in pairs]
        rows.append([label, *(cell(t) for t in times.values()), *ratios])
    s = result["settings"]
    repeats = phases[reference]["whole"]["repeats"]
    return (
        f"Preset `{s['preset']}`: batch {s['batch']} × {s['length']}, "
        f"imagination horizon {s['imag_horizon']}; {repeats} repeats after {s['warmup']} "
        "warm-up updates, variants alternating.\n\n" + report.table(header, rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--allow-missing", action="store_true", help="go on without what can't run")
    parser.add_argument("--write", action="store_true", help="keep the result: JSON and README")
    args = parser.parse_args()
    result = measure(args.repeats, args.warmup, args.threads, allow_missing=args.allow_missing)
    report.publish("phases", result, write=args.write)


if __name__ == "__main__":
    main()
