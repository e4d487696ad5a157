"""λ-return: forward and with backward, all fp32, at the shapes of updates and of planning."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import Tensor

from benchmarks import compiled
from benchmarks.race import Case
from benchmarks.variants import VARIANTS
from fastdreamer import testing
from fastdreamer.ops.lambda_return import OP, lambda_return

SHAPES = [(15, 400), (10, 256), (12, 1000), (50, 16)]  # H, B: presets report and walker; planning


def _leaves(inputs: dict[str, Any]) -> list[list[Tensor]]:
    return [[x for x in inputs.values() if isinstance(x, Tensor)]]


def _compiled(**inputs: Any) -> Tensor:
    return compiled.compiled(OP.eager)(**inputs)


CASES = [
    Case(
        f"lambda_return, H {H} B {B}{', + backward' * backward}",
        OP,
        functools.partial(testing.lambda_return_inputs, H, B),
        0,  # no matrix product
        lambda_return,
        _compiled,
        leaves=_leaves if backward else None,
        rounds=200,
    )
    for H, B in SHAPES
    for backward in (False, True)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lambda_return(contest, case: Case) -> None:
    # No matrix product either for autocast and "medium" to make less precise.
    fp32 = {n: v for n, v in VARIANTS.items() if not v.bf16 and not v.medium}
    contest(case, fp32)
