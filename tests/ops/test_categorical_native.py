"""Categorical latents in the native recurrent ops against eager float64.

Outputs and all gradients, fp32 and bf16, one and many categoricals of 1 to 33 classes and more, on
every ISA of the host and for several numbers of threads. Noise is kept away from the borders of
the classes (``testing.away_from_borders``), where roundings decide. The environment chooses the
instruction set, once a process, so those run this file as a script.
"""

import itertools
from unittest import mock

import pytest
import torch
from native_and_eager import (
    INPUTS,
    assert_only_outputs_are_written,
    assert_threads_change_nothing,
    cem_inputs,
    compare,
    compare_with_and_without_gradients,
    decide_inputs,
    in_order,
)

from fastdreamer import testing
from fastdreamer.ops.cem import cem
from fastdreamer.ops.decide import decide
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.observe import observe
from fastdreamer.ops.params import Categorical, State
from fastdreamer.ops.rssm_step import rssm_step
from fastdreamer.testing import Sizes

# sizes, H or T, B, classes, unimix: below, at and above vectors of 8 and 16, and two of them;
# one row, and tiles of 50 rows
CASES = {
    "one": (Sizes(1, 7, 5, 1, 17, 5, 0, 1, 2, "silu"), 2, 1, 5, 0.0),
    "7": (Sizes(2, 9, 7, 3, 17, 5, 1, 1, 1, "elu"), 9, 3, 7, 0.01),
    "15": (Sizes(6, 21, 30, 4, 17, 5, 1, 0, 3, "tanh"), 1, 49, 15, 0.01),
    "16": (Sizes(3, 16, 48, 33, 17, 5, 3, 2, 1, "silu", 40), 15, 2, 16, 0.01),
    "17": (Sizes(3, 7, 51, 8, 33, 40, 1, 1, 1, "silu"), 2, 51, 17, 0.0),
    "31": (Sizes(1, 21, 62, 17, 17, 9, 2, 3, 0, "elu"), 3, 16, 31, 0.01),
    "32": (Sizes(6, 64, 256, 70, 64, 17, 0, 2, 1, "silu"), 3, 7, 32, 0.01),
    "33": (Sizes(6, 16, 99, 4, 17, 5, 2, 1, 2, "tanh"), 2, 101, 33, 0.0),
    "coins": (Sizes(2, 11, 40, 4, 17, 5, 1, 1, 1, "elu"), 3, 4, 2, 0.5),
    "certain": (Sizes(2, 11, 6, 4, 17, 5, 1, 1, 1, "elu"), 3, 4, 1, 0.0),
}
ONLY_FP32 = ("one",)  # in bfloat16 the error of a single number is luck


def drawn_safely(run, inputs, classes, unimix):
    return testing.away_from_borders(run, testing.categorical(inputs, Categorical(classes, unimix)))


def make_inputs(op, sizes, H, B, classes, unimix):
    run, make = INPUTS[op]
    return drawn_safely(run, make(sizes, H, B), classes, unimix)


def precisions(name):
    return (False,) if name in ONLY_FP32 else (False, True)


def check_case(op, name):
    run, inputs = INPUTS[op][0], make_inputs(op, *CASES[name])
    for bf16 in precisions(name):
        compare_with_and_without_gradients(run, inputs, bf16=bf16)


def check_cem(name):
    sizes, H, B, classes, unimix = CASES[name]
    inputs = drawn_safely(cem, cem_inputs(sizes, H, B), classes, unimix)
    for score, bf16 in itertools.product(("lambda_return", "reward"), precisions(name)):
        compare(cem, inputs | {"score": score}, bf16=bf16, wrt=())
    departing = inputs | {"returns": inputs["returns"]._replace(departure=True)}
    compare(cem, departing, bf16=False, wrt=())


def check_decide(name):
    sizes, _, B, classes, unimix = CASES[name]
    inputs = drawn_safely(decide, decide_inputs(sizes, B), classes, unimix)
    for bf16 in precisions(name):
        compare(decide, inputs, bf16=bf16, wrt=())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("op", INPUTS)
def test_sizes(op, name):
    check_case(op, name)


@pytest.mark.parametrize("name", CASES)
def test_cem_and_decide(name):
    check_cem(name)
    check_decide(name)


