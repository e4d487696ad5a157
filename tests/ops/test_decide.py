"""decide: against the ops that it stands for, on every backend, and on bad input."""

import itertools

import pytest
import torch

from fastdreamer.ops.backend import last_backend
from fastdreamer.ops.decide import decide
from fastdreamer.ops.layers import MLPParams, mlp
from fastdreamer.ops.observe import observe
from fastdreamer.ops.params import State, StdTransform, actor_dist
from fastdreamer.testing import REPORT, Sizes, assert_accurate, decide_inputs, evaluate

SMALL = Sizes(3, 7, 5, 33, 17, 9, 1, 1, 2, "silu")
SEES = ["embed", "vector", "both"]


def check(sizes, B, *, bf16=False, **options):
    inputs = decide_inputs(sizes, B, **options)
    fp32 = {"dtype": torch.float32, "autocast": bf16, "wrt": ()}
    assert_accurate(
        "decide",
        evaluate(decide, inputs, backend="native", **fp32),
        evaluate(decide, inputs, backend="eager", **fp32),
        evaluate(decide, inputs, backend="eager", dtype=torch.float64, wrt=()),
        bf16=bf16,
        native=True,
    )


@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("batch", [1, 3])
def test_is_a_step_of_observe_and_the_policy(sees, batch):
    x = decide_inputs(SMALL, batch, sees=sees, dtype=torch.float64)
    parts = [] if x["embed"] is None else [x["embed"]]
    if x["encoder"] is not None:
        v = x["vector"]
        tamed = v.sign() * (1 + v.abs()).log()
        parts.append(torch.nn.functional.silu(mlp(x["encoder"], tamed)))
    noise, goes_on = x["state_noise"], torch.zeros(1, batch, dtype=torch.bool)
    seen = observe(
        x["params"], x["state"], torch.cat(parts, -1)[None], x["action"][None], goes_on, noise[None]
    ).state
    policy = actor_dist(x["actor"], seen.feat[0])
    sampled = torch.tanh(policy.mean + policy.std * x["action_noise"])
    got = decide(**x)
    torch.testing.assert_close(got.state, State(seen.deter[0], seen.stoch[0]))
    torch.testing.assert_close(got.action, sampled)
    mode = decide(**x | {"action_noise": None})
    torch.testing.assert_close(mode.action, torch.tanh(policy.mean))
    filtered = decide(**x | {"actor": None})
    assert filtered.action is None and torch.equal(filtered.state.stoch, got.state.stoch)
    assert last_backend("decide") == "eager"  # of float64


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("batch", [1, 50, 51])
def test_native(batch, sees, bf16):
    pytest.importorskip("fastdreamer._native")
    check(REPORT, batch, sees=sees, bf16=bf16)


@pytest.mark.parametrize("activation", ["elu", "relu", "silu", "tanh"])
@pytest.mark.parametrize("first", list(itertools.product([False, True], repeat=3)))
def test_native_takes_every_order_and_activation(first, activation):
    pytest.importorskip("fastdreamer._native")
    action_first, embed_first, stoch_first = first
    sizes = SMALL._replace(activation=activation)
    x = decide_inputs(sizes, 2)
    kinds = StdTransform("sigmoid", 2.0, 0.5, min=0.1), StdTransform("exp", floor=0.2)
    x["params"] = x["params"]._replace(
        action_first=action_first, embed_first=embed_first, latent=kinds[0]
    )
    x["actor"] = x["actor"]._replace(mean_scale=float("inf"), stoch_first=stoch_first, std=kinds[1])
    fp32 = {"dtype": torch.float32, "wrt": ()}
    got, eager = (evaluate(decide, x, backend=b, **fp32) for b in ("native", "eager"))
    truth = evaluate(decide, x, backend="eager", dtype=torch.float64, wrt=())
    assert_accurate("decide", got, eager, truth, native=True)


@pytest.mark.parametrize("sees", SEES)
def test_native_s_rows_do_not_know_each_other(sees):
    pytest.importorskip("fastdreamer._native")
    x = decide_inputs(REPORT, 60, sees=sees)
    all_of_them = decide(**x, backend="native")
    for i in (0, 17, 59):
        row = {
            name: x[name][i : i + 1].clone()
            for name in ("action", "embed", "state_noise", "action_noise", "vector")
            if x[name] is not None
        }
        row["state"] = State(*(part[i : i + 1].clone() for part in x["state"]))
        alone = decide(**x | row, backend="native")
        assert torch.equal(alone.action[0], all_of_them.action[i])
        for part, whole in zip(alone.state, all_of_them.state, strict=True):
            assert torch.equal(part[0], whole[i])


def test_native_follows_its_weights():
    pytest.importorskip("fastdreamer._native")
    x = decide_inputs(SMALL, 1, sees="both")
    before = decide(**x, backend="native")
    changed = (
        x["params"].post.weights[0],
        x["params"].gru.weight_hh,
        x["actor"].mlp.biases[-1],
        x["encoder"].weights[0],
    )
    for weight in changed:
        weight.add_(0.1)
        after = decide(**x, backend="native")
        assert not torch.equal(after.action, before.action)
        torch.testing.assert_close(after.action, decide(**x, backend="eager").action)
        before = after


