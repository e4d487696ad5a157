"""The variants of parameters that other people's Dreamers need: eager by hand, native by eager.

The instruction set is chosen by the environment, so this file also runs as a script.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from native_and_eager import assert_threads_change_nothing

from fastdreamer import _native, testing
from fastdreamer.ops.cem import cem
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.lambda_return import lambda_return
from fastdreamer.ops.layers import MLPParams, mlp
from fastdreamer.ops.observe import RESETS, observe
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.params import ReturnParams, State, StdTransform, actor_dist, std_of
from fastdreamer.ops.rssm_step import rssm_step
from fastdreamer.testing import Exact, Sizes, assert_accurate, evaluate

SIZES = Sizes(3, 21, 5, 7, 33, 17, 2, 1, 2, "elu")
OPS = {"imagine": imagine, "observe": observe, "open_loop": open_loop, "rssm_step": rssm_step}
TRANSFORMS = {
    "softplus": StdTransform(min=0.1),
    "sigmoid": StdTransform("sigmoid", scale=2.0, slope=0.5, min=0.1),
    "exp": StdTransform("exp", slope=0.5, offset=-0.5),
    "floor": StdTransform(scale=0.7, slope=1.5, offset=0.3, min=0.05, floor=0.6),
    "exp-floor": StdTransform("exp", floor=1.0),
}


@pytest.mark.parametrize(
    ("transform", "want"),
    [
        (TRANSFORMS["softplus"], lambda y: F.softplus(y) + 0.1),
        (TRANSFORMS["sigmoid"], lambda y: 2 * torch.sigmoid(y / 2) + 0.1),
        (StdTransform("exp"), torch.exp),
        (StdTransform(floor=0.1), lambda y: F.softplus(y).clamp_min(0.1)),
        (StdTransform(offset=5.0, min=1e-4), lambda y: F.softplus(y + 5) + 1e-4),
    ],
)
def test_the_formulas_of_the_peers(transform, want):
    y = torch.linspace(-9, 9, 101, dtype=torch.float64, requires_grad=True)
    got, exact = std_of(transform, y), want(y)
    assert torch.equal(got, exact)
    got, exact = (torch.autograd.grad(std.sum(), y)[0] for std in (got, exact))
    torch.testing.assert_close(got, exact, rtol=1e-14, atol=1e-300)


def test_a_mean_without_bound_is_plain():
    _, actor, _ = testing.make_params(SIZES)
    feat = torch.randn(4, SIZES.D + SIZES.S)
    raw = actor._replace(mean_scale=math.inf)
    assert torch.equal(5 * torch.tanh(actor_dist(raw, feat).mean / 5), actor_dist(actor, feat).mean)


def make(op, H=3, B=7, *, transform="softplus", **flags):
    """Inputs of an op under a variant; each flag is one field of the parameters."""
    inputs = {
        "imagine": lambda: testing.imagine_inputs(SIZES, H, B, heads=True),
        "observe": lambda: testing.observe_inputs(SIZES, H, B),
        "open_loop": lambda: testing.open_loop_inputs(SIZES, H, B),
        "rssm_step": lambda: testing.rssm_step_inputs(SIZES, B),
        "cem": lambda: testing.cem_inputs(SIZES, H, 2, B, 2),
    }[op]()
    std = TRANSFORMS[transform]
    for name, fields in {
        "params": ("action_first", "embed_first"),
        "actor": ("stoch_first", "through_feat", "mean_scale"),
        "returns": ("stoch_first", "discount", "target", "departure"),
    }.items():
        if name in inputs:
            changed = {key: flags[key] for key in fields if key in flags}
            if name != "returns":
                changed["latent" if name == "params" else "std"] = std
            inputs[name] = inputs[name]._replace(**changed)
    if "reset" in flags:
        inputs["reset"] = flags["reset"]
    return inputs


def discount_head():
    """A head like the reward's, with other weights and biases about 1."""
    head = testing.make_params(SIZES, seed=9)[2].reward
    return MLPParams(head.weights, tuple(b + 1 for b in head.biases), head.activation)


def check(op, inputs, *, precisions=(False, True), **options):
    truth = evaluate(OPS[op], inputs, backend="eager", dtype=torch.float64, **options)
    for bf16 in precisions:
        fp32 = {"dtype": torch.float32, "autocast": bf16, **options}
        got, eager = (evaluate(OPS[op], inputs, backend=b, **fp32) for b in ("native", "eager"))
        assert_accurate(op, got, eager, truth, bf16=bf16, native=True)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", OPS)
def test_std(op, transform):
    # in bfloat16 an element may lie on the other side of a floor, where its gradient is another
    precisions = (False,) if "floor" in transform else (False, True)
    check(op, make(op, transform=transform), precisions=precisions)


@pytest.mark.parametrize("op", OPS)
def test_column_orders(op):
    for first in (False, True):
        check(op, make(op, action_first=True, embed_first=first, stoch_first=first))
        check(op, make(op, embed_first=True, stoch_first=first, through_feat=True))