@pytest.mark.parametrize("reset", ["all", "state", "stoch", "deter"])
def test_resets_by_part(reset):
    sizes, H, B, classes, unimix = CASES["7"]
    inputs = testing.observe_inputs(sizes, H, B) | {"reset": reset}
    inputs["is_first"][[0, 4, 8], [0, 1, 2]] = True
    inputs = drawn_safely(observe, inputs, classes, unimix)
    compare(observe, inputs)


@pytest.mark.parametrize("first", list(itertools.product([False, True], repeat=3)))
def test_every_order_of_columns(first):
    action_first, embed_first, stoch_first = first
    sizes, H, B, classes, unimix = CASES["17"]
    for run, inputs in in_order(sizes, H, H, B, action_first, embed_first, stoch_first):
        given = drawn_safely(run, inputs, classes, unimix)
        compare(run, given, **({"wrt": ()} if run is decide else {}))


@pytest.mark.parametrize(
    ("op", "using"),
    [
        ("observe", "out.prior.logits"),
        ("observe", "out.post.logits"),
        ("observe", "out.state.stoch"),
        ("observe", "out.state.deter"),
        ("rssm_step", "out[1].logits"),
        ("rssm_step", "out[0].stoch"),
        ("open_loop", "out.stoch"),
        ("imagine", "out.stoch"),
        ("imagine", "out.returns"),
    ],
)
def test_gradient_of_one_output(op, using):
    compare(INPUTS[op][0], make_inputs(op, *CASES["17"]), using=(using,))


def test_gradients_through_the_features_the_actor_looks_at():
    inputs = make_inputs("imagine", *CASES["17"])
    inputs["actor"] = inputs["actor"]._replace(through_feat=True)
    compare(imagine, inputs)
    frozen = inputs | {"params": inputs["params"].detach()}
    compare(imagine, frozen, wrt=("actor", "start", "returns"))


def drawn(logits, noise, unimix=0.0):
    """The class that native's and eager's rssm_step draw of such logits, [B, K] and [B]."""
    rows, classes = logits.shape
    params, _, _ = testing.make_params(Sizes(1, 3, classes, 1, 4, 4, 0, 0, 0, "elu"))
    weight, bias = torch.zeros(classes, 3), torch.zeros(classes)
    found = []
    for row in range(rows):
        bias = logits[row].clone()
        prior = params.prior._replace(weights=(weight,), biases=(bias,))
        model = params._replace(prior=prior, latent=Categorical(classes, unimix))
        given = State(torch.zeros(1, 3), torch.zeros(1, classes)), torch.zeros(1, 1)
        steps = [
            rssm_step(model, *given, noise[row].view(1, 1), backend=backend)[0].stoch
            for backend in ("eager", "native")
        ]
        torch.testing.assert_close(steps[1], steps[0], rtol=0, atol=0, equal_nan=True)
        found.append(steps[1].argmax().item() if steps[1].isfinite().all() else None)
    return found


def check_borders():
    """Class k owns [Σ_{j<k} p, Σ_{j≤k} p): of equal probabilities, of none, and at the end."""
    with torch.no_grad():
        noise = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.9999999])
        assert drawn(torch.zeros(5, 4), noise) == [0, 1, 2, 3, 3]
        assert drawn(torch.zeros(5, 4), noise + 1e-3, 0.01) == [0, 1, 2, 3, 3]
        inf = torch.inf
        none = torch.tensor([[-inf, 0.0, -inf, 0.0]]).expand(4, 4)
        assert drawn(none, torch.tensor([0.0, 0.5, 0.9999, 0.4])) == [1, 3, 3, 1]
        assert drawn(none, torch.tensor([0.1, 0.3, 0.9999, 0.6]), 0.8) == [0, 1, 3, 2]
        # a difference that no float holds, and one far from 0
        assert drawn(torch.tensor([[0.0, -300.0], [-300.0, -301.0]]), torch.tensor([0.5, 0.9])) == [
            0,
            1,
        ]
        # undefined: as eager, all of the categorical is
        undefined = torch.tensor([[0.0, inf], [torch.nan, 0.0], [0.0, torch.nan], [-inf, -inf]])
        assert drawn(undefined, torch.full((4,), 0.5)) == [None] * 4
        assert drawn(torch.zeros(1, 20), torch.tensor([torch.nan])) == [0]
        # more classes than a vector and rest, the last one for what rounding leaves
        for classes in (1, 2, 15, 16, 17, 33, 300):
            last = torch.tensor([1 - 2.0**-24])
            assert drawn(torch.zeros(1, classes), last) == [classes - 1]
            assert drawn(torch.zeros(1, classes), torch.zeros(1)) == [0]


