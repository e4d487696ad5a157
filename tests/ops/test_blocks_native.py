"""The block-diagonal GRU, layers of stoch and action apart, GELU, Mish and Gumbel-softmax samples.

In the native ops, against eager: outputs and all gradients, fp32 and bf16, on every ISA of the
host and for several numbers of threads. The environment chooses the instruction set, once a
process, so those run this file as a script.
"""

import itertools

import pytest
import torch
from native_and_eager import (
    INPUTS,
    assert_a_nan_stays_in_its_row,
    assert_gradients_of_some,
    assert_only_outputs_are_written,
    assert_packs_follow,
    assert_threads_change_nothing,
    cem_inputs,
    compare,
    compare_with_and_without_gradients,
    decide_inputs,
    in_order,
    parameters,
)

from fastdreamer import testing
from fastdreamer.ops.backend import BackendError, last_backend
from fastdreamer.ops.cells import BlockGRUParams, LateGRUParams
from fastdreamer.ops.cem import cem
from fastdreamer.ops.decide import decide
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.layers import MLPParams, Norm
from fastdreamer.ops.observe import observe
from fastdreamer.ops.params import Branches, Categorical, StdTransform, gumbel
from fastdreamer.testing import Sizes


class Style:
    """What the recurrence and its inputs are.

    Args:
        blocks: of a block-diagonal GRU; None: torch's GRU, 0: the one of DreamerV2.
        features: widths of the layers of h.
        depth: block layers before the gates.
        kind: of the norms, or None.
        bias: whether layers have one.
        apart: widths of the layers of stoch and of action, or None for one of both.
        act: the activation of every layer, the heads' too; None: that of the sizes.
        latent: categorical, or None for Gaussian latents.
    """

    def __init__(
        self, blocks=None, features=(9,), depth=1, kind="rms", bias=True, apart=((7,), (5,)),
        act=None, latent=None, deter_first=True, action_first=False, update_bias=-1.0,
    ):  # fmt: skip
        self.blocks, self.features, self.depth, self.kind = blocks, features, depth, kind
        self.bias, self.apart, self.act, self.latent = bias, apart, act, latent
        self.deter_first, self.action_first = deter_first, action_first
        self.update_bias = update_bias

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def norms(self, widths):
        if self.kind is None:
            return ()
        shifts = self.kind == "layer"
        parts = [(1 + 0.3 * self.randn(n), 0.3 * self.randn(n) if shifts else None) for n in widths]
        return tuple(Norm(self.kind, *part, 1e-3) for part in parts)

    def mlp(self, act, *widths):
        weights = tuple(self.randn(b, a) / a**0.5 for a, b in itertools.pairwise(widths))
        biases = tuple(0.3 * self.randn(b) if self.bias else None for b in widths[1:])
        return MLPParams(weights, biases, act, self.norms(widths[1:]))

    def block_gru(self, D, x, act):
        G, units = self.blocks, D // self.blocks
        hidden = self.mlp(act, D, *self.features)
        inputs = [units + hidden.outputs + x] + [units] * self.depth
        outputs = [units] * self.depth + [3 * units]
        pairs = list(zip(inputs, outputs, strict=True))
        weights = tuple(self.randn(G, a, b) / a**0.5 for a, b in pairs)
        biases = tuple(0.3 * self.randn(G * b) if self.bias else None for _, b in pairs)
        blocks = MLPParams(weights, biases, act, self.norms([D] * self.depth))
        return BlockGRUParams(hidden, blocks, self.deter_first, self.update_bias)

    def apply(self, run, inputs):
        """The arguments of an op for such a model."""
        self.generator = torch.Generator().manual_seed(11)
        if self.latent is not None:
            inputs = testing.categorical(inputs, self.latent)
        params = inputs["params"]
        dims, act = params.dims(), self.act or params.inp.activation

        def active(mlp):
            return mlp and mlp._replace(activation=act)

        inp = active(params.inp)
        if self.apart is not None:
            widths = zip((dims["S"], dims["A"]), self.apart, strict=True)
            inp = Branches(*(self.mlp(act, n, *rest) for n, rest in widths))
        x = sum(part.outputs for part in inp) if self.apart is not None else inp.outputs
        gru, D = params.gru, dims["D"]
        if self.blocks:
            gru = self.block_gru(D, x, act)
        elif self.blocks == 0:
            gru = LateGRUParams(self.randn(3 * D, D + x) / D**0.5, self.randn(3 * D),
                                self.norms([3 * D])[0], self.deter_first)  # fmt: skip
        elif self.apart is not None:
            gru = gru._replace(weight_ih=self.randn(3 * D, x) / x**0.5)
        inputs = dict(inputs) | {
            "params": params._replace(
                inp=inp, gru=gru, prior=active(params.prior), post=active(params.post),
                action_first=self.action_first,
            )
        }  # fmt: skip
        if inputs.get("encoder") is not None:
            inputs["encoder"] = active(inputs["encoder"])
        if "actor" in inputs:
            inputs["actor"] = inputs["actor"]._replace(mlp=active(inputs["actor"].mlp))
        if "returns" in inputs:
            heads = {name: active(getattr(inputs["returns"], name)) for name in
                     ("reward", "critic", "target", "discount")}  # fmt: skip
            inputs["returns"] = inputs["returns"]._replace(**heads)
        return inputs if self.latent is None else testing.away_from_borders(run, inputs)


