"""``rssm_step``: one step of the dynamics, a batch of rows and the latency of one row."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks import compiled, flops
from benchmarks.race import Case
from fastdreamer import testing
from fastdreamer.ops.rssm_step import OP, rssm_step


def leaves(inputs: dict[str, Any]) -> list[list[Tensor]]:
    """Everything that gets a gradient: states, actions, and parameters without the posterior's."""
    held = inputs | {"params": inputs["params"]._replace(post=None), "noise": None}
    return [[x for x in pytree.tree_leaves(held) if isinstance(x, Tensor)]]


def _case(name: str, B: int, *, backward: bool = False, **options: object) -> Case:
    inputs = functools.partial(testing.rssm_step_inputs, testing.REPORT, B)
    count = flops.rssm_step(inputs()["params"], B, backward=backward)
    grads = leaves if backward else None
    return Case(name, OP, inputs, count, rssm_step, compiled.rssm_step, leaves=grads, **options)


BACKWARD = _case("rssm_step, B 400, + backward", 400, backward=True, rounds=100)
SMALL = _case("rssm_step, B 50", 50, rounds=100)
CASES = [
    _case("rssm_step, B 400", 400, rounds=100),
    # The latency of acting, where no weight changes between the steps.
    _case("rssm_step, B 1", 1, fresh=False, calls=20, rounds=100),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rssm_step(contest, case: Case) -> None:
    contest(case)
