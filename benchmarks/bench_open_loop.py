"""``open_loop``: H steps of the dynamics under given actions."""

from __future__ import annotations

import functools

import pytest

from benchmarks import compiled, flops
from benchmarks.bench_rssm_step import leaves
from benchmarks.race import Case
from fastdreamer import testing
from fastdreamer.ops.open_loop import OP, open_loop

H, B = 15, 400


def _case(name: str = "open_loop", *, backward: bool = False) -> Case:
    inputs = functools.partial(testing.open_loop_inputs, testing.REPORT, H, B)
    count = flops.open_loop(inputs()["params"], H, B, backward=backward)
    grads = leaves if backward else None
    return Case(name, OP, inputs, count, open_loop, compiled.open_loop, leaves=grads)


BACKWARD = _case("open_loop + backward", backward=True)
CASES = [_case()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_open_loop(contest, case: Case) -> None:
    contest(case)
