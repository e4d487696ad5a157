"""Env frames per second of learner and collector together: `python -m benchmarks.run [--write]`.

The real trainer with its real worker process, by the backends in turn, and by another checkout's
package if asked: `--against PATH`. All that is not an option here is one of `fastdreamer train`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine, report
from benchmarks.machine import ROOT
from benchmarks.timing import rate_cell, summary

BACKENDS = ("native", "eager")
PAUSE = 0.3
"""Seconds between two turns, in which the threads of the last one fall asleep."""
TOLERANCE = 0.05  # of the first update's losses, as in bench_train.py
# A child is this interpreter with the other package first on its path. By -c, because a script's
# folder comes first on the path, and this one has names like `report` and `safety`.
_START = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("paced", sys.argv[1])
paced = importlib.util.module_from_spec(spec)
spec.loader.exec_module(paced)
paced.main(*sys.argv[2:])
"""


class Variant(NamedTuple):
    """What trains: a backend (or "auto") of a checkout's package, by further options of its own."""

    checkout: Path
    backend: str
    options: tuple[str, ...] = ()


class RunFailed(RuntimeError):
    """A training run did not go on; the message holds the end of its log."""


class Run:
    """A run that trains one cycle at a call of ``turn()``, and in between not at all.

    Args:
        variant: what trains.
        options: further ones of ``fastdreamer train``.
        folder: for its run directory and log; made here.
    """

    def __init__(self, variant: Variant, options: Sequence[str], folder: Path) -> None:
        folder.mkdir()
        self._log = folder / "log.txt"
        command = [sys.executable, "-c", _START, str(ROOT / "benchmarks" / "paced.py"),
                   str(variant.checkout), str(folder / "run"), *options,
                   "--backend", variant.backend, *variant.options]  # fmt: skip
        path = os.pathsep.join([str(variant.checkout), os.environ.get("PYTHONPATH", "")])
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                command,
                cwd=variant.checkout,
                env=os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def turn(self) -> dict[str, Any]:
        """Train one cycle; return what ``paced`` says of it.

        Raises:
            RunFailed: the run has ended instead.
        """
        try:
            print(file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            self.close()
            raise RunFailed("\n".join(self._log.read_text().splitlines()[-20:]))
        return json.loads(answer)

    def close(self) -> None:
        """End the run and its worker, wherever they are."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def settings(task: str, time_limit: float, recipe: Sequence[str]) -> list[str]:
    """Options of ``fastdreamer train``: the recipe in short episodes, without an end.

    Updates go by decisions, so that a cycle of a shorter episode is the same work in small.
    Pretraining and evaluations, which come once and every tenth cycle, are left out.
    """
    ours = {"env.time-limit": time_limit, "train.pretrain": 0, "eval.every": 0,
            "train.frames": 10**9}  # fmt: skip
    return [task, *(x for k, v in ours.items() for x in (f"--{k}", str(v))), *recipe]


@contextlib.contextmanager
def running(variants: Mapping[str, Variant], options: Sequence[str]) -> Iterator[dict[str, Run]]:
    """The runs of some variants, each after its first cycle, which collects the prefill as well.

    They are checked: see :func:`check`.

    Raises:
        RunFailed: one did not start. AssertionError: they do not do the same.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        runs, first = {}, {}
        for i, (name, variant) in enumerate(variants.items()):
            print(f"{name} …", file=sys.stderr, flush=True)
            runs[name] = stack.enter_context(
                contextlib.closing(Run(variant, options, Path(folder, str(i))))
            )
            first[name] = runs[name].turn()
        check(first, variants)
        yield runs


def check(first: Mapping[str, dict[str, Any]], variants: Mapping[str, Variant]) -> None:
    """Assert that first cycles are of the same work.

    The updates an env frame calls for are the same but for rounding, however many episodes a cycle
    has; the losses of the very first update, from the same weights, batch and noise, too, as far as
    the variants are of one checkout.

    Raises:
        AssertionError: which and how.
    """
    reference, expected = next(iter(first.items()))
    for name, got in first.items():
        (updates, frames), (like, of) = ((c["updates"], c["env_frames"]) for c in (got, expected))
        mine, other = f"{updates} updates in {frames} env frames", f"{like} in {of}"
        assert abs(updates - like * frames / of) <= frames / of / 2, (
            f"{name} makes {mine}, {reference} {other}: not the same recipe"
        )
        backend = variants[name].backend
        assert backend == "auto" or set(got["ran"].values()) == {backend}, f"{name}: {got['ran']}"
        if variants[name].checkout != variants[reference].checkout:
            continue
        wrong = [
            f"{loss} is {got['losses'][loss]:.4g}, with {reference} {value:.4g}"
            for loss, value in expected["losses"].items()
            if not math.isclose(got["losses"][loss], value, rel_tol=TOLERANCE)
        ]
        assert not wrong, f"{name}: {', '.join(wrong)}"


def take_turns(
    runs: Mapping[str, Callable[[], dict[str, Any]]], rounds: int, warmup: int
) -> dict[str, list[dict[str, Any]]]:
    """Call every run's ``turn`` in turn; return the cycles after ``warmup`` rounds by name."""
    cycles: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for i in range(warmup + rounds):
        for name, turn in runs.items():
            time.sleep(PAUSE)
            cycle = turn()
            if i >= warmup:
                cycles[name].append(cycle)
    return cycles


def rates(cycles: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What cycles come to.

    Returns:
        ``cycle``, a ``summary`` of their times; ``env_frames`` and ``updates`` a second and
        ``waiting``, the share of the time in which the learner waits for the collector, each of
        all cycles together.
    """
    seconds = [cycle["seconds"] for cycle in cycles]
    total = {k: sum(cycle[k] for cycle in cycles) for k in ("env_frames", "updates", "waited")}
    return {
        "cycle": summary(seconds),
        "frames_per_cycle": total["env_frames"] / len(cycles),
        "env_frames_per_s": total["env_frames"] / sum(seconds),
        "updates_per_s": total["updates"] / sum(seconds),
        "waiting": total["waited"] / sum(seconds),
        "ran": cycles[-1]["ran"],
    }


def measure(
    variants: Mapping[str, Variant],
    options: Sequence[str],
    *,
    rounds: int = 5,
    warmup: int = 1,
) -> dict[str, Any]:
    """Check the variants and time them, cycle by cycle in turn.

    Args:
        variants: by name; the first is what the others are held against.
        options: of ``fastdreamer train``, as :func:`settings` makes them.
        rounds: timed cycles of each.
        warmup: untimed ones before, beside the first that checks.

    Returns:
        JSON types: ``machine``, ``options``, ``commits`` by name and ``runs[name]``, ``rates``.

    Raises:
        RunFailed: a variant cannot run here. AssertionError: they do not do the same.
        ValueError: no rounds.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"at least 1 round and 0 of warm-up, got {rounds} and {warmup}")
    circumstances = machine.record()
    with running(variants, options) as runs:
        cycles = take_turns({name: run.turn for name, run in runs.items()}, rounds, warmup)
    return {
        "machine": circumstances,
        "options": list(options),
        "commits": {name: machine.commit(v.checkout) for name, v in variants.items()},
        "runs": {name: rates(own) for name, own in cycles.items()},
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    runs, commits = result["runs"], result["commits"]
    (reference, first), *_ = runs.items()
    frame_ms = {n: run["cycle"]["median_ms"] / run["frames_per_cycle"] for n, run in runs.items()}
    header = ["", "env frames/s: median (p20–p80)", f"{reference} ÷ it", "updates/s"]
    rows = []
    for name, run in runs.items():
        here = commits[name] == result["machine"]["commit"]
        rows.append([
            name if here else f"{name} ({commits[name]})",
            rate_cell(run["cycle"], run["frames_per_cycle"]),
            f"{frame_ms[name] / frame_ms[reference]:.2f}×",
            f"{run['updates_per_s']:.2f}",
            f"{run['waiting']:.0%}",
        ])  # fmt: skip
    return (
        f"`fastdreamer train {' '.join(result['options'])}`: {first['cycle']['repeats']} cycles of "
        f"{first['frames_per_cycle']:.0f} env frames and their updates, variants alternating.\n\n"
        + report.table([*header, "learner waits"], rows)
    )


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict, list[str]]:
    """Return the command line, its variants and the options of ``fastdreamer train``."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--task", default="walker")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), help="or auto")
    parser.add_argument("--against", type=Path, metavar="PATH", action="append", default=[],
                        help="a checkout, built in place, whose package is to be timed beside this "
                        "one by the first of the backends")  # fmt: skip
    parser.add_argument("--beside", metavar="OPTIONS", action="append", default=[],
                        help="further options of `fastdreamer train` in one argument; the first of "
                        "the backends is timed with them, too")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="timed cycles of each")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--time-limit", type=float, default=2.5,
                        help="simulated seconds an episode, so that a cycle is short")  # fmt: skip
    parser.add_argument("--write", action="store_true", help="keep the result: JSON and README")
    args, recipe = parser.parse_known_args(arguments)
    variants = {name: Variant(ROOT, name) for name in args.backends}
    for path in args.against:
        if not (path / "fastdreamer" / "__init__.py").is_file():
            parser.error(f"--against {path}: no checkout of fastdreamer")
        variants[f"{args.backends[0]} of {path.name}"] = Variant(path.resolve(), args.backends[0])
    for beside in args.beside:
        variants[beside] = Variant(ROOT, args.backends[0], tuple(shlex.split(beside)))
    return args, variants, settings(args.task, args.time_limit, recipe)


def main() -> None:
    args, variants, options = parse()
    try:
        result = measure(variants, options, rounds=args.rounds, warmup=args.warmup)
    except RunFailed as error:
        raise SystemExit(f"a run failed:\n{error}") from None
    report.publish("run", result, write=args.write)


if __name__ == "__main__":
    main()
