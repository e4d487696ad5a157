"""Milliseconds of one planned action, start to end: `python -m benchmarks.planning [--write]`."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import machine, report
from benchmarks.race import race
from benchmarks.timing import MIN_REPEATS, cell
from fastdreamer import testing
from fastdreamer.acting.planning import PlanInfo
from fastdreamer.config import PlanConfig, preset
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.ops.backend import use_backend
from fastdreamer.ops.params import State

BASELINE = "eager fp32"
VARIANTS = {
    "native bf16": ("native", "bf16", False),
    "native fp32": ("native", "fp32", False),
    "eager bf16": ("eager", "bf16", False),
    BASELINE: ("eager", "fp32", False),
    "native bf16, warm": ("native", "bf16", True),
    "eager fp32, warm": ("eager", "fp32", True),
}
"""Name → backend, precision, and whether it is a warm start with fewer iterations."""
ACTION_DIM = 6  # Walker's


def make_agent(config: PlanConfig) -> tuple[Dreamer, State]:
    """Return the report's Dreamer with random weights, and a latent state of one environment."""
    settings = dataclasses.replace(preset("report"), device="cpu", plan=config)
    agent = Dreamer(settings, {"pixels": (64, 64, 3)}, ACTION_DIM)
    generator = torch.Generator().manual_seed(0)
    draw = lambda size: torch.randn(1, size, generator=generator)  # noqa: E731
    return agent, State(torch.tanh(draw(agent.model.rssm.deter)), draw(agent.model.rssm.stoch))


def planner(agent: Dreamer, state: State, name: str) -> Callable[[], PlanInfo]:
    """Return a function that plans one action as the variant says, always from the same seed."""
    backend, precision, warm = VARIANTS[name]
    mine = copy.copy(agent)  # the same parameters
    mine.precision = precision
    config = dataclasses.replace(agent.config.plan, warm_start=warm)
    mine.config = dataclasses.replace(agent.config, plan=config)
    last = torch.zeros(config.plan_horizon, 1, ACTION_DIM) if warm else None

    def run() -> PlanInfo:
        with use_backend(backend):
            generator = torch.Generator().manual_seed(0)
            return mine.plan(state, last=last, generator=generator)[1]

    return run


def check(agent: Dreamer, state: State) -> None:
    """Assert that native scores the first candidates as exactly as eager does.

    Later ones are not comparable: rounding decides which of two nearly equal candidates is elite.
    """
    exact = copy.deepcopy(agent).double()
    wide = State(*(part.double() for part in state))
    truth = testing.Exact(lambda: {"scores": planner(exact, wide, BASELINE)().scores[0]})
    for precision in ("fp32", "bf16"):
        native, eager = (
            {"scores": planner(agent, state, f"{backend} {precision}")().scores[0]}
            for backend in ("native", "eager")
        )
        testing.assert_accurate("cem", native, eager, truth, bf16=precision == "bf16")


def measure(rounds: int, threads: int) -> dict[str, Any]:
    """Check and time every variant.

    Args:
        rounds: timed plans of each.
        threads: of torch.

    Raises:
        AssertionError: native is wrong.
    """
    torch.set_num_threads(threads)
    circumstances = machine.record()
    agent, state = make_agent(PlanConfig())
    check(agent, state)
    times = race({n: planner(agent, state, n) for n in VARIANTS}, rounds=rounds)
    plan = dataclasses.asdict(agent.config.plan)
    return {"machine": circumstances, "settings": plan, "times": times}


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    times = result["times"]
    base = times[BASELINE]["median_ms"]
    rows = [[name, cell(own), f"{base / own['median_ms']:.2f}×"] for name, own in times.items()]
    plan = result["settings"]
    return (
        f"Preset report, {plan['num_samples']} candidates of {plan['plan_horizon']} decisions, "
        f"{plan['num_elites']} elites, {plan['iterations']} iterations (warm: "
        f"{plan['warm_iterations']}).\n\n"
        + report.table(["", "ms: median (p20–p80)", f"against {BASELINE}"], rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=MIN_REPEATS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="keep the result: JSON and README")
    args = parser.parse_args()
    report.publish("planning", measure(args.rounds, args.threads), write=args.write)


if __name__ == "__main__":
    main()
