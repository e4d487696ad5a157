"""What each deterministic rule of an actor is worth: `python -m benchmarks.greedy SNAPSHOT ...`.

The same episodes are played with every rule of `behavior.greedy`; returns are paired by episode.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np

from benchmarks import report
from fastdreamer.acting.play import episode_seed, evaluate_together, more_envs
from fastdreamer.config import BehaviorConfig
from fastdreamer.training.pretrained import load

RULES = get_args(get_type_hints(BehaviorConfig)["greedy"])


def measure(snapshot: Path, episodes: int) -> dict[str, np.ndarray]:
    """Return [episodes] returns by rule."""
    agent = load(snapshot)
    envs = more_envs([], agent.config, episodes)
    seeds = [episode_seed(0, "evaluate", i) for i in range(episodes)]
    found = {}
    for rule in RULES:
        behavior = dataclasses.replace(agent.config.behavior, greedy=rule)
        agent.config = dataclasses.replace(agent.config, behavior=behavior)
        found[rule] = np.array(evaluate_together(agent, envs, seeds))
    return found


def table(measured: dict[str, dict[str, np.ndarray]]) -> str:
    """Return means and standard deviations by snapshot, and the paired difference of the second
    rule to the first with its standard error, as Markdown."""
    first, second = RULES
    rows = []
    for name, found in measured.items():
        gain = found[second] - found[first]
        spread = [f"{found[rule].mean():.0f} ± {found[rule].std():.0f}" for rule in RULES]
        error = gain.std(ddof=1) / len(gain) ** 0.5
        rows.append([name, *spread, f"{gain.mean():+.0f} ± {error:.0f}"])
    return report.table(["", *RULES, f"{second} − {first}"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("snapshot", type=Path, nargs="+")
    parser.add_argument("--episodes", type=int, default=5)
    args = parser.parse_args()
    print(table({path.stem: measure(path, args.episodes) for path in args.snapshot}))


if __name__ == "__main__":
    main()
