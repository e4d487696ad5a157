"""open_loop: against repeated single steps, by gradcheck, and on bad input."""

import pytest
import torch

from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.params import State
from fastdreamer.ops.rssm_step import rssm_step


def arguments(case, horizon=4, batch=3):
    noise = case.randn(horizon, batch, 2)
    return case.params, case.state(batch), case.action(horizon, batch), noise


@pytest.mark.parametrize(("horizon", "batch"), [(4, 3), (1, 3), (4, 1), (1, 1)])
def test_equals_repeated_steps(case, horizon, batch):
    params, state, action, noise = arguments(case, horizon, batch)
    got = open_loop(params, state, action, noise, backend="eager")
    assert got.deter.shape == (horizon, batch, 3) and got.stoch.shape == (horizon, batch, 2)
    for t in range(horizon):
        state, _ = rssm_step(params, state, action[t], noise[t])
        torch.testing.assert_close(State(got.deter[t], got.stoch[t]), state, rtol=0, atol=0)


def test_can_be_cut_anywhere(case):
    params, start, action, noise = arguments(case, 5)
    whole = open_loop(params, start, action, noise)
    first = open_loop(params, start, action[:2], noise[:2])
    then = open_loop(params, State(first.deter[-1], first.stoch[-1]), action[2:], noise[2:])
    torch.testing.assert_close(torch.cat([first.deter, then.deter]), whole.deter, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([first.stoch, then.stoch]), whole.stoch, rtol=0, atol=0)


def test_rows_do_not_see_each_other(case):
    params, start, action, noise = arguments(case)
    whole = open_loop(params, start, action, noise)
    for b in range(3):
        row = slice(b, b + 1)
        alone = open_loop(params, State(*(x[row] for x in start)), action[:, row], noise[:, row])
        torch.testing.assert_close(alone.feat, whole.feat[:, row], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("horizon", [1, 3])
def test_gradients(case, check_gradients, horizon):
    params, *rest = arguments(case, horizon, 2)
    check_gradients(open_loop, params._replace(post=None), *rest)


@pytest.mark.parametrize(
    ("at", "x", "message"),
    [
        (2, torch.zeros(4, 3, 5), "action must be [H, B=3, A=2] float64, got [4, 3, 5] float64"),
        (2, torch.zeros(3, 2), "action must be [H, B=3, A=2] float64, got [3, 2]"),
        (2, torch.zeros(4, 2, 2), "action must be [H, B=3, A=2] float64, got [4, 2, 2]"),
        (3, torch.zeros(5, 3, 2), "noise must be [H=4, B=3, S=2] float64, got [5, 3, 2]"),
        (1, State(torch.zeros(3, 2), torch.zeros(3, 2)), "start.deter must be [B, D=3]"),
        (1, State(torch.zeros(3, 3), torch.zeros(2, 2)), "start.stoch must be [B=3, S=2]"),
    ],
)
def test_wrong_shapes(case, at, x, message):
    given = list(arguments(case))
    given[at] = State(*(part.double() for part in x)) if isinstance(x, State) else x.double()
    with pytest.raises(ValueError) as caught:
        open_loop(*given)
    assert str(caught.value).startswith(f"open_loop: {message}")


def test_wrong_dtype_and_nothing_to_do(case):
    params, start, action, noise = arguments(case)
    with pytest.raises(ValueError, match="open_loop: noise must be .* float64, got .* float32"):
        open_loop(params, start, action, noise.float())
    with pytest.raises(ValueError, match=r"open_loop: action is empty, \[0, 3, 2\]"):
        open_loop(params, start, action[:0], noise[:0])


def test_backends(case, check_backends):
    check_backends(open_loop, *arguments(case))
