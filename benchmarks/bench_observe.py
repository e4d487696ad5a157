"""``observe``: the posterior filter over a batch of sequences."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks import compiled, flops
from benchmarks.race import Case
from fastdreamer import testing
from fastdreamer.ops.observe import OP, observe

T, B = 50, 8


def leaves(inputs: dict[str, Any]) -> list[list[Tensor]]:
    """What the world model's loss trains: the parameters, and the encoder behind the embedding."""
    params = [x for x in pytree.tree_leaves(inputs["params"]) if isinstance(x, Tensor)]
    return [[*params, inputs["embed"]]]


def _case(name: str, *, backward: bool = False, **options: object) -> Case:
    inputs = functools.partial(testing.observe_inputs, testing.REPORT, T, B)
    count = flops.observe(inputs()["params"], T, B, backward=backward)
    grads = leaves if backward else None
    return Case(name, OP, inputs, count, observe, compiled.observe, leaves=grads, **options)


CASES = [
    _case("observe"),
    # After a pause the threads sleep and the caches hold other people's data.
    _case("observe, cold (after 20 ms of sleep)", pause=0.02),
    _case("observe + backward", backward=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_observe(contest, case: Case) -> None:
    contest(case)
