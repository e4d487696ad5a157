"""Env frames a second of the pool, by workers and environments: `python -m benchmarks.pool`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, report, run
from benchmarks.race import race
from benchmarks.timing import MIN_REPEATS, rate_cell
from benchmarks.variants import check_native
from fastdreamer.acting.parts import acting_weights
from fastdreamer.acting.policy import Policy
from fastdreamer.config import Config, preset
from fastdreamer.envs.gl import select_gl
from fastdreamer.ops.backend import chosen_backend
from fastdreamer.training.cluster import connected
from fastdreamer.training.collector import Collector, Job
from fastdreamer.training.episodes import episode_path

POOLS = {"1 × 1": (1, 1), "1 × 2": (1, 2), "1 × 4": (1, 4), "2 × 1": (2, 1), "2 × 2": (2, 2)}
"""Name → workers and environments in each. Others are compared with the first."""
RAY = {f"{name}, Ray": name for name in ("1 × 1", "2 × 1")}
"""Pools of Ray actors on this machine, where Ray is installed, and those that they are like."""
WHOLE = {
    "1 × 1": (),
    "1 × 2": ("--collect.envs", "2"),
    "2 × 1": ("--collect.round", "2", "--collect.workers", "2"),
    "1 × 1, Ray": ("--ray", "local"),
}
"""Pools beside a learner, the whole of preset walker: name → options of ``fastdreamer train``."""
KINDS = {"pixels": "walker", "state": "state"}
"""What the agent sees → the preset of its settings."""
ROUND = 4  # episodes
SECONDS = {"pixels": 2.0, "state": 25.0}  # simulated, of an episode
WHOLE_SECONDS = 2.5
FRAMES = 40  # env frames a simulated second: Walker's control steps


def _config(kind: str, workers: int, envs: int) -> Config:
    config = dataclasses.replace(preset(KINDS[kind]), device="cpu")
    return dataclasses.replace(
        config,
        env=dataclasses.replace(config.env, task="walker-walk", obs=kind, time_limit=SECONDS[kind]),
        collect=dataclasses.replace(config.collect, round=ROUND, workers=workers, envs=envs),
    )


def frames(kind: str) -> int:
    """Env frames of a round."""
    return round(ROUND * SECONDS[kind] * FRAMES)


@contextlib.contextmanager
def opened(kind: str) -> Iterator[dict[str, Callable[[], object]]]:
    """For each pool a function by which it collects a round, the same episodes again and again.

    Raises:
        AssertionError: the pools' episodes differ in a single bit. (With eager ops, of pools whose
            workers have as many environments.) GLError: nothing here can draw.
    """
    if kind == "pixels":
        select_gl()
    job, runs, seen = Job(0, list(range(ROUND)), False, 0, None), {}, {}
    native = chosen_backend("cpu") == "native"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places, pools = dict.fromkeys(POOLS), dict(POOLS)
        if importlib.util.find_spec("ray"):
            # Room for all of them at once: who is not asked is idle.
            cluster = stack.enter_context(
                connected("local", sum(POOLS[name][0] for name in RAY.values()))
            )
            places |= dict.fromkeys(RAY, cluster)
            pools |= {name: POOLS[like] for name, like in RAY.items()}
        for name, (workers, envs) in pools.items():
            config, directory = _config(kind, workers, envs), folder / name.replace(" ", "")
            pool = Collector(config, directory, place=places[name])
            stack.callback(pool.close)
            agent = Policy(config, pool.obs_shapes, pool.action_dim)
            runs[name] = functools.partial(_collect, pool, job, acting_weights(agent))
            runs[name]()
            files = [episode_path(directory, index).read_bytes() for index in job.episodes]
            same = seen.setdefault("all" if native else envs, files)
            assert files == same, f"{kind}: {name} collects other episodes"
        yield runs


def _collect(pool: Collector, job: Job, weights: dict[str, torch.Tensor]) -> None:
    pool.submit(job, weights)
    pool.wait()


def measure(rounds: int) -> dict[str, Any]:
    """Check and time every pool, with nothing learning beside it; then some in whole runs.

    Args:
        rounds: timed ones of each.

    Raises:
        AssertionError: pools collect other episodes. MissingVariant: native cannot run here.
    """
    check_native()
    circumstances, times, overhead = machine.record(), {}, {}
    for kind in KINDS:
        with opened(kind) as runs:
            seconds: dict[str, list[float]] = {}
            times[kind] = race(runs, rounds=rounds, kept=seconds)
        overhead[kind] = {
            name: statistics.median(
                a / b for a, b in zip(seconds[like], seconds[name], strict=True)
            )
            for name, like in RAY.items()
            if name in seconds
        }
    names = [name for name in WHOLE if "Ray" not in name or importlib.util.find_spec("ray")]
    variants = {name: run.Variant(run.ROOT, "auto", WHOLE[name]) for name in names}
    recipe = run.settings("walker", WHOLE_SECONDS, ["--preset", "walker"])
    return {
        "machine": circumstances,
        "settings": {"round": ROUND, "frames": {kind: frames(kind) for kind in KINDS}},
        "times": times,
        "ray": overhead,
        "whole": run.measure(variants, recipe, rounds=max(5, rounds // 4)),
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    times, amounts = result["times"], result["settings"]["frames"]
    header = ["env frames/s: median (p20–p80), workers × environments"]
    for kind in times:
        header += [f"from {kind}", f"against {next(iter(POOLS))}"]
    rows = []
    for name in next(iter(times.values())):
        row = [name]
        for kind, measured in times.items():
            base = next(iter(measured.values()))["median_ms"]
            own = measured[name]
            row += [rate_cell(own, amounts[kind]), f"{base / own['median_ms']:.2f}×"]
        rows.append(row)
    beside = [
        f"{name} {ratio:.2f} from {kind}"
        for kind, ratios in result["ray"].items()
        for name, ratio in ratios.items()
    ]
    told = ", ".join(f"{n} env frames from {kind}" for kind, n in amounts.items())
    text = (
        f"A round of {result['settings']['round']} episodes ({told}), its files included; nothing "
        f"learns beside it.\n\n{report.table(header, rows)}\n\n"
        f"Beside a learner: {run.table(result['whole'])}"
    )
    if beside:
        text += (
            f"\n\nAgainst the same pool of processes, in one round: {', '.join(beside)} (medians)."
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=MIN_REPEATS)
    parser.add_argument("--write", action="store_true", help="keep the result: JSON and README")
    args = parser.parse_args()
    report.publish("pool", measure(args.rounds), write=args.write)


if __name__ == "__main__":
    main()
