"""Peak resident memory after 1 and after N episodes: `python -m benchmarks.memory [--write]`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, report, synthetic
from benchmarks.learner import Learner, variants
from fastdreamer.acting.parts import acting_weights
from fastdreamer.config import preset
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.training.collector import Collector, Job

SAMPLES, UPDATES = 10, 10  # batches drawn after every episode; updates before each reading


def peak_mib(pid: int | str = "self") -> float:
    """Return a process's peak resident memory in MiB (VmHWM), pages of mapped files included.

    Unlike getrusage's ru_maxrss it starts anew with a program, whoever started it.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def learner_peaks(variant: str, directory: Path, episodes: int) -> list[float]:
    """Learn in this process while episodes enter replay; peak after the first and the last.

    Args:
        variant: of the learner.
        directory: holds at least that many episodes, written by another process as in a run.
        episodes: to enter.
    """
    replay = synthetic.open_replay(directory)
    learner = Learner(variant, replay, "report")
    peaks = []
    for index in range(episodes):
        replay.add(index)
        for _ in range(SAMPLES):
            replay.sample(learner.config.replay.batch, learner.config.replay.length,
                          learner.sample_rng)  # fmt: skip
        if index in (0, episodes - 1):
            for _ in range(UPDATES):
                learner.step()
            peaks.append(peak_mib())
    return peaks


def collector_peaks(directory: Path, episodes: int) -> list[float]:
    """Collect real Walker episodes from pixels in the worker process; its peaks as above."""
    config = dataclasses.replace(preset("report"), device="cpu")
    collector = Collector(config, directory)
    try:
        (worker,) = multiprocessing.active_children()
        agent = Dreamer(config, collector.obs_shapes, collector.action_dim)
        weights = acting_weights(agent)
        peaks = []
        for index in range(episodes):
            job = Job(update=0, episodes=[index], random=False, evaluations=0, video=None)
            collector.submit(job, weights)
            collector.wait()
            if index in (0, episodes - 1):
                peaks.append(peak_mib(worker.pid))
    finally:
        collector.close()
    return peaks


def measure(
    episodes: int, collected: int, threads: int, *, allow_missing: bool = False
) -> dict[str, Any]:
    """Measure every variant of the learner, each in a process of its own, and the collector.

    Args:
        episodes: in replay at the last reading of the learner, at least 2.
        collected: episodes at the last reading of the collector, at least 2; 0 leaves it out.
        threads: of torch in the learner.
        allow_missing: whether native may be left out.

    Returns:
        JSON types: ``machine``, ``settings`` and ``peaks[row]``, MiB by number of episodes.
    """
    torch.set_num_threads(threads)
    circumstances = machine.record()
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "noise")
        synthetic.write_episodes(directory, episodes)
        for variant in variants(allow_missing):
            child = [sys.executable, "-m", "benchmarks.memory", "--threads", str(threads),
                     "--episodes", str(episodes), "--child", variant, str(directory)]  # fmt: skip
            done = subprocess.run(
                child, cwd=machine.ROOT, stdout=subprocess.PIPE, text=True, check=True
            )
            first, last = json.loads(done.stdout)
            peaks[f"learner, {variant}"] = {"1": first, str(episodes): last}
        if collected:
            first, last = collector_peaks(Path(folder, "walker"), collected)
            peaks["collector (worker process)"] = {"1": first, str(collected): last}
    settings = {"preset": "report", "samples_per_episode": SAMPLES, "updates": UPDATES}
    return {"machine": circumstances, "settings": settings, "peaks": peaks}


def table(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    rows = []
    for name, peaks in result["peaks"].items():
        (_, first), (count, last) = peaks.items()
        rows.append([name, f"{first:.0f}", f"{last:.0f} (after {count})", f"{last - first:+.0f}"])
    return report.table(
        ["peak resident memory, MiB", "after 1 episode", "after many", "difference"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--collected", type=int, default=10, help="episodes of the collector")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--allow-missing", action="store_true", help="go on without what can't run")
    parser.add_argument("--write", action="store_true", help="keep the result: JSON and README")
    parser.add_argument("--child", nargs=2, metavar=("VARIANT", "DIRECTORY"), help="for itself")
    args = parser.parse_args()
    if args.episodes < 2 or args.collected == 1:
        parser.error("at least 2 episodes")
    if args.child:
        torch.set_num_threads(args.threads)
        variant, directory = args.child
        print(json.dumps(learner_peaks(variant, Path(directory), args.episodes)))
        return
    result = measure(args.episodes, args.collected, args.threads, allow_missing=args.allow_missing)
    report.publish("memory", result, write=args.write)


if __name__ == "__main__":
    main()
