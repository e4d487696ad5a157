"""``decide``: what the agent computes for one action, one environment's and ten's."""

from __future__ import annotations

import functools

import pytest

from benchmarks import compiled, flops
from benchmarks.race import Case
from fastdreamer import testing
from fastdreamer.ops.decide import OP, decide


def _case(B: int) -> Case:
    inputs = functools.partial(testing.decide_inputs, testing.REPORT, B)
    x = inputs()
    return Case(
        f"decide, B {B}",
        OP,
        inputs,
        flops.decide(x["params"], x["actor"], B),
        decide,
        compiled.decide,
        fresh=False,  # no weight changes between decisions
        calls=20,
        rounds=100,
    )


CASES = [_case(1), _case(10)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decide(contest, case: Case) -> None:
    contest(case)