def test_borders():
    check_borders()


def test_a_nan_stays_in_its_row_and_categorical():
    inputs = make_inputs("observe", *CASES["17"])
    clean = observe(**inputs, backend="native")
    inputs["embed"][0, 2] = torch.nan
    seen = observe(**inputs, backend="native")
    rest = [row for row in range(51) if row != 2]
    assert seen.state.stoch[0, 2].isnan().all() and seen.post.logits[0, 2].isnan().all()
    assert torch.equal(seen.state.stoch[:, rest], clean.state.stoch[:, rest])
    inputs = make_inputs("rssm_step", *CASES["17"])
    inputs["params"].prior.biases[-1][20] = torch.nan  # of the second categorical of three
    state, prior = rssm_step(**inputs, backend="native")
    alone = torch.isnan(state.stoch.unflatten(-1, (3, 17)))
    assert alone[:, 1].all() and not alone[:, ::2].any()
    assert prior.logits.isnan().sum() == len(state.stoch)


@pytest.mark.parametrize("name", ["one", "15", "33", "32"])
@pytest.mark.parametrize("op", INPUTS)
def test_threads_change_nothing(op, name, threads):
    run, inputs = INPUTS[op][0], make_inputs(op, *CASES[name])
    assert_threads_change_nothing(run, inputs, threads)


def test_cem_whatever_the_threads(threads):
    sizes, H, B, classes, unimix = CASES["33"]
    inputs = testing.cem_inputs(sizes, H, B, 7, 2)
    inputs = drawn_safely(cem, inputs, classes, unimix)
    for departure in (False, True):
        returns = inputs["returns"]._replace(departure=departure)
        want = None
        for n in (1, 2, 3):
            threads(n)
            plan = cem(**inputs | {"returns": returns}, backend="native")
            want = want or plan
            assert all(map(torch.equal, plan, want))


@pytest.mark.parametrize("name", CASES)
def test_buffers(name):
    for op, call, place in [
        ("observe", "observe_forward", 8),
        ("rssm_step", "rssm_step", 5),
        ("open_loop", "imagine_forward", 9),
        ("imagine", "imagine_forward", 9),
    ]:
        run, inputs = INPUTS[op][0], make_inputs(op, *CASES[name])
        assert_only_outputs_are_written(run, inputs, call, place)


def test_the_bindings_refuse():
    from fastdreamer import _native

    inputs = make_inputs("rssm_step", *CASES["17"])
    with torch.no_grad(), mock.patch.object(_native, "rssm_step", wraps=_native.rssm_step) as spy:
        rssm_step(**inputs, backend="native")
    model, *arrays, outputs, threads = spy.call_args.args
    *weights, latent = model
    assert tuple(latent) == (17, 0.0, False)
    for latent, message in [
        ((5, 0.0, False), "51 logits make no categoricals of 5 classes"),
        ((0, 0.0, False), "no categoricals of 0 classes"),
        ((17, 1.5, False), "1.5"),
        ((17, float("nan"), False), "nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            _native.rssm_step((*weights, latent), *arrays, outputs, threads)
    with pytest.raises(ValueError, match=r"noise must be \[51, 1\]"):
        _native.rssm_step((*weights, (51, 0.0, False)), *arrays, outputs, threads)
    short = outputs[2][:, :-1].copy()
    with pytest.raises(ValueError, match=r"prior_mean must be \[51, 51\]"):
        _native.rssm_step(model, *arrays, (*outputs[:2], short, None), threads)


def test_isa(run_on_isa):
    run_on_isa(__file__)


if __name__ == "__main__":
    from fastdreamer import _native

    torch.set_num_threads(1)
    check_borders()
    for name in CASES:
        for op in INPUTS:
            check_case(op, name)
        check_cem(name)
        check_decide(name)
    print(_native.isa())
