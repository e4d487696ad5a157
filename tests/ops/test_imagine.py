"""imagine: against open_loop and a hand-written loop, by gradcheck, and on bad input."""

import pytest
import torch

from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.params import State, StdTransform, actor_dist
from fastdreamer.ops.rssm_step import rssm_step

CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def arguments(case, horizon=4, batch=3):
    noise = case.randn(horizon, batch, 2), case.randn(horizon, batch, 2)
    return [case.params, case.actor.params(), case.state(batch), *noise]


def by_hand(params, actor, state, state_noise, action_noise, *, detach=True):
    """The loop written out, with or without gradient through the actor's input."""
    feats, actions = [], []
    for noise, action_noise_t in zip(state_noise, action_noise, strict=True):
        feat = state.feat.detach() if detach else state.feat
        dist = actor_dist(actor, feat)
        action = torch.tanh(dist.mean + dist.std * action_noise_t)
        state, _ = rssm_step(params, state, action, noise)
        feats.append(state.feat)
        actions.append(action)
    return torch.stack(feats), torch.stack(actions)


@pytest.mark.parametrize(("horizon", "batch"), [(4, 3), (1, 3), (4, 1), (1, 1)])
def test_its_actions_lead_open_loop_through_the_same_states(case, horizon, batch):
    given = arguments(case, horizon, batch)
    params, actor, start, state_noise, action_noise = given
    dream = imagine(*given, backend="eager")
    assert dream.deter.shape == (horizon, batch, 3) and dream.stoch.shape == (horizon, batch, 2)
    assert dream.action.shape == (horizon, batch, 2)
    states = open_loop(params, start, dream.action, state_noise)
    torch.testing.assert_close((dream.deter, dream.stoch), tuple(states), rtol=0, atol=0)

    # action[t] is one sample of the policy at state t, and state 0 is the start
    feat = torch.cat([start.feat[None], states.feat[:-1]])
    dist = case.actor(feat)
    action = torch.tanh(dist.mean + dist.std * action_noise)
    torch.testing.assert_close(dream.action, action, **CLOSE)


def test_the_actor_s_input_is_detached(case):
    """Trap 7. Equal to the loop with detach, and different from the loop without."""
    given = arguments(case)
    given[2] = State(*(part.requires_grad_() for part in given[2]))
    inputs = [*given[2], *case.actor.parameters()]
    weights = case.randn(4, 3, 5)

    def gradients(feat):
        return torch.autograd.grad((weights * feat).sum(), inputs)

    dream = imagine(*given)
    got = gradients(torch.cat([dream.deter, dream.stoch], -1))
    want = gradients(by_hand(*given)[0])
    other = gradients(by_hand(*given, detach=False)[0])
    torch.testing.assert_close(got, want, **CLOSE)
    for name, a, b in zip(("deter", "stoch", "weight"), got, other, strict=False):
        assert (a - b).norm() > 1e-3 * b.norm(), name

    first = torch.autograd.grad(imagine(*given).action[0].sum(), inputs[:2], allow_unused=True)
    assert first == (None, None)


@pytest.mark.parametrize("horizon", [1, 3])
def test_gradients(case, check_gradients, horizon):
    """gradcheck perturbs what is detached as well, unless the actor does not look at it.

    An actor whose first weight is zero has no derivative by its input, so every other gradient
    (that weight's own included) is exact at any horizon.
    """
    params, actor, start, *noise = arguments(case, horizon, 2)
    weights = actor.mlp.weights
    blind = actor._replace(
        mlp=actor.mlp._replace(weights=(torch.zeros_like(weights[0]), *weights[1:]))
    )
    check_gradients(imagine, params._replace(post=None), blind, start, *noise)


def test_frozen_dynamics_get_no_gradient_and_the_actor_does(case):
    given = arguments(case)
    given[0] = case.rssm.params().detach()
    dream = imagine(*given)
    dream.deter.sum().backward()
    assert all(p.grad is None for p in case.rssm.parameters())
    assert all(p.grad.abs().max() > 0 for p in case.actor.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_stay_finite_at_saturation(case, dtype):
    """Traps 1 and 9: one reparameterised sample, no log-probability, no NaN at |action| = 1."""
    given = arguments(case)
    actor = case.actor.to(dtype).params()
    given[0] = case.rssm.to(dtype).params().detach()
    given[1] = actor._replace(std=StdTransform(offset=60.0), mean_scale=1e4)
    given[2] = State(*(part.to(dtype) for part in given[2]))
    given[3:] = [noise.to(dtype) for noise in given[3:]]
    dream = imagine(*given)
    assert dream.action.abs().max() == 1
    dream.stoch.square().sum().backward()
    for p in case.actor.parameters():
        assert torch.isfinite(p.grad).all()


def test_actions_follow_their_noise_alone(case):
    """No random number is drawn inside, and one sample of noise makes one action."""
    given = arguments(case)
    state = torch.get_rng_state()
    once, twice = imagine(*given), imagine(*given)
    torch.testing.assert_close(once, twice, rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())
    given[4] = given[4].clone()
    given[4][2, 1] += 1
    changed = imagine(*given)
    differs = (changed.action != once.action).any(-1)
    assert not differs[:2].any() and not differs[:, [0, 2]].any() and differs[2:, 1].all()


@pytest.mark.parametrize(
    ("at", "x", "message"),
    [
        (2, State(torch.zeros(3, 9), torch.zeros(3, 2)), "start.deter must be [B, D=3] float64"),
        (2, State(torch.zeros(3, 3), torch.zeros(3, 1)), "start.stoch must be [B=3, S=2] float64"),
        (3, torch.zeros(4, 3, 3), "state_noise must be [H, B=3, S=2] float64, got [4, 3, 3]"),
        (3, torch.zeros(3, 2), "state_noise must be [H, B=3, S=2] float64, got [3, 2]"),
        (4, torch.zeros(4, 3, 1), "action_noise must be [H=4, B=3, A=2] float64, got [4, 3, 1]"),
        (4, torch.zeros(5, 3, 2), "action_noise must be [H=4, B=3, A=2] float64, got [5, 3, 2]"),
    ],
)
def test_wrong_shapes(case, at, x, message):
    given = arguments(case)
    given[at] = State(*(part.double() for part in x)) if isinstance(x, State) else x.double()
    with pytest.raises(ValueError) as caught:
        imagine(*given)
    assert str(caught.value).startswith(f"imagine: {message}")


def test_wrong_dtype_and_nothing_to_do(case):
    given = arguments(case)
    empty = [*given[:3], given[3][:0], given[4][:0]]
    with pytest.raises(ValueError, match=r"imagine: state_noise is empty, \[0, 3, 2\]"):
        imagine(*empty)
    given[4] = given[4].float()
    with pytest.raises(ValueError, match="imagine: action_noise must be .* float64, got .* float3"):
        imagine(*given)


def test_backends(case, check_backends):
    check_backends(imagine, *arguments(case))