def test_the_mode_needs_no_finite_std():
    pytest.importorskip("fastdreamer._native")
    x = decide_inputs(SMALL, 2) | {"action_noise": None}
    bias = x["actor"].mlp.biases[-1]
    bias[3:] = torch.inf
    want = decide(**x, backend="eager").action
    got = decide(**x, backend="native").action
    assert want.isfinite().all()
    torch.testing.assert_close(got, want)


def test_a_bfloat16_embedding():
    pytest.importorskip("fastdreamer._native")
    x = decide_inputs(SMALL, 2)
    x["embed"] = x["embed"].bfloat16()
    native, eager = (decide(**x, backend=b) for b in ("native", "eager"))
    torch.testing.assert_close(native.state, eager.state)


def test_has_no_gradient():
    x = decide_inputs(SMALL, 1)
    x["action"].requires_grad_()
    assert not decide(**x).action.requires_grad


@pytest.mark.parametrize(
    ("sees", "change", "message"),
    [
        ("embed", {"action": torch.zeros(2, 2)}, r"action must be \[B=2, A=3\] float32, got"),
        ("embed", {"embed": torch.zeros(2, 32)}, r"embed must be \[B=2, 33\] floating, got"),
        (
            "both",
            {"embed": torch.zeros(2, 33)},
            r"embed must be .*, got \[2, 33\]",
        ),
        ("both", {"vector": torch.zeros(2, 3)}, r"vector must be \[B=2, 4\] float32, got \[2, 3\]"),
        ("both", {"vector": None}, "needs embed, or encoder and vector"),
        ("both", {"embed": None}, "embed is None, but the posterior takes"),
        ("embed", {"embed": None}, "needs embed, or encoder and vector"),
        ("embed", {"action_noise": torch.zeros(1, 3)}, r"action_noise must be \[B=2, A=3\]"),
        ("embed", {"state_noise": torch.zeros(2, 4)}, r"state_noise must be \[B=2, S=5\]"),
    ],
)
def test_wrong_input(sees, change, message):
    with pytest.raises(ValueError, match=f"decide: .*{message}|decide: {message}"):
        decide(**decide_inputs(SMALL, 2, sees=sees) | change)


def test_needs_a_posterior_and_a_row():
    x = decide_inputs(SMALL, 2)
    with pytest.raises(ValueError, match="decide: params.post is None"):
        decide(**x | {"params": x["params"]._replace(post=None)})
    with pytest.raises(ValueError, match="decide: there is no row"):
        decide(**decide_inputs(SMALL, 0))


def test_the_extension_checks_again():
    native = pytest.importorskip("fastdreamer._native")
    from fastdreamer.ops.native.packs import arrays, pack_decider, pack_gru, pack_mlp

    x = decide_inputs(SMALL, 2, sees="both")
    params, pack = x["params"], {"bf16": False, "gradients": False}
    dynamics = (
        pack_mlp(params.inp, act_last=True, **pack),
        pack_gru(params.gru, **pack),
        pack_mlp(params.post, **pack),
        params.latent,
    )
    wide = MLPParams((torch.zeros(34, 4),), (torch.zeros(34),), "elu")
    with pytest.raises(ValueError, match="decide: the encoder's output is no part"):
        native.PackedDecider(*dynamics, pack_mlp(wide, act_last=True, **pack), None)
    with pytest.raises(ValueError, match="decide: the encoder's output is no part"):
        native.PackedDecider(*dynamics, pack_mlp(x["encoder"], **pack), None)
    with pytest.raises(ValueError, match="decide: actor must map 12 to 6"):
        native.PackedDecider(*dynamics, None, (dynamics[2], 5.0, params.latent, "tanh"))
    packed = pack_decider(params, x["actor"], x["encoder"], bf16=False)
    names = ("action", "embed", "vector", "state_noise", "action_noise")
    given = arrays(*x["state"], *(x[name] for name in names))
    outputs = arrays(*(torch.empty_like(t) for t in (*x["state"], x["action"])))
    native.decide(packed, *given, tuple(outputs), 1)
    for i, array in enumerate(given):
        short = [*given[:i], array[:1], *given[i + 1 :]]
        with pytest.raises(ValueError, match="decide: .* must be"):
            native.decide(packed, *short, tuple(outputs), 1)
    with pytest.raises(ValueError, match="decide: action overlaps action"):
        native.decide(packed, *given, (*outputs[:2], given[2]), 1)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        native.decide(packed, *given, tuple(outputs), 0)


def test_isa(run_on_isa):
    pytest.importorskip("fastdreamer._native")
    run_on_isa(__file__)


if __name__ == "__main__":  # on the instruction set that FASTDREAMER_ISA names
    from fastdreamer import _native

    for sees, batch in itertools.product(SEES, (1, 51)):
        check(REPORT, batch, sees=sees)
        check(REPORT, batch, sees=sees, bf16=True)
        check(SMALL, batch, sees=sees)
    print(_native.isa())
