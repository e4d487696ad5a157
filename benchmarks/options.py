"""What optimism and safety cost: `python -m benchmarks.options [--write]`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine, report
from benchmarks.race import race
from benchmarks.timing import MIN_REPEATS, cell
from benchmarks.variants import check_native
from fastdreamer.config import Config, ExploreConfig, SafetyConfig, preset
from fastdreamer.learning.dreamer import Dreamer

PLAIN = "neither"
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "explorer, 5 heads": {"explore": ExploreConfig("ucb")},
    "explorer, 5 heads of 64 units": {"explore": ExploreConfig("ucb", units=64)},
    "explorer, 5 heads and critics": {"explore": ExploreConfig("ucb", critics=True)},
    "barrier": {"safety": SafetyConfig("walker")},
}
STATE, ACTION = 24, 6  # Walker's


def make(name: str) -> Dreamer:
    """An agent of preset state with the variant's options and random weights."""
    config: Config = dataclasses.replace(preset("state"), device="cpu", threads=1, **VARIANTS[name])
    return Dreamer(config, {"state": (STATE,)}, ACTION)


def batch() -> dict[str, Tensor]:
    """One random batch of the preset's size."""
    sizes, g = preset("state").replay, torch.Generator().manual_seed(0)
    T, B = sizes.length, sizes.batch
    first = torch.zeros(T, B, dtype=torch.bool)
    first[0] = True
    return {
        "state": torch.randn(T, B, STATE, generator=g),
        "action": torch.rand(T, B, ACTION, generator=g) * 2 - 1,
        "reward": torch.rand(T, B, generator=g),
        "is_first": first,
    }


def updater(name: str) -> Callable[[], object]:
    """A function that does one update."""
    agent, g, data = make(name), torch.Generator().manual_seed(0), batch()
    optimizers = agent.make_optimizers()
    return lambda: agent.update(data, optimizers, g)


def decider(kind: str) -> Callable[[], object]:
    """A function that takes one decision: ``plain``, ``kept`` or ``replaced`` by the shield."""
    agent, obs = make("barrier"), np.zeros(STATE, np.float32)
    with torch.no_grad():  # a barrier that every action keeps, or none
        agent.guard.barrier.layers[-1].weight.zero_()
        agent.guard.barrier.layers[-1].bias.fill_(1.0 if kind == "kept" else -1.0)
    shield = None if kind == "plain" else agent.make_shield()
    return lambda: agent.act(obs, shield=shield)


def check() -> None:
    """Assert that the options leave what they must not touch as it is, bit by bit."""
    states = {}
    for name in VARIANTS:
        agent = make(name)
        agent.update(batch(), agent.make_optimizers(), torch.Generator().manual_seed(0))
        states[name] = agent.state_dict()
    for name, state in states.items():
        for key, value in states[PLAIN].items():
            assert torch.equal(value, state[key]), f"{name}: {key} differs"


def measure(rounds: int) -> dict[str, Any]:
    """Check and time an update of every variant, and a decision with and without a shield.

    Raises:
        AssertionError: an option changes what it must not. MissingVariant: native cannot run here.
    """
    check_native()
    torch.set_num_threads(1)
    circumstances = machine.record()
    check()
    updates = race({name: updater(name) for name in VARIANTS}, rounds=rounds)
    decisions = race({kind: decider(kind) for kind in ("plain", "kept", "replaced")}, rounds=rounds)
    return {"machine": circumstances, "updates": updates, "decisions": decisions}


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    updates, decisions = result["updates"], result["decisions"]
    shield = {
        "plain": "a decision of the actor",
        "kept": "shielded, the action kept",
        "replaced": "shielded, the action replaced",
    }
    rows = [
        [f"update, {name}", cell(own), f"{own['median_ms'] / updates[PLAIN]['median_ms']:.2f}×"]
        for name, own in updates.items()
    ] + [
        [shield[kind], cell(own), f"{own['median_ms'] / decisions['plain']['median_ms']:.2f}×"]
        for kind, own in decisions.items()
    ]
    return "Preset state, one thread.\n\n" + report.table(
        ["", "ms: median (p20–p80)", "against without"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=MIN_REPEATS)
    parser.add_argument("--write", action="store_true", help="keep the result: JSON and README")
    args = parser.parse_args()
    report.publish("options", measure(args.rounds), write=args.write)


if __name__ == "__main__":
    main()
