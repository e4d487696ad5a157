"""A simulation, not a measurement: `python -m benchmarks.scale_model`. Env frames a second of 1 to
512 collectors and 1 to 64 learner ranks, and where the learner saturates.

From costs that were measured on one machine: a decision of a collector (results/collection.json),
an update from a batch and from half of one (results/ranks.json), and the bytes of weights,
gradients and episodes. Machines of that kind, a collector or rank each, are joined by a network of
the given bandwidth and latency. A round is an episode of every collector, with the weights of one
update, while the learner makes the updates that the round before calls for; the later of the two
ends it.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass

import numpy as np

from benchmarks import report
from benchmarks.synthetic import ACTION_DIM, DECISIONS, OBS_SHAPES
from fastdreamer.acting.parts import acting_weights
from fastdreamer.config import preset
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.training.episodes import episode_fields

COLLECTORS = tuple(2**n for n in range(10))
RANKS = tuple(2**n for n in range(7))
ROUNDS = 200
SATURATED = 0.99  # of the time in which a learner works: more collectors bring nothing
ACTION_REPEAT = 2


@dataclass(frozen=True)
class Costs:
    """Of one machine; seconds and bytes."""

    decision: float
    serial: float  # of an update, what more ranks do not shorten
    parallel: float  # and what they share out
    weights: int  # that a collector gets
    gradients: int  # that ranks average in an update
    episode: int  # that a collector sends

    def update(self, ranks: int, size: float, bandwidth: float, latency: float) -> float:
        """Seconds of an update from ``size`` of the recipe's batches; gradients go round a ring."""
        ring = 2 * (ranks - 1) * (self.gradients / ranks / bandwidth + latency)
        return self.serial + self.parallel * size / ranks + ring


def measured(quality: str) -> Costs:
    """Read what was measured, and count the bytes of preset walker.

    Raises:
        FileNotFoundError: it was not measured.
    """
    read = lambda name: json.loads((report.RESULTS / f"{name}.json").read_text())  # noqa: E731
    decision = read("collection")["phases"][quality]["whole"]["median_ms"] / 1000
    times = read("ranks")["seconds"]
    one = float(np.median(times["1 process, 1 thread"]))
    half = float(np.median(times["1 process, 1 thread, half a batch"]))
    parallel = min(one, 2 * (one - half))
    agent = Dreamer(preset("walker"), OBS_SHAPES, ACTION_DIM)
    return Costs(
        decision=decision,
        serial=one - parallel,
        parallel=parallel,
        weights=sum(x.nbytes for x in acting_weights(agent).values()),
        gradients=sum(p.nbytes for p in agent.parameters() if p.requires_grad),
        episode=(DECISIONS + 1)
        * sum(
            np.dtype(dtype).itemsize * math.prod(shape)
            for dtype, shape in episode_fields(OBS_SHAPES, ACTION_DIM).values()
        ),
    )


def simulate(
    costs: Costs,
    collectors: int,
    ranks: int,
    *,
    ratio: float,
    bandwidth: float,
    latency: float,
    spread: float,
) -> tuple[float, float]:
    """Play rounds.

    Args:
        ratio: replayed decisions a collected one. bandwidth: bytes/s. latency: s.
        spread: standard deviation of an episode's seconds, of its mean; a round ends with the
            slowest.

    Returns:
        Env frames per second, and the share of time in which the learner works.
    """
    rng = np.random.default_rng(0)
    replay = preset("walker").replay
    batch = max(replay.batch, ranks)  # at least a sequence each
    updates = ratio * collectors * DECISIONS / (batch * replay.length)
    learn = updates * costs.update(ranks, batch / replay.batch, bandwidth, latency)
    # One link into the learner's machine: weights out, episodes back, one after the other.
    moved = collectors * (costs.weights + costs.episode) / bandwidth + 2 * latency
    pace = np.maximum(rng.normal(1, spread, (ROUNDS, collectors)), 0.1).max(1)
    collect = DECISIONS * costs.decision * pace + moved
    rounds = np.maximum(collect, learn)
    frames = ROUNDS * collectors * DECISIONS * ACTION_REPEAT
    return frames / rounds.sum(), float(ROUNDS * learn / rounds.sum())


def table(costs: Costs, **setting: float) -> tuple[str, dict[int, int]]:
    """Play all numbers of collectors and ranks; ``setting`` as :func:`simulate` takes it.

    Returns:
        Markdown, and by how many collectors ranks are saturated, where they are at all.
    """
    rows, saturated = [], {}
    for collectors in COLLECTORS:
        row = [str(collectors)]
        for ranks in RANKS:
            rate, works = simulate(costs, collectors, ranks, **setting)
            if works > SATURATED:
                saturated.setdefault(ranks, collectors)
            row.append(f"{rate:,.0f} ({100 * works:.0f} %)")
        rows.append(row)
    return report.table(["collectors", *map(_ranks, RANKS)], rows), saturated


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number > 1)}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    recipe = preset("walker")
    parser.add_argument("--ratio", type=float, default=recipe.train.replay_ratio,
                        help="replayed decisions a collected one")  # fmt: skip
    parser.add_argument("--quality", default="fast", help="of rendering: full or fast")
    parser.add_argument("--gbit", type=float, default=10.0, help="bandwidth, 10⁹ bits a second")
    parser.add_argument("--latency-us", type=float, default=50.0)
    parser.add_argument("--spread", type=float, default=0.05,
                        help="standard deviation of an episode's time, of its mean")  # fmt: skip
    return parser.parse_args(arguments)


def setting_of(args: argparse.Namespace) -> dict[str, float]:
    """What :func:`simulate` is given of a command line."""
    return {"ratio": args.ratio, "bandwidth": args.gbit * 1e9 / 8, "spread": args.spread,
            "latency": args.latency_us / 1e6}  # fmt: skip


def main() -> None:
    args = parse()
    costs = measured(args.quality)
    print("A simulation from costs of one machine; nothing below was measured.\n")
    print(
        f"decision {1000 * costs.decision:.1f} ms; update {1000 * costs.serial:.1f} + "
        f"{1000 * costs.parallel:.1f} ms / ranks; weights {costs.weights / 1e6:.1f} MB, gradients "
        f"{costs.gradients / 1e6:.1f} MB, an episode {costs.episode / 1e6:.1f} MB; replay ratio "
        f"{args.ratio:g}; {args.gbit:g} Gbit/s, {args.latency_us:g} µs\n"
    )
    shown, saturated = table(costs, **setting_of(args))
    print("Env frames a second, and the share of time in which the learner works:\n")
    print(f"{shown}\n")
    for ranks in RANKS:
        name = _ranks(ranks)
        if ranks in saturated:
            print(f"{name}: the learner is saturated by {saturated[ranks]} collectors")
        else:
            print(f"{name}: the learner is not saturated by {COLLECTORS[-1]} collectors")


if __name__ == "__main__":
    main()