GUMBEL = Categorical(16, 0.01, gumbel=True)
# sizes, H or T, B, style: units of a block below, at and above vectors of 8 and 16, and two of
# them; layers of one kind and of all; one row, and more than a tile
CASES = {
    "one": (Sizes(1, 6, 5, 1, 17, 5, 0, 1, 2, "silu"), 2, 1, Style(2)),
    "no norm": (
        Sizes(2, 9, 6, 3, 17, 15, 1, 1, 1, "elu"), 9, 3,
        Style(3, (8, 11), 2, None, deter_first=False),
    ),
    "no bias": (
        Sizes(6, 21, 30, 4, 16, 33, 1, 2, 3, "tanh"), 3, 49,
        Style(1, (16,), 1, "layer", False, ((33, 17), (20,)), action_first=True),
    ),
    "gates alone": (Sizes(6, 32, 30, 4, 33, 31, 1, 0, 3, "relu"), 2, 51, Style(2, (31,), 0)),
    "joined": (
        Sizes(6, 34, 30, 4, 31, 16, 1, 0, 3, "silu"), 3, 49,
        Style(2, (40,), apart=None, action_first=True, deter_first=False, update_bias=0.5),
    ),
    "V3": (
        Sizes(3, 64, 48, 33, 64, 40, 1, 2, 1, "silu", 40), 4, 33,
        Style(4, (40,), apart=((40,), (40,)), latent=Categorical(16, 0.01)),
    ),
    "Gumbel": (
        Sizes(3, 96, 64, 33, 64, 40, 1, 2, 1, "silu", 40), 5, 33,
        Style(8, (33,), 2, apart=((40,), (24,)), latent=GUMBEL),
    ),
    "wide": (
        Sizes(6, 256, 64, 70, 130, 33, 2, 1, 1, "silu"), 3, 20,
        Style(4, (96,), apart=((64,), (96,)), latent=Categorical(32, gumbel=True)),
    ),
    "late": (
        Sizes(6, 31, 30, 4, 33, 17, 1, 1, 2, "silu"), 3, 50,
        Style(0, kind="layer", apart=((31,), (18, 33)), action_first=True),
    ),
    "torch": (Sizes(6, 33, 30, 4, 33, 17, 1, 1, 2, "elu"), 3, 50, Style(apart=((16,), (32,)))),
    "GELU": (Sizes(6, 33, 30, 4, 33, 17, 1, 1, 2, "elu"), 4, 17, Style(apart=None, act="gelu")),
    "GELU by tanh": (
        Sizes(6, 33, 30, 4, 33, 17, 0, 2, 1, "elu"), 4, 17, Style(apart=None, act="gelu_tanh")
    ),
    "Mish": (Sizes(6, 33, 30, 4, 33, 17, 1, 0, 2, "elu"), 4, 17, Style(apart=None, act="mish")),
    "GELU, norms": (
        Sizes(6, 34, 30, 4, 33, 17, 1, 1, 2, "elu"), 4, 33, Style(apart=((33,), (40,)), act="gelu")
    ),
    "Mish, norms": (
        Sizes(6, 34, 30, 4, 33, 17, 1, 1, 2, "elu"), 4, 33,
        Style(kind="layer", apart=((33,), (40,)), act="mish"),
    ),
    "GELU in blocks": (Sizes(6, 34, 30, 4, 33, 17, 1, 1, 2, "elu"), 3, 17, Style(2, act="gelu")),
    "Mish in blocks": (
        Sizes(6, 34, 30, 4, 33, 17, 1, 1, 2, "elu"), 3, 17, Style(2, kind=None, act="mish")
    ),
}  # fmt: skip
# in bfloat16 the error of few numbers is luck, and which ReLU is on
ONLY_FP32 = ("one", "no norm", "gates alone", "GELU in blocks", "Mish in blocks")


