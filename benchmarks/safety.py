"""Return and violations of collected episodes along runs, with and without a barrier.

    python -m benchmarks.safety NAME=RUN [NAME=RUN ...] --out benchmarks/results/safety

Reads the episodes that the runs keep in replay, counts by the built-in signal of Walker how many
decisions ended in an unsafe state, and writes OUT.csv and OUT.png. ``fastdreamer eval RUN --safety
walker [--shield]`` gives the numbers of the deterministic agent.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure

from fastdreamer.acting.signals import walker_signal
from fastdreamer.training.episodes import EPISODE_GLOB, read_episode

COLOURS = ("#0072B2", "#D55E00", "#009E73")


def read_run(run: Path, min_height: float, max_joint_speed: float) -> list[dict[str, float]]:
    """One row an episode: env frames at its end, return, violations per 1000 decisions."""
    signal, rows, frames = walker_signal(min_height, max_joint_speed), [], 0
    for path in sorted((run / "episodes").glob(EPISODE_GLOB)):
        arrays, meta = read_episode(path)
        frames += meta["env_frames"]
        unsafe = signal(arrays["state"][1:]) <= 0  # nobody decided on the first state
        values = {"env_frames": frames, "return": meta["return"], "random": int(meta["random"])}
        rows.append(values | {"violations": 1000 * unsafe.mean()})
    return rows


def draw(runs: dict[str, list[dict[str, float]]], out: Path, since: int) -> None:
    """Two panels over env frames: return and violations."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, label in (
        (left, "return", "return of a collected episode"),
        (right, "violations", "violations per 1000 decisions"),
    ):
        for i, (run, rows) in enumerate(runs.items()):
            shown = [row for row in rows if row["env_frames"] >= since]
            axes.plot([row["env_frames"] for row in shown], [row[name] for row in shown],
                      color=COLOURS[i % 3], lw=1.2, label=run)  # fmt: skip
        axes.set(xlabel="env frames", ylabel=label, ylim=(0, None))
        axes.grid(color="#e6e6e6")
    left.legend(frameon=False)
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    parser.add_argument("--since", type=int, default=0, help="draw from these env frames on")
    parser.add_argument("--min-height", type=float, default=0.5)
    parser.add_argument("--max-joint-speed", type=float, default=20.0)
    given = parser.parse_args()
    runs = {}
    for item in given.runs:
        name, _, path = item.partition("=")
        runs[name] = read_run(Path(path), given.min_height, given.max_joint_speed)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["run", *next(iter(runs.values()))[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"run": name} | row for name, rows in runs.items() for row in rows)
    draw(runs, given.out.with_suffix(".png"), given.since)


if __name__ == "__main__":
    main()
