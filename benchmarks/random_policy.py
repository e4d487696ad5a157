"""Return of uniformly random actions: `python -m benchmarks.random_policy [--write]`."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from benchmarks import machine, report
from fastdreamer.acting.play import collect, episode_seed, random_policy
from fastdreamer.envs import make_env

TASKS = ("walker-walk", "walker-stand")


def measure(tasks: tuple[str, ...], episodes: int, action_repeat: int = 2) -> dict[str, Any]:
    """Play whole episodes with the policy of the prefill, seed 0; a function of nothing else.

    Returns:
        JSON types: ``machine``, ``settings`` and ``returns[task]``, one per episode.
    """
    circumstances, returns = machine.record(), {}
    for task in tasks:
        # The observation does not matter to this policy, and state needs no rendering.
        env = make_env(task, obs="state", action_repeat=action_repeat)
        returns[task] = []
        for index in range(episodes):
            seed = episode_seed(0, "collect", index)
            arrays, _ = collect(env, random_policy(env.action_dim, seed), seed)
            returns[task].append(float(arrays["reward"].sum(dtype=np.float64)))
        env.close()
    settings = {"action_repeat": action_repeat, "episodes": episodes, "seed": 0}
    return {"machine": circumstances, "settings": settings, "returns": returns}


def table(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    rows = [
        [
            task,
            f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}",
            f"{min(values):.1f}–{max(values):.1f}",
            str(len(values)),
        ]
        for task, values in result["returns"].items()
    ]
    return report.table(["task", "return, mean ± std", "range", "episodes"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=TASKS)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="keep the result: JSON and README")
    args = parser.parse_args()
    if args.write and tuple(args.tasks) != TASKS:
        parser.error("--write keeps everything or nothing")
    result = measure(tuple(args.tasks), args.episodes)
    report.publish("random_policy", result, write=args.write)


if __name__ == "__main__":
    main()