def make(op, name, **changes):
    run, inputs = INPUTS[op]
    sizes, H, B, style = CASES[name]
    return run, style.apply(run, inputs(sizes, H, B) | changes)


def check_case(op, name):
    run, inputs = make(op, name)
    for bf16 in (False,) if name in ONLY_FP32 else (False, True):
        compare_with_and_without_gradients(run, inputs, bf16=bf16)


def check_cem(name):
    sizes, H, B, style = CASES[name]
    compare(cem, style.apply(cem, cem_inputs(sizes, H, B)), wrt=())


def check_decide(name):
    sizes, _, B, style = CASES[name]
    compare(decide, style.apply(decide, decide_inputs(sizes, B)), wrt=())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("op", INPUTS)
def test_cases(op, name):
    check_case(op, name)


@pytest.mark.parametrize("name", CASES)
def test_cem_and_decide(name):
    check_cem(name)
    check_decide(name)


@pytest.mark.parametrize("first", list(itertools.product([False, True], repeat=3)))
def test_every_order_of_columns(first):
    action_first, embed_first, deter_first = first
    sizes, T, B, _ = CASES["V3"]
    for blocks in (4, 0, None):
        style = Style(blocks, (40,), apart=((40,), (24,)), deter_first=deter_first,
                      action_first=action_first)  # fmt: skip
        for run, inputs in in_order(sizes, T, 3, B, action_first, embed_first, deter_first):
            given = style.apply(run, inputs)
            compare(run, given, **({"wrt": ()} if run is decide else {}))


@pytest.mark.parametrize(
    ("op", "using"),
    [
        ("observe", "out.prior.logits"),
        ("observe", "out.post.logits"),
        ("observe", "out.state.deter"),
        ("rssm_step", "out[0].deter"),
        ("open_loop", "out.stoch"),
        ("imagine", "out.returns"),
        ("imagine", "out.value"),
    ],
)
def test_gradient_of_one_output(op, using):
    run, inputs = make(op, "Gumbel")
    compare(run, inputs, using=(using,))


@pytest.mark.parametrize("unimix", [0.0, 0.01, 0.5, 1.0])
def test_gumbel_softmax_samples(unimix):
    sizes, T, B, _ = CASES["Gumbel"]
    style = Style(8, (33,), latent=Categorical(16, unimix, gumbel=True))
    for run, inputs in [
        (observe, testing.observe_inputs(sizes, T, B)),
        (imagine, testing.imagine_inputs(sizes, 3, B, heads=True)),
    ]:
        compare(run, style.apply(run, inputs))


def test_gumbel_softmax_samples_of_sure_logits():
    """Probabilities that are zero in float32 have noise, too, and no NaN."""
    run, inputs = make("observe", "wide")
    post = inputs["params"].post
    sure = post._replace(weights=(*post.weights[:-1], 300 * post.weights[-1]))
    inputs["params"] = inputs["params"]._replace(post=sure)
    inputs = testing.away_from_borders(run, inputs)
    compare(run, inputs, wrt=("start", "embed"))


