"""Packed weights: made anew when the parameters changed, and only then; and the memory they use."""

import gc

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdreamer.nn import RSSM
from fastdreamer.ops.backend import last_backend, release_memory
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.native import packs
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.testing import Sizes, imagine_inputs, open_loop_inputs

SIZES = Sizes(2, 13, 5, 4, 17, 9, 1, 1, 1, "elu")
DIMS = {"action_dim": 2, "deter": 13, "stoch": 5, "hidden": 17, "input_hidden": 19, "embed": 4}
INPUTS = {k: v for k, v in open_loop_inputs(SIZES, 3, 4).items() if k != "params"}


def run(model: RSSM, backend: str) -> Tensor:
    states = open_loop(model.params(), **INPUTS, backend=backend)
    assert last_backend("open_loop") == backend
    return states.feat


@pytest.fixture
def model() -> RSSM:
    packs.forget()  # those of dead models whose addresses this one may get
    torch.manual_seed(0)
    return RSSM(**DIMS, activation="elu", min_std=0.1)


def assert_fresh(model: RSSM, before: Tensor) -> Tensor:
    """Native sees the weights as they are, which are no longer those of ``before``."""
    after = run(model, "native")
    torch.testing.assert_close(after, run(model, "eager"), rtol=1e-4, atol=1e-5)
    assert float((after - before).detach().abs().max()) > 1e-3
    return after


def packed() -> int:
    return packs.counts()["packed"]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
        lambda p: torch.optim.Adam(p, lr=0.05, foreach=True),
        lambda p: torch.optim.Adam(p, lr=0.05, foreach=False, fused=False),
        lambda p: torch.optim.AdamW(p, lr=0.05),
        lambda p: torch.optim.SGD(p, lr=0.5, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    ],
    ids=["adam-fused", "adam-foreach", "adam-plain", "adamw", "sgd-fused", "sgd"],
)
def test_a_step_of_an_optimiser(model, make):
    optimiser = make(model.parameters())
    before = run(model, "native").detach()
    for _ in range(3):
        optimiser.zero_grad()
        run(model, "native").square().mean().backward()
        optimiser.step()
        before = assert_fresh(model, before).detach()


def test_every_way_to_change_a_weight(model):
    other = RSSM(**DIMS, activation="elu", min_std=0.1)
    before = run(model, "native")
    model.load_state_dict(other.state_dict())
    before = assert_fresh(model, before)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / 4)
    before = assert_fresh(model, before)
    for p in model.parameters():
        p.data = torch.randn_like(p) / 4
    before = assert_fresh(model, before)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 3  # one number of one weight
    before = assert_fresh(model, before)
    torch.nn.utils.vector_to_parameters(torch.randn(10_000) / 4, model.parameters())
    assert_fresh(model, before)


def test_steps_by_hand_follow_a_backward_pass(model):
    """No optimiser of torch's counts them, and no version."""
    for _ in range(2):
        before = run(model, "native")
        before.square().mean().backward()
        versions = [p._version for p in model.parameters()]
        for p in model.parameters():
            if p.grad is not None:
                p.data -= 5 * p.grad
        assert versions == [p._version for p in model.parameters()]
        assert_fresh(model, before)
        model.zero_grad()


def test_behind_autograd_s_back_needs_forget(model):
    before = run(model, "native")
    for p in model.parameters():
        p.data.mul_(2)
    packs.forget()
    assert_fresh(model, before)


def test_memory_used_again_by_other_weights_is_not_taken_for_the_same(model):
    """The allocator does this by chance; here the address is the same for certain."""
    arrays = [p.detach().numpy().copy() for p in model.parameters()]

    def rebind(scale: float) -> None:
        for p, array in zip(model.parameters(), arrays, strict=True):
            p.data = torch.empty(0)  # the storage made before dies
            array *= scale
            p.data = torch.from_numpy(array)

    rebind(1)
    addresses = [p.data_ptr() for p in model.parameters()]
    before = run(model, "native")
    rebind(2)
    assert addresses == [p.data_ptr() for p in model.parameters()]
    assert_fresh(model, before)


def test_modules_made_and_freed_in_turn():
    for _ in range(20):
        model = RSSM(**DIMS, activation="elu", min_std=0.1)
        torch.testing.assert_close(run(model, "native"), run(model, "eager"), rtol=1e-4, atol=1e-5)
        del model


def test_unchanged_weights_are_packed_once(model):
    with torch.no_grad():
        run(model, "native")
        n, reused = packed(), packs.counts()["reused"]
        for _ in range(5):
            run(model, "native")
        assert packed() == n
        assert packs.counts()["reused"] == reused + 5
    # With gradients: packed for the other direction, too, once: input layer, GRU, prior, and the
    # model they are.
    run(model, "native")
    assert packed() == n + 4
    run(model, "native")
    with torch.no_grad():
        run(model, "native")
    assert packed() == n + 4
    with torch.autocast("cpu", torch.bfloat16):
        run(model, "native")
    assert packed() == n + 8
    run(model, "native")
    assert packed() == n + 8, "both precisions are kept"
    packs.forget()
    run(model, "native")
    assert packed() == n + 12


def test_weights_that_change_under_autocast_are_seen(model):
    """torch's own modules go on with the first call's, until the outermost context ends."""
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            before = run(model, "native")
            for p in model.parameters():
                p.mul_(0.5)
            within = run(model, "native")
        with torch.autocast("cpu", torch.bfloat16):
            after = run(model, "native")
    assert torch.equal(within, after) and not torch.equal(within, before)


