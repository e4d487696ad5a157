"""One MPC action of the report's settings: noise, the actor's rollout, and all of CEM."""

from __future__ import annotations

from benchmarks.planning import VARIANTS, check, make_agent, planner
from fastdreamer.config import PlanConfig


def test_plan(race) -> None:
    agent, state = make_agent(PlanConfig())
    check(agent, state)
    race({name: planner(agent, state, name) for name in VARIANTS})
