"""observe: against a filter of torch's own modules, resets, gradcheck, and bad input."""

import pytest
import torch
from torch.nn.functional import elu, softplus

from fastdreamer.ops.observe import observe
from fastdreamer.ops.params import State

EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-13, "atol": 1e-14}


def arguments(case, steps=5, batch=3, first=()):
    is_first = torch.zeros(steps, batch, dtype=torch.bool)
    for t, b in first:
        is_first[t, b] = True
    return [
        case.params,
        case.state(batch),
        case.randn(steps, batch, 4),
        case.action(steps, batch),
        is_first,
        case.randn(steps, batch, 2),
    ]


def cut(given, steps, rows=slice(None), start=None):
    """The same arguments for some steps and rows, from another start."""
    params, old, *sequences = given
    start = start or State(*(part[rows] for part in old))
    return [params, start, *(x[steps, rows] for x in sequences)]


@pytest.mark.parametrize(("steps", "batch"), [(5, 3), (1, 3), (5, 1), (1, 1)])
def test_equals_the_modules_it_stands_for(case, steps, batch):
    given = arguments(case, steps, batch, first=[(steps // 2, 0)])
    _, (deter, stoch), embed, action, is_first, noise = given
    seen = observe(*given, backend="eager")
    rssm = case.rssm
    for t in range(steps):
        keep = (~is_first[t])[:, None].double()
        x = elu(rssm.inp.layers[0](torch.cat([stoch * keep, action[t] * keep], -1)))
        deter = rssm.gru(x, deter * keep)
        raw = rssm.post.layers[1](elu(rssm.post.layers[0](torch.cat([deter, embed[t]], -1))))
        mean, std = raw[:, :2], softplus(raw[:, 2:]) + 0.1
        stoch = mean + std * noise[t]
        prior = rssm.prior.layers[1](elu(rssm.prior.layers[0](deter)))
        torch.testing.assert_close(seen.state.deter[t], deter, **CLOSE)
        torch.testing.assert_close(seen.state.stoch[t], stoch, **CLOSE)
        torch.testing.assert_close(tuple(x[t] for x in seen.post), (mean, std), **CLOSE)
        want = (prior[:, :2], softplus(prior[:, 2:]) + 0.1)
        torch.testing.assert_close(tuple(x[t] for x in seen.prior), want, **CLOSE)


def test_a_reset_in_mid_sequence_starts_a_new_one(case):
    """Trap 6: both halves of the state go, and the action; the other rows carry on."""
    given = arguments(case, first=[(3, 1)])
    whole = observe(*given)

    row = slice(1, 2)
    before = observe(*cut(given, slice(0, 3), row))
    after = cut(given, slice(3, None), row, start=State(*(x[1:2] * 0 for x in given[1])))
    after[3] = after[3].clone()
    after[3][0] = 0  # no action led to the first observation
    after[4] = torch.zeros_like(after[4])
    after = observe(*after)
    for name in ("state", "post", "prior"):
        parts = zip(getattr(whole, name), getattr(before, name), getattr(after, name), strict=True)
        for joint, a, b in parts:
            torch.testing.assert_close(joint[:, row], torch.cat([a, b]), **CLOSE)

    given[4] = torch.zeros_like(given[4])
    carried = observe(*given)
    torch.testing.assert_close(carried.state.feat[:3], whole.state.feat[:3], **EXACT)
    for b in (0, 2):
        torch.testing.assert_close(carried.state.feat[:, b], whole.state.feat[:, b], **EXACT)
    # had the reset cleared nothing, or one half only, these would be equal
    assert (carried.state.deter[3, 1] - whole.state.deter[3, 1]).abs().max() > 1e-3


def test_a_first_step_forgets_even_nan(case):
    given = arguments(case, first=[(0, 0), (0, 1), (0, 2), (2, 1)])
    want = observe(*given)
    given[1] = State(*(torch.full_like(part, float("nan")) for part in given[1]))
    given[3] = given[3].masked_fill(given[4].unsqueeze(-1), float("inf"))
    torch.testing.assert_close(observe(*given), want, **EXACT)


def test_two_halves_make_one(case):
    given = arguments(case)
    whole = observe(*given)
    first = observe(*cut(given, slice(0, 2)))
    carried = State(*(part[-1] for part in first.state))
    then = observe(*cut(given, slice(2, None), start=carried))
    feat = torch.cat([first.state.feat, then.state.feat])
    torch.testing.assert_close(feat, whole.state.feat, **EXACT)


def test_no_gradient_crosses_a_reset(case):
    given = arguments(case, first=[(2, 0), (2, 1), (2, 2)])
    given[1] = State(*(part.requires_grad_() for part in given[1]))
    given[2].requires_grad_()
    observe(*given).state.feat[2:].sum().backward()
    assert given[2].grad[:2].abs().max() == 0 and given[2].grad[2:].abs().min() > 0
    assert all(part.grad is None or part.grad.abs().max() == 0 for part in given[1])


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients(case, check_gradients, steps):
    check_gradients(observe, *arguments(case, steps, 2, first=[(steps - 1, 1)]))


def test_a_bfloat16_embedding_is_welcome(case):
    """Under autocast the encoder hands over bfloat16; the state stays as precise as it was."""
    given = arguments(case)
    given[2] = given[2].bfloat16()
    got = observe(*given)
    given[2] = given[2].double()
    torch.testing.assert_close(got, observe(*given), **EXACT)


@pytest.mark.parametrize(
    ("at", "x", "message"),
    [
        (1, State(torch.zeros(3, 4), torch.zeros(3, 2)), "start.deter must be [B, D=3] float64"),
        (1, State(torch.zeros(3, 3), torch.zeros(4, 2)), "start.stoch must be [B=3, S=2] float64"),
        (2, torch.zeros(5, 3, 9), "embed must be [T, B=3, E=4] floating, got [5, 3, 9] float64"),
        (2, torch.zeros(5, 4), "embed must be [T, B=3, E=4] floating, got [5, 4]"),
        (3, torch.zeros(4, 3, 2), "action must be [T=5, B=3, A=2] float64, got [4, 3, 2]"),
        (3, torch.zeros(5, 3, 1), "action must be [T=5, B=3, A=2] float64, got [5, 3, 1]"),
        (4, torch.zeros(5, 3), "is_first must be [T=5, B=3] bool, got [5, 3] float64"),
        (4, torch.zeros(5, 3, 1) > 0, "is_first must be [T=5, B=3] bool, got [5, 3, 1] bool"),
        (5, torch.zeros(5, 3, 3), "noise must be [T=5, B=3, S=2] float64, got [5, 3, 3]"),
    ],
)
def test_wrong_shapes(case, at, x, message):
    given = arguments(case)
    if isinstance(x, State):
        given[at] = State(*(part.double() for part in x))
    else:
        given[at] = x if x.dtype == torch.bool else x.double()
    with pytest.raises(ValueError) as caught:
        observe(*given)
    assert str(caught.value).startswith(f"observe: {message}")


def test_nothing_to_do_or_to_do_it_with(case):
    given = arguments(case)
    with pytest.raises(ValueError, match=r"observe: embed is empty, \[0, 3, 4\]"):
        observe(*cut(given, slice(0, 0)))
    given[0] = given[0]._replace(post=None)
    with pytest.raises(ValueError, match="observe: params.post is None"):
        observe(*given)


def test_backends(case, check_backends):
    check_backends(observe, *arguments(case))
