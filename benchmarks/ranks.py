"""A learner of several processes beside one of several threads: `python -m benchmarks.ranks
[--write]`. Updates of preset walker from synthetic episodes, without a collector; each variant
in processes of its own, one after the other in every round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, report, synthetic
from benchmarks.learner import Learner
from benchmarks.timing import cell, summary
from fastdreamer.training.ranks import follow, joined

WARM_UP, UPDATES, EPISODES = 5, 40, 4
VARIANT = "native bf16"
GATE = 0.02
"""By which losses of the first update may differ between variants, in bfloat16."""


def variants(cores: int) -> dict[str, tuple[int, int, int]]:
    """Ranks, threads and the batch's divisor of each, by name."""
    return {
        "1 process, 1 thread": (1, 1, 1),
        "1 process, 1 thread, half a batch": (1, 1, 2),
        f"1 process, {cores} threads": (1, cores, 1),
        f"{cores} ranks, 1 thread each": (cores, 1, 1),
    }


def learn(directory: Path, threads: int, divisor: int) -> None:
    """A rank of a variant; the first one prints its first losses and the seconds of updates."""
    torch.set_num_threads(threads)
    with joined() as ranks:
        if ranks.rank:
            follow(ranks)
        replay = synthetic.open_replay(directory)
        replay.load()
        learner = Learner(VARIANT, replay, "walker", threads=threads)
        batch = learner.config.replay.batch // divisor
        replay_config = dataclasses.replace(learner.config.replay, batch=batch)
        learner.config = dataclasses.replace(learner.config, replay=replay_config)
        first = learner.step()
        for _ in range(WARM_UP):
            learner.step()
        seconds = []
        for _ in range(UPDATES):
            start = time.perf_counter()
            learner.step()
            seconds.append(time.perf_counter() - start)
    print(json.dumps({"first": first, "seconds": seconds}))


def run(directory: Path, ranks: int, threads: int, divisor: int) -> dict[str, Any]:
    """Start a variant, wait for its end, and return what it printed."""
    own = ["-m", "benchmarks.ranks", "--child", str(directory), "--threads", str(threads),
           "--divisor", str(divisor)]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else ()), *own],
        cwd=machine.ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def measure(rounds: int) -> dict[str, Any]:
    """Time every variant ``rounds`` times.

    Returns:
        JSON types: ``machine``, ``settings`` and ``seconds[variant]``, of all updates.

    Raises:
        RuntimeError: a variant does not learn what the first one does.
    """
    circumstances = machine.record()
    names = variants(circumstances["cores"])
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, float] | None = None
    with tempfile.TemporaryDirectory() as folder:
        synthetic.write_episodes(Path(folder), EPISODES)
        for _ in range(rounds):
            for name, setting in names.items():
                found = run(Path(folder), *setting)
                seconds[name] += found["seconds"]
                if setting[-1] > 1:
                    continue
                losses = losses or found["first"]
                for key, value in losses.items():
                    if not math.isclose(found["first"][key], value, rel_tol=GATE, abs_tol=GATE):
                        raise RuntimeError(f"{name}: {key} is {found['first'][key]}, not {value}")
    settings = {"preset": "walker", "variant": VARIANT, "rounds": rounds, "updates": UPDATES}
    return {"machine": circumstances, "settings": settings, "seconds": seconds}


def table(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    times = {name: summary(seconds) for name, seconds in result["seconds"].items()}
    medians = {name: own["median_ms"] for name, own in times.items()}
    several = next(name for name in medians if name.endswith("threads"))
    rows = [
        [name, cell(own), f"{1e3 / medians[name]:.2f}", f"{medians[several] / medians[name]:.2f}"]
        for name, own in times.items()
    ]
    settings = result["settings"]
    header = ["learner", "ms an update: median (p20–p80)", "updates/s", "of threads'"]
    return (
        f"Preset {settings['preset']}, {settings['variant']}; {settings['rounds']} rounds of "
        f"{settings['updates']} updates of each, after {WARM_UP + 1} that are not timed.\n\n"
        + report.table(header, rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the result: JSON and README")
    parser.add_argument("--child", type=Path, metavar="DIRECTORY", help="for itself")
    parser.add_argument("--threads", type=int, help="for itself")
    parser.add_argument("--divisor", type=int, help="for itself")
    args = parser.parse_args()
    if args.child:
        learn(args.child, args.threads, args.divisor)
        return
    report.publish("ranks", measure(args.rounds), write=args.write)


if __name__ == "__main__":
    main()