@pytest.mark.parametrize("unimix", [0.0, 0.01])
def test_gumbel_softmax_policies(unimix):
    """Their noise is of every class; without it the likeliest action is chosen."""
    sizes, H, B, style = CASES["Gumbel"]
    std = Categorical(sizes.A, unimix, gumbel=True)

    def one_hot(inputs, *lead):
        actor = inputs["actor"]
        halved = [t[: sizes.A].clone() for t in (actor.mlp.weights[-1], actor.mlp.biases[-1])]
        layers = [(*t[:-1], half) for t, half in zip(actor.mlp[:2], halved, strict=True)]
        mlp = actor.mlp._replace(weights=layers[0], biases=layers[1])
        generator = torch.Generator().manual_seed(3)
        noise = gumbel((*lead, B, sizes.A), generator=generator)
        return inputs | {"actor": actor._replace(mlp=mlp, std=std), "action_noise": noise}

    inputs = one_hot(testing.imagine_inputs(sizes, H, B, heads=True), H)
    given = style.apply(imagine, inputs)
    for through in (False, True):
        actor = given["actor"]._replace(through_feat=through)
        got = compare(imagine, given | {"actor": actor})
    assert set(got["out.action"].unique().tolist()) == {0.0, 1.0}
    given = style.apply(decide, one_hot(testing.decide_inputs(sizes, B)))
    compare(decide, given, wrt=())
    compare(decide, given | {"action_noise": None}, wrt=())


def test_a_nan_stays_in_its_row():
    for name in ("no norm", "V3", "Gumbel", "Mish"):
        run, inputs = make("observe", name)
        assert_a_nan_stays_in_its_row(run, inputs)


def test_undefined_noise_makes_its_sample_undefined():
    """As eager's: all classes of that categorical, and no other's."""
    run, inputs = make("rssm_step", "Gumbel")
    inputs["noise"][3, 17] = torch.nan
    got = run(**inputs, backend="native")[0].stoch
    want = run(**inputs, backend="eager")[0].stoch
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().sum() == 16


def test_an_action_that_is_bounded():
    """r2dreamer's: a / max(1, |a|), given or its own."""
    for op in ("observe", "open_loop"):
        run, inputs = make(op, "V3")
        params = inputs["params"]._replace(bound_action=True)
        inputs |= {"params": params, "action": 3 * inputs["action"]}
        compare(run, testing.away_from_borders(run, inputs))
    run, inputs = make("imagine", "V3")
    wide = inputs["actor"]._replace(squash="none", std=StdTransform(offset=1.0))
    inputs |= {"actor": wide, "params": inputs["params"]._replace(bound_action=True)}
    compare(run, testing.away_from_borders(run, inputs))


@pytest.mark.parametrize("name", ["one", "no bias", "Gumbel", "late", "GELU, norms"])
@pytest.mark.parametrize("op", INPUTS)
def test_threads_change_nothing(op, name, threads):
    run, inputs = make(op, name)
    assert_threads_change_nothing(run, inputs, threads)


def test_a_row_does_not_depend_on_the_others():
    run, inputs = make("rssm_step", "V3")
    all_rows, _ = run(**inputs, backend="native")
    rows = {"state": type(all_rows)(*(t[4:6].contiguous() for t in inputs["state"]))}
    rows |= {name: inputs[name][4:6].contiguous() for name in ("action", "noise")}
    some, _ = run(**inputs | rows, backend="native")
    for got, want in zip(some, all_rows, strict=True):
        assert torch.equal(got, want[4:6])


def test_only_outputs_are_written():
    run, inputs = make("rssm_step", "Gumbel")
    assert_only_outputs_are_written(run, inputs, "rssm_step", 5)


def test_packs_follow_the_blocks():
    """Changed in place, or another bias of the update gate, order, activation or eps."""
    run, inputs = make("observe", "V3")
    params = inputs["params"]
    gru, inp = params.gru, params.inp
    eps = tuple(norm._replace(eps=0.1) for norm in gru.blocks.norms)
    changes = [
        gru._replace(update_bias=0.5),
        gru._replace(deter_first=False),
        gru._replace(blocks=gru.blocks._replace(activation="mish")),
        gru._replace(blocks=gru.blocks._replace(norms=eps)),
        gru._replace(hidden=gru.hidden._replace(activation="gelu")),
    ]
    changes = [params._replace(gru=changed) for changed in changes]
    changes.append(params._replace(inp=inp._replace(action=inp.action._replace(activation="elu"))))
    in_place = [*gru.blocks.weights[:2], inp.action.weights[0]]
    assert_packs_follow(run, inputs, changes, in_place)