@pytest.mark.parametrize("kind", ["actor", "policy"])
def test_policies(kind):
    scale = math.inf if kind == "actor" else 1.5
    for transform in ("sigmoid", "exp"):
        check("imagine", make("imagine", transform=transform, mean_scale=scale))


@pytest.mark.parametrize("wrt", [None, ("actor",), ("start",), ("params.inp", "start")])
@pytest.mark.parametrize("stoch_first", [False, True])
def test_gradients_through_what_the_actor_sees(wrt, stoch_first):
    inputs = make("imagine", through_feat=True, stoch_first=stoch_first)
    check("imagine", inputs, wrt=wrt)
    name = "grad_start.deter"
    if wrt is None:  # and they are others than those of a detached input
        got = [
            evaluate(imagine, make("imagine", through_feat=through), backend="native",
                     dtype=torch.float32)[name]
            for through in (False, True)
        ]  # fmt: skip
        assert not torch.allclose(*got)


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("stoch_first", [False, True])
def test_discount_head(target, stoch_first):
    flags = {"discount": discount_head(), "stoch_first": stoch_first}
    inputs = make("imagine", 4, 60, **flags, **({} if target else {"target": None}))
    check("imagine", inputs)
    # (the sum that returns alone give the head's weights cancels: its error is that of its terms)
    for using in (["reward"], ["discount"], ["returns", "discount"], ["deter", "discount"]):
        check("imagine", inputs, using=[f"out.{name}" for name in using], precisions=(False,))
    for wrt in (("actor",), ("returns.reward", "start")):
        check("imagine", inputs, wrt=wrt, precisions=(False,))
    check("imagine", inputs, wrt=("start",), using=["out.returns"])


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("discount", [False, True])
def test_departure(target, discount):
    """Rewards of the states before, and their gradients in these; the start's included."""
    flags = {"departure": True, "stoch_first": target, "through_feat": discount}
    flags |= {"discount": discount_head()} if discount else {}
    flags |= {} if target else {"target": None}
    inputs = make("imagine", 4, 60, **flags)
    check("imagine", inputs)
    for using in (["reward"], ["returns"], ["deter", "returns"]):
        check("imagine", inputs, using=[f"out.{name}" for name in using], precisions=(False,))
    for wrt in (("actor",), ("start",), ("returns.reward",), ("returns.critic",)):
        check("imagine", inputs, wrt=wrt, precisions=(False,))
    one = make("imagine", 1, 3, **flags)
    check("imagine", one, precisions=(False,))
    assert torch.equal(*(
        imagine(**make("imagine", 1, 3, **flags | {"departure": departure}), backend="native").value
        for departure in (False, True)
    ))  # fmt: skip


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_departure_by_hand(backend):
    """G_t = r(s_t) + γ·((1 − λ)·v(s_{t+1}) + λ·G_{t+1}), as the report's code pairs them."""
    inputs = make("imagine", 3, 5, departure=True)
    dream, heads = imagine(**inputs, backend=backend), inputs["returns"]
    states = State(
        *(torch.cat([a[None], b]) for a, b in zip(inputs["start"], dream[:2], strict=True))
    )
    reward, value = (mlp(head, states.feat)[..., 0] for head in (heads.reward, heads.target))
    total = value[3]
    for t in (2, 1, 0):
        total = reward[t] + 0.99 * (0.05 * value[t + 1] + 0.95 * total)
        torch.testing.assert_close(dream.returns[t], total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dream.reward, reward[:3], rtol=1e-5, atol=1e-5)
    arrival = imagine(**make("imagine", 3, 5), backend=backend)
    torch.testing.assert_close(arrival.reward, reward[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_departure_in_cem(backend):
    """Candidates are scored by rewards of the states before; sums pair nothing."""
    inputs = make("cem", 4, 7, departure=True) | {"num_elites": 7}
    plan = cem(**inputs, backend=backend)
    (samples, iterations), heads = (7, 2), inputs["returns"]
    start = State(*(part.repeat_interleave(samples, 0) for part in inputs["start"]))
    action = inputs["mean"].unsqueeze(2) + inputs["std"].unsqueeze(2) * inputs["action_noise"][0]
    ahead = open_loop(
        inputs["params"],
        start,
        action.clamp(-0.9999, 0.9999).flatten(1, 2),
        inputs["state_noise"][0].flatten(1, 2),
        backend="eager",
    )
    feat = torch.cat([start.feat[None], ahead.feat])
    reward = mlp(heads.reward, feat[:-1])[..., 0]
    value = mlp(heads.target, feat[1:])[..., 0]
    want = lambda_return(reward, value, torch.full_like(reward, 0.99), 0.95)[0]
    torch.testing.assert_close(plan.scores[0].flatten(), want)
    assert len(plan.scores) == iterations
    summed = cem(**inputs | {"score": "reward"}, backend=backend)
    plain = make("cem", 4, 7) | {"num_elites": 7, "score": "reward"}
    assert torch.equal(summed.scores, cem(**plain, backend=backend).scores)


def test_discount_is_gamma_times_the_probability_to_go_on():
    inputs = make("imagine", discount=discount_head())
    dream = imagine(**inputs, backend="native")
    plain = imagine(**make("imagine"), backend="native")
    assert plain.discount is None and torch.equal(dream.deter, plain.deter)
    assert float(dream.discount.min()) > 0 and float(dream.discount.max()) < 0.99
    sure = inputs["returns"].discount
    sure = sure._replace(biases=(*sure.biases[:-1], sure.biases[-1] + 100))
    inputs["returns"] = inputs["returns"]._replace(discount=sure)
    torch.testing.assert_close(imagine(**inputs, backend="native").returns, plain.returns)


@pytest.mark.parametrize("reset", RESETS)
def test_resets(reset):
    check("observe", make("observe", H=9, reset=reset))
    given = make("observe", H=9, reset=reset)
    given["is_first"] = torch.zeros_like(given["is_first"])
    given["is_first"][4] = True
    whole = observe(**given, backend="native")
    tail = {k: given[k][4:].clone() for k in ("embed", "action", "is_first", "noise")}
    deter, stoch = (part[3].clone() for part in whole.state)
    of_deter, of_stoch, of_action = RESETS[reset]
    for zeroed, part in [(of_deter, deter), (of_stoch, stoch), (of_action, tail["action"][0])]:
        part.mul_(not zeroed)
    tail["is_first"][:] = False
    rest = observe(given["params"], State(deter, stoch), **tail, backend="native")
    torch.testing.assert_close(whole.state.stoch[4:], rest.state.stoch, rtol=0, atol=0)


def test_a_wrong_reset_is_refused():
    with pytest.raises(ValueError, match="reset must be one of all, state, stoch, deter, got 'h'"):
        observe(**make("observe", reset="h"))


@pytest.mark.parametrize("transform", ["softplus", "sigmoid", "floor"])
def test_cem(transform):
    flags = {"action_first": True, "stoch_first": True, "discount": discount_head()}
    inputs = make("cem", transform=transform, **flags) | {"num_elites": 7}
    wide = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.double, inputs)
    plans = (cem(**inputs, backend="native"), cem(**inputs, backend="eager"))
    truth = Exact(lambda: cem(**wide)._asdict())
    assert_accurate("cem", *(plan._asdict() for plan in plans), truth)
    plain = cem(**{**inputs, "returns": inputs["returns"]._replace(discount=None)})
    assert not torch.allclose(plain.scores, plans[0].scores)


def test_gradcheck(case):
    """Of the eager body, every flag at once (the critic's gradient is Dreamer's, no true one)."""
    params = case.params._replace(action_first=True, embed_first=True, latent=TRANSFORMS["sigmoid"])
    actor = case.actor.params()._replace(stoch_first=True, through_feat=True, mean_scale=math.inf)
    dims, start = params.dims(), case.state(2)
    feat = dims["D"] + dims["S"]

    def head() -> MLPParams:
        weights = case.randn(4, feat), case.randn(1, 4)
        return MLPParams(weights, (case.randn(4), case.randn(1)), "tanh")

    heads = ReturnParams(head(), head(), None, 0.9, 0.8, head(), stoch_first=True)
    noise = case.randn(2, 2, dims["S"]), case.randn(2, 2, dims["A"])
    wrt = start.deter, params.inp.weights[0].clone()
    for departure in (False, True):

        def dream(deter, weight, departure=departure):
            given = params._replace(inp=params.inp._replace(weights=(weight,)))
            start_ = State(deter, start.stoch)
            returns = heads._replace(departure=departure)
            out = imagine(given, actor, start_, *noise, returns=returns, backend="eager")
            return out.deter, out.action, out.reward, out.discount

        assert torch.autograd.gradcheck(dream, [t.requires_grad_() for t in wrt])


def test_bad_transforms_are_refused():
    inputs = make("open_loop")
    inputs["params"] = inputs["params"]._replace(latent=StdTransform("relu"))
    for backend in ("eager", "native"):
        with pytest.raises(
            ValueError, match="std must be softplus, sigmoid(,| or) exp, got 'relu'"
        ):
            open_loop(**inputs, backend=backend)


# --- threads and instruction sets ----------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_threads_change_nothing(op, threads):
    flags = {"discount": discount_head(), "stoch_first": True, "through_feat": True}
    flags |= {"action_first": True, "embed_first": True, "departure": True}
    inputs = make(op, 3, 101, transform="floor", **flags)
    assert_threads_change_nothing(OPS[op], inputs, threads)


def test_isa(run_on_isa):
    run_on_isa(__file__)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for op in OPS:
        test_column_orders(op)
        for transform in TRANSFORMS:
            test_std(op, transform)
    for kind in ("actor", "policy"):
        test_policies(kind)
    test_gradients_through_what_the_actor_sees(wrt=None, stoch_first=True)
    test_discount_head(target=True, stoch_first=True)
    test_departure(target=True, discount=True)
    for reset in RESETS:
        test_resets(reset)
    for transform in ("softplus", "sigmoid", "floor"):
        test_cem(transform)
    print(_native.isa())
