"""``rssm_step``: one step of the dynamics, a batch of rows and the latency of one row."""

from __future__ import annotations

import functools

import pytest

from benchmarks import compiled, flops
from benchmarks.race import Case
from fastdreamer import testing
from fastdreamer.ops.rssm_step import OP, rssm_step


def _case(name: str, B: int, **options: object) -> Case:
    inputs = functools.partial(testing.rssm_step_inputs, testing.REPORT, B)
    count = flops.rssm_step(inputs()["params"], B)
    return Case(name, OP, inputs, count, rssm_step, compiled.rssm_step, **options)


CASES = [
    _case("rssm_step, B 400", 400, rounds=100),
    # The latency of acting, where no weight changes between the steps.
    _case("rssm_step, B 1", 1, fresh=False, calls=20, rounds=100),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rssm_step(contest, case: Case) -> None:
    contest(case)
