"""``cem``: one planned action, all iterations."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from benchmarks import compiled, flops
from benchmarks.race import Case
from fastdreamer import testing
from fastdreamer.ops.cem import OP, Plan, cem

B, N, H, I, K = 1, 100, 20, 15, 20  # noqa: E741


def _inputs() -> dict[str, Any]:
    inputs = testing.cem_inputs(testing.REPORT, H, B, N, I)
    returns = inputs["returns"]._replace(target=None)  # the report has no target critic
    return inputs | {"returns": returns, "num_elites": K, "min_std": 0.0, "clip": 0.9999}


def _compare(plan: Plan) -> dict[str, Tensor]:
    """The scores of the first candidates.

    Which of two nearly equal candidates becomes an elite is decided by rounding, and the plans
    part ways from there, in every precision.
    """
    return {"scores": plan.scores[0]}


def _case() -> Case:
    inputs = _inputs()
    count = flops.cem(inputs["params"], inputs["returns"], I, H, B, N)
    run = {"call": cem, "compiled": compiled.cem, "rounds": 20}
    return Case("cem, one action", OP, _inputs, count, compare=_compare, **run)


CASES = [_case()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cem(contest, case: Case) -> None:
    contest(case)