def test_weights_of_another_layout():
    """As r2dreamer keeps them, [out, in, G]; gradients come in it, too."""
    run, inputs = make("observe", "V3")
    params = inputs["params"]
    grads = []
    for layout in ((0, 1, 2), (2, 1, 0)):
        kept = [w.permute(*layout).contiguous().requires_grad_() for w in params.gru.blocks.weights]
        blocks = params.gru.blocks._replace(weights=tuple(w.permute(*layout) for w in kept))
        given = inputs | {"params": params._replace(gru=params.gru._replace(blocks=blocks))}
        loss = run(**given, backend="native").state.deter.square().sum()
        grads.append([g.permute(*layout) for g in torch.autograd.grad(loss, kept)])
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("frozen", ["blocks", "branches"])
def test_frozen_parameters_get_no_gradient(frozen):
    run, inputs = make("observe", "V3")
    params = inputs["params"]
    still = parameters(params.gru.blocks if frozen == "blocks" else params.inp)
    trained = [t for t in parameters(params[:4]) if all(t is not s for s in still)]
    assert_gradients_of_some(run, inputs, trained)


def test_more_layers_than_native_has():
    sizes, T, B, _ = CASES["one"]
    for style in (Style(2, depth=16), Style(2, (4,) * 17), Style(apart=((4,) * 17, (4,)))):
        inputs = style.apply(observe, testing.observe_inputs(sizes, T, B))
        observe(**inputs)
        assert last_backend("observe") == "eager"
        with pytest.raises(BackendError, match="17 layers"):
            observe(**inputs, backend="native")


def test_the_bindings_refuse():
    from fastdreamer import _native

    def ones(*shape):
        return torch.ones(*shape).numpy()

    def mlp(*shape, last=True):
        return _native.PackedMlp([ones(*shape)], [None], [], "elu", last, False, True, 0, 0, 0, 1)

    def gru(*shapes, features=(5, 4), norms=(), action=(0, False), last=True):
        weights = [ones(*shape) for shape in shapes]
        return _native.PackedGru(
            mlp(*features, last=last), weights, [None] * len(weights), list(norms), "elu",
            True, -1.0, action, False, True, 1,
        )  # fmt: skip

    gru((2, 2 + 5 + 3, 2), (2, 2, 6))
    for shapes, options, message in [
        (((3, 10, 2), (3, 2, 6)), {}, "blocks that divide 4"),
        (((2, 7, 2), (2, 2, 6)), {}, "all features"),
        (((2, 10, 2), (2, 3, 6)), {}, r"weight must be \[2, 2, 6\]"),
        (((2, 10, 2), (2, 2, 5)), {}, "3 times"),
        (((10, 4), (4, 12)), {}, "blocks, in, out"),
        (((2, 10, 2), (2, 2, 6)), {"norms": (None, None)}, "2 norms"),
        (((2, 10, 2), (2, 2, 6)), {"action": (3, True)}, "part of the inputs"),
        (((2, 10, 2), (2, 2, 6)), {"last": False}, "activation follows the features"),
    ]:
        with pytest.raises(ValueError, match=message):
            gru(*shapes, **options)
    cell, branches = gru((2, 10, 2), (2, 2, 6)), (mlp(2, 2), mlp(1, 1), True)
    out = tuple(ones(1, n) for n in (4, 2, 2, 2))
    given = [ones(1, n) for n in (4, 2, 1, 2)]
    std = ("softplus", 1.0, 1.0, 0.0, 0.1, 0.0)
    with pytest.raises(ValueError, match="packed for other inputs"):
        _native.rssm_step((branches, cell, mlp(4, 4, last=False), std), *given, out, 1)


@pytest.mark.parametrize("op", INPUTS)
def test_auto_takes_native(op):
    run, inputs = make(op, "Gumbel")
    run(**inputs)
    assert last_backend(op) == "native"


def test_isa(run_on_isa):
    run_on_isa(__file__)


if __name__ == "__main__":
    from fastdreamer import _native

    torch.set_num_threads(1)
    for name in CASES:
        for op in INPUTS:
            check_case(op, name)
        check_cem(name)
        check_decide(name)
    print(_native.isa())
