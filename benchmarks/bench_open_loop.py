"""``open_loop``: H steps of the dynamics under given actions."""

from __future__ import annotations

import functools

import pytest

from benchmarks import compiled, flops
from benchmarks.race import Case
from fastdreamer import testing
from fastdreamer.ops.open_loop import OP, open_loop

H, B = 15, 400


def _case() -> Case:
    inputs = functools.partial(testing.open_loop_inputs, testing.REPORT, H, B)
    count = flops.open_loop(inputs()["params"], H, B)
    return Case("open_loop", OP, inputs, count, open_loop, compiled.open_loop)


CASES = [_case()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_open_loop(contest, case: Case) -> None:
    contest(case)
