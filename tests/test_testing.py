"""The cases that tests and benchmarks share."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_unflatten

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


# ------------------------------------------------------------------- what roundings come to


def test_roundings_grow_with_the_root_of_a_sums_length():
    """A sum of K ones is off by u·√K·√K, also where they cancel; a product by u."""
    for K in (1, 16, 400):
        for sign in (1, -1):
            signs = torch.tensor([1.0, sign], dtype=torch.float64).repeat(K)
            ones = torch.ones(2 * K, 1, dtype=torch.float64)
            for run in (
                lambda signs=signs: {"x": signs.expand(2000, -1).sum(1)},
                lambda signs=signs, ones=ones: {"x": signs.expand(2000, -1) @ ones},
            ):
                spread = testing.Exact(run).spread["x"] / 2000**0.5
                assert spread == pytest.approx(2 * K * testing.U, rel=0.1)
    ones = torch.ones(2000, dtype=torch.float64)
    spread = testing.Exact(lambda: {"x": ones * 3, "copy": ones.view(40, 50)}).spread
    assert spread["x"] == pytest.approx(3 * 2000**0.5 * testing.U, rel=0.1)
    assert spread["copy"] == 0 and (ones == 1).all()


def test_roundings_are_drawn_where_they_are_wanted(monkeypatch):
    """On a GPU not on the host."""
    ones, randn, drawn = torch.ones(20, dtype=torch.float64), torch.randn, []
    told = lambda *size, **given: drawn.append(given["device"]) or randn(*size, **given)  # noqa: E731
    monkeypatch.setattr(torch, "randn", told)
    with testing.Roundings(0):
        rounded = ones * 3
    assert drawn == [ones.device] and (rounded != 3).any()


def test_roundings_reach_the_backward_pass():
    """1 − y² behind y = tanh(x) is off by 2·y·dy, though the gradient's own relative error is u."""
    inputs = {"x": torch.full((2000,), 8.0, dtype=torch.float64)}

    def run():
        x = inputs["x"].clone().requires_grad_()
        x.tanh().sum().backward()
        return {"grad": x.grad}

    exact = testing.Exact(run)
    relative = exact.spread["grad"] / float(exact["grad"].norm())
    assert relative == pytest.approx(4 * testing.U * 2 / (1 - 0.99999977**2), rel=0.2)


def dropped_bias(inputs):
    """One unit of the input layer without its bias."""
    return change(inputs, lambda name, x: zeroed(x, 0) if name == BIAS else x)


def skipped_term(inputs):
    """One unit's dot product without one of its terms."""
    return change(inputs, lambda name, x: zeroed(x, (0, 1)) if name == WEIGHT else x)


def swapped_gates(inputs):
    """The GRU's reset and update gates in the other order."""

    def swap(name, x):
        if not name.startswith("params.gru"):
            return x
        reset, update, new = x.chunk(3)
        return torch.cat([update, reset, new])

    return change(inputs, swap)


def in_bfloat16(inputs):
    """One layer's weights rounded to bfloat16."""
    return change(inputs, lambda name, x: x.bfloat16().to(x) if name == WEIGHT else x)


BIAS, WEIGHT = "params.inp.biases[0]", "params.inp.weights[0]"


def change(inputs, how):
    leaves, spec = tree_flatten_with_path(inputs)
    return tree_unflatten(
        [how(path[0].key + keystr(path[1:]), x) if isinstance(x, Tensor) else x
         for path, x in leaves], spec,
    )  # fmt: skip


def zeroed(x, place):
    x = x.clone()
    x[place] = 0
    return x


@pytest.mark.parametrize("fault", [dropped_bias, skipped_term, swapped_gates, in_bfloat16])
@pytest.mark.parametrize("sizes", [REPORT, SMALL], ids=["report", "small"])
@pytest.mark.parametrize(("op", "make", "shape"), CASES, ids=[case[0].__name__ for case in CASES])
def test_small_faults_are_far_above_the_limits(op, make, shape, sizes, fault):
    inputs = make(sizes, *shape)
    run = {"backend": "eager", "dtype": torch.float32}
    truth = testing.evaluate(op, inputs, backend="eager", dtype=torch.float64)
    eager = testing.evaluate(op, inputs, **run)
    testing.assert_accurate(op.__name__, eager, eager, truth)
    wrong = testing.evaluate(op, fault(inputs), **run)
    with pytest.raises(AssertionError, match="error of"):
        testing.assert_accurate(op.__name__, wrong, eager, truth)
    worst = max(
        testing.error(wrong[name], exact) / (testing.ROUNDING * truth.spread[name])
        for name, exact in truth.items()
        if truth.spread[name]
    )
    assert worst > 10