def test_the_oldest_pack_goes_first(model, monkeypatch):
    monkeypatch.setattr(packs, "LIMIT", 4)
    for _ in range(3):
        other = RSSM(**DIMS, activation="elu", min_std=0.1)
        for m in (model, other):
            torch.testing.assert_close(run(m, "native"), run(m, "eager"), rtol=1e-4, atol=1e-5)
    assert len(packs._packs) <= 4


def test_weights_of_any_layout(model):
    """Transposed views, slices and broadcasts are packed as what they read."""
    params = model.params().detach()
    want = open_loop(params, **INPUTS, backend="native")
    gru, inp = params.gru, params.inp
    wide = torch.randn(len(inp.biases[0]), 50)
    wide[:, 3:17:2] = inp.weights[0]
    odd = params._replace(
        gru=gru._replace(
            weight_ih=gru.weight_ih.T.contiguous().T,
            bias_hh=torch.stack([gru.bias_hh, gru.bias_ih], 1)[:, 0],
        ),
        inp=inp._replace(weights=(wide[:, 3:17:2],)),
    )
    assert not odd.gru.weight_ih.is_contiguous() and not odd.inp.weights[0].is_contiguous()
    got = open_loop(odd, **INPUTS, backend="native")
    assert torch.equal(got.feat, want.feat)
    # one memory, two layouts
    square = torch.randn(13, 13)
    for weight in (square, square.T):
        weights = (weight, *params.prior.weights[1:])
        if weights[0].shape[0] != weights[1].shape[1]:
            weights = (weight, torch.randn(10, 13, generator=torch.Generator().manual_seed(0)))
        prior = params.prior._replace(weights=weights, biases=(torch.zeros(13), torch.zeros(10)))
        given = params._replace(prior=prior)
        torch.testing.assert_close(
            open_loop(given, **INPUTS, backend="native").feat,
            open_loop(given, **INPUTS, backend="eager").feat,
            rtol=1e-4,
            atol=1e-5,
        )
    # gradients of a view reach what it is a view of
    base = gru.weight_ih.T.contiguous().requires_grad_()
    loss = open_loop(
        params._replace(gru=gru._replace(weight_ih=base.T)), **INPUTS, backend="native"
    ).feat.sum()
    (got,) = torch.autograd.grad(loss, base)
    whole = gru.weight_ih.clone().requires_grad_()
    loss = open_loop(
        params._replace(gru=gru._replace(weight_ih=whole)), **INPUTS, backend="native"
    ).feat.sum()
    assert torch.equal(got, torch.autograd.grad(loss, whole)[0].T)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_weights_may_lie_in_memory_that_cannot_be_written():
    """As those of a checkpoint that is mapped."""
    inputs = open_loop_inputs(SIZES, 3, 4)
    array = inputs["params"].gru.bias_ih.numpy().copy()
    array.flags.writeable = False
    gru = inputs["params"].gru._replace(bias_ih=torch.from_numpy(array))
    got = open_loop(**inputs | {"params": inputs["params"]._replace(gru=gru)}, backend="native")
    assert torch.equal(got.feat, open_loop(**inputs, backend="native").feat)


# --- memory -------------------------------------------------------------------------------------


def kept() -> int:
    return packs._native.arena_stats()[0]


def allocations() -> int:
    return packs._native.arena_stats()[1]


def step(optimiser, inputs) -> None:
    dream = imagine(**inputs, backend="native")
    loss = -dream.returns.mean() + (dream.value - dream.returns.detach()).square().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def test_steady_state_allocates_nothing_and_tapes_give_back_what_they_held():
    inputs = imagine_inputs(SIZES, 4, 60, heads=True)
    mlps = inputs["actor"].mlp, inputs["returns"].critic
    leaves = [t.requires_grad_() for mlp in mlps for t in (*mlp.weights, *mlp.biases)]
    optimiser = torch.optim.Adam(leaves, fused=True)
    for _ in range(3):
        step(optimiser, inputs)
    gc.collect()
    made, free = allocations(), kept()
    for _ in range(10):
        step(optimiser, inputs)
        assert kept() == free
    assert allocations() == made

    dream = imagine(**inputs, backend="native")
    dream = imagine(**inputs, backend="native")  # the first one's tape died, the second one lives
    assert kept() < free
    loss = dream.returns.sum()
    del dream
    assert kept() < free, "the loss holds the tape"
    loss.backward()
    del loss
    gc.collect()
    for leaf in leaves:
        leaf.grad = None
    assert kept() >= free


def test_without_gradients_no_tape_is_left():
    inputs = imagine_inputs(SIZES, 4, 60, heads=True)
    imagine(**inputs, backend="native")
    made, free = allocations(), kept()
    dreams = [imagine(**inputs, backend="native") for _ in range(5)]
    assert (allocations(), kept()) == (made, free)
    assert all(np.isfinite(dream.returns.numpy()).all() for dream in dreams)


def test_released_memory_is_gone_and_calls_go_on():
    inputs = imagine_inputs(SIZES, 4, 60, heads=True)
    dream = imagine(**inputs, backend="native")
    assert kept() > 0
    release_memory()
    assert kept() == 0
    again = imagine(**inputs, backend="native")
    assert torch.equal(again.returns, dream.returns)
