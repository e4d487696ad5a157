"""The cases that tests and benchmarks share."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastdreamer import testing
from fastdreamer.ops.cem import cem
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.observe import observe
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.rssm_step import rssm_step
from fastdreamer.testing import REPORT, Sizes

SMALL = Sizes(2, 3, 1, 4, 5, 7, 1, 2, 0, "silu")
CASES = [
    (rssm_step, testing.rssm_step_inputs, (3,)),
    (observe, testing.observe_inputs, (5, 3)),
    (imagine, testing.imagine_inputs, (2, 3)),
    (open_loop, testing.open_loop_inputs, (2, 3)),
    (cem, testing.cem_inputs, (2, 3, 4, 1)),
]


@pytest.mark.parametrize("sizes", [REPORT, SMALL], ids=["report", "small"])
@pytest.mark.parametrize(("op", "make", "shape"), CASES, ids=[case[0].__name__ for case in CASES])
def test_inputs_fit_their_op_and_are_the_same_numbers_in_every_dtype(op, make, shape, sizes):
    single, double = (make(sizes, *shape, dtype=d) for d in (torch.float32, torch.float64))
    outputs = tree_leaves(op(**single, backend="eager"))
    assert all(x.isfinite().all() for x in outputs if x is not None)
    for a, b in zip(tree_leaves(single), tree_leaves(double), strict=True):
        if isinstance(a, Tensor):
            assert torch.equal(a.double(), b.double()) and a.is_contiguous()
    again = make(sizes, *shape, seed=1)
    assert not torch.equal(again["params"].gru.weight_hh, single["params"].gru.weight_hh)


def test_an_episode_begins_in_mid_sequence():
    assert testing.observe_inputs(SMALL, 5, 1)["is_first"][2, 0]


def test_parameters_start_as_those_of_modules():
    rssm, actor, returns = testing.make_params(REPORT)
    assert [tuple(w.shape) for w in actor.mlp.weights] == [
        (400, 230), (400, 400), (400, 400), (400, 400), (12, 400),
    ]  # fmt: skip
    assert (len(returns.reward.weights), len(returns.critic.weights)) == (3, 4)
    assert rssm.dims() == {"A": 6, "D": 200, "S": 30, "E": 1024}
    # torch: uniform within ±1/√in for a linear layer, ±1/√D for a GRU cell
    for tensor, fan in [
        (actor.mlp.weights[0], 230),
        (actor.mlp.biases[0], 230),
        (rssm.gru.weight_ih, 200),
        (rssm.gru.bias_hh, 200),
    ]:
        scaled = tensor * fan**0.5
        assert 0.97 < scaled.abs().max() <= 1
        assert scaled.std() == pytest.approx(3**-0.5, rel=0.1)
