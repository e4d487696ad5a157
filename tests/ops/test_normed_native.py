"""Normalised layers, layers without bias and the late-reset GRU in the native ops, against eager.

Outputs and all gradients, fp32 and bf16, alone and together with categorical latents, as DreamerV2
and V3 have them, on every ISA of the host and for several numbers of threads. The environment
chooses the instruction set, once a process, so those run this file as a script.
"""

import itertools

import pytest
import torch
from native_and_eager import (
    INPUTS,
    assert_a_nan_stays_in_its_row,
    assert_gradients_of_some,
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
from fastdreamer.ops.backend import last_backend
from fastdreamer.ops.cells import LateGRUParams
from fastdreamer.ops.cem import cem
from fastdreamer.ops.decide import decide
from fastdreamer.ops.layers import MLPParams, Norm
from fastdreamer.ops.observe import observe
from fastdreamer.ops.params import Begin, Categorical
from fastdreamer.testing import Sizes

PARTS = ("inp", "prior", "post")


class Style:
    """What layers and the GRU of a model are.

    Args:
        kind: of the layers' norms, or None.
        bias: whether normalised layers have one; the last layer of an MLP always does.
        affine: whether norms have a weight and, LayerNorms, a bias.
        shifted: whether RMSNorms have one, too.
        late: the options of a late-reset GRU (``norm`` its kind), or None for torch's.
        latent: categorical, or None for Gaussian latents.
        begin: whether episodes begin with a learned state.
        eps: of the norms.
    """

    def __init__(
        self, kind="layer", bias=False, affine=True, late=None, latent=None, begin=False, eps=1e-3,
        shifted=False,
    ):  # fmt: skip
        self.kind, self.bias, self.affine, self.eps = kind, bias, affine, eps
        self.late, self.latent, self.begin, self.shifted = late, latent, begin, shifted

    def norm(self, kind, n):
        if kind is None:
            return None
        weight, bias = 1 + 0.3 * self.randn(n), 0.3 * self.randn(n)
        if not self.affine:
            return Norm(kind, None, None, self.eps)
        return Norm(kind, weight, bias if kind == "layer" or self.shifted else None, self.eps)

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def mlp(self, mlp: MLPParams, act_last=False):
        count = len(mlp.weights) - (not act_last)
        biases = [b if self.bias or i >= count else None for i, b in enumerate(mlp.biases)]
        norms = tuple(self.norm(self.kind, len(w)) for w in mlp.weights[:count])
        return mlp._replace(biases=tuple(biases), norms=norms if self.kind else ())

    def gru(self, gru):
        if self.late is None:
            return gru
        joined = torch.cat([gru.weight_ih, gru.weight_hh], 1)  # of either order, random
        options = dict(self.late)
        norm = self.norm(options.pop("norm", "layer"), len(joined))
        bias = gru.bias_ih if options.pop("bias", False) else None
        return LateGRUParams(joined, bias, norm, **options)

    def apply(self, run, inputs):
        """The arguments of an op for such a model."""
        self.generator = torch.Generator().manual_seed(7)
        if self.latent is not None:
            inputs = testing.categorical(inputs, self.latent)
        params = inputs["params"]
        parts = {name: getattr(params, name) for name in PARTS if getattr(params, name) is not None}
        parts = {name: self.mlp(part, name == "inp") for name, part in parts.items()}
        if self.begin:
            parts["begin"] = Begin(self.randn(params.dims()["D"]))
        inputs = dict(inputs) | {"params": params._replace(gru=self.gru(params.gru), **parts)}
        if inputs.get("encoder") is not None:
            inputs["encoder"] = self.mlp(inputs["encoder"], True)
        if "actor" in inputs:
            inputs["actor"] = inputs["actor"]._replace(mlp=self.mlp(inputs["actor"].mlp))
        if "returns" in inputs:
            returns = inputs["returns"]
            heads = {name: getattr(returns, name) for name in ("reward", "critic", "target")}
            heads = {name: head and self.mlp(head) for name, head in heads.items()}
            inputs["returns"] = returns._replace(**heads)
        return inputs if self.latent is None else testing.away_from_borders(run, inputs)


V3 = {"late": {}, "latent": Categorical(16, 0.01)}
# sizes, H or T, B, style: widths below, at and above vectors of 8 and 16, and two of them; one
# row, and more than a tile
CASES = {
    "one": (Sizes(1, 7, 5, 1, 17, 5, 0, 1, 2, "silu"), 2, 1, Style(late={})),
    "layer": (Sizes(2, 9, 6, 3, 17, 15, 1, 1, 1, "elu"), 9, 3, Style(bias=True)),
    "rms": (Sizes(6, 21, 30, 4, 16, 33, 1, 2, 3, "tanh"), 3, 49, Style("rms", late=None)),
    "shifted": (
        Sizes(3, 9, 10, 4, 17, 9, 1, 1, 1, "silu"), 3, 5,
        Style("rms", shifted=True, late={"norm": "rms"}),
    ),
    "plain": (Sizes(6, 16, 30, 4, 33, 31, 1, 0, 3, "silu"), 2, 51, Style(affine=False)),
    "no bias": (
        Sizes(6, 17, 3, 4, 31, 16, 1, 0, 3, "relu"), 3, 17,
        Style(None, late={"norm": None}),
    ),
    "V2": (
        Sizes(3, 31, 48, 33, 32, 5, 3, 2, 1, "elu", 40), 5, 16,
        Style(None, True, late={"deter_first": True, "bias": True}, latent=Categorical(16)),
    ),
    "V3": (Sizes(3, 32, 48, 33, 64, 40, 1, 2, 1, "silu", 40), 7, 15, Style(**V3)),
    "wide": (Sizes(6, 96, 64, 70, 130, 33, 2, 1, 1, "silu"), 3, 33, Style(**V3)),
    "old": (
        Sizes(2, 15, 7, 5, 17, 9, 1, 1, 1, "elu"), 4, 5,
        Style("rms", True, False, late={"norm": "rms", "gates": "ruc", "update_bias": 0.5}),
    ),
}  # fmt: skip
ONLY_FP32 = (
    "one",
    "old",
    "shifted",
    "layer",
    "no bias",
)  # in bfloat16 the error of few numbers is luck


def make(op, name, **changes):
    run, inputs = INPUTS[op]
    sizes, H, B, style = CASES[name]
    given = inputs(sizes, H, B)
    return run, style.apply(run, given | changes)


def precisions(name):
    return (False,) if name in ONLY_FP32 else (False, True)


def check_case(op, name):
    run, inputs = make(op, name)
    for bf16 in precisions(name):
        compare_with_and_without_gradients(run, inputs, bf16=bf16)


def check_cem(name):
    sizes, H, B, style = CASES[name]
    inputs = style.apply(cem, cem_inputs(sizes, H, B))
    for score in ("lambda_return", "reward"):
        compare(cem, inputs | {"score": score}, wrt=())


def check_decide(name):
    sizes, _, B, style = CASES[name]
    inputs = style.apply(decide, decide_inputs(sizes, B))
    for bf16 in precisions(name):
        compare(decide, inputs, bf16=bf16, wrt=())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("op", INPUTS)
def test_cases(op, name):
    check_case(op, name)


@pytest.mark.parametrize("name", CASES)
def test_cem_and_decide(name):
    check_cem(name)
    check_decide(name)


@pytest.mark.parametrize("reset", ["all", "state", "stoch", "deter"])
@pytest.mark.parametrize("name", ["layer", "V3"])
def test_episodes_begin_with_a_learned_state(name, reset):
    sizes, T, B, style = CASES[name]
    inputs = testing.observe_inputs(sizes, T, B) | {"reset": reset}
    inputs["is_first"][[0, T // 2, T - 1], [0, 1, 2]] = True
    learned = Style(style.kind, style.bias, True, style.late, style.latent, begin=True)
    inputs = learned.apply(observe, inputs)
    compare(observe, inputs)
    inputs["is_first"][:] = False
    compare(observe, inputs)
    if style.latent is not None:
        through = inputs["params"].begin._replace(through=False)
        compare(observe, inputs | {"params": inputs["params"]._replace(begin=through)})


def test_an_undefined_start_stays_in_its_rows():
    """As eager's, of both latents."""
    for name in ("layer", "V3"):
        sizes, T, B, style = CASES[name]
        inputs = testing.observe_inputs(sizes, T, B)
        inputs["is_first"][:] = False
        inputs["is_first"][1, 2] = True
        style = Style(style.kind, style.bias, True, style.late, style.latent, begin=True)
        inputs = style.apply(observe, inputs)
        inputs["params"].begin.weight[:] = torch.nan
        seen = observe(**inputs, backend="native").state.stoch
        want = observe(**inputs, backend="eager").state.stoch
        assert torch.equal(seen.isnan(), want.isnan()) and seen[1:, 2].isnan().all()
        assert seen.isnan().sum() == seen[1:, 2].numel()


@pytest.mark.parametrize("first", list(itertools.product([False, True], repeat=3)))
def test_every_order_of_columns(first):
    action_first, embed_first, deter_first = first
    sizes, T, B, _ = CASES["V3"]
    style = Style(late={"deter_first": deter_first}, latent=Categorical(16, 0.01))
    for run, inputs in in_order(sizes, T, 3, B, action_first, embed_first, deter_first):
        given = style.apply(run, inputs)
        compare(run, given, **({"wrt": ()} if run is decide else {}))


@pytest.mark.parametrize("gates", list(map("".join, itertools.permutations("rcu"))))
def test_every_order_of_gates(gates):
    sizes, T, B, _ = CASES["old"]
    style = Style(late={"gates": gates})
    compare(observe, style.apply(observe, testing.observe_inputs(sizes, T, B)))


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1.0])
def test_eps(eps):
    sizes, T, B, _ = CASES["layer"]
    for kind in ("layer", "rms"):
        style = Style(kind, late={"norm": kind}, eps=eps)
        compare(observe, style.apply(observe, testing.observe_inputs(sizes, T, B)))


def test_weight_without_bias():
    """Of a LayerNorm, as ``nn.LayerNorm(n, bias=False)`` is."""
    run, inputs = make("observe", "V3")
    params = inputs["params"]

    def scaled(mlp):
        return mlp._replace(norms=tuple(norm._replace(bias=None) for norm in mlp.norms))

    parts = {name: scaled(getattr(params, name)) for name in PARTS}
    gru = params.gru._replace(norm=params.gru.norm._replace(bias=None))
    compare(run, inputs | {"params": params._replace(gru=gru, **parts)})


@pytest.mark.parametrize(
    ("op", "using"),
    [
        ("observe", "out.prior.logits"),
        ("observe", "out.post.logits"),
        ("observe", "out.state.deter"),
        ("rssm_step", "out[0].deter"),
        ("open_loop", "out.deter"),
        ("imagine", "out.returns"),
        ("imagine", "out.value"),
    ],
)
def test_gradient_of_one_output(op, using):
    run, inputs = make(op, "V3")
    compare(run, inputs, using=(using,))


def test_large_and_small_rows():
    """A mean far from zero, a variance of nearly nothing: what the statistics must not lose."""
    run, inputs = make("observe", "layer")
    params = inputs["params"]
    inp = params.inp
    shifted = inp._replace(biases=(inp.biases[0] + 300,))
    compare(run, inputs | {"params": params._replace(inp=shifted)}, wrt=("start", "embed"))
    flat = inp._replace(weights=(1e-4 * inp.weights[0],), biases=(torch.zeros(17),))
    compare(run, inputs | {"params": params._replace(inp=flat)}, wrt=("start", "embed"))


def test_a_nan_stays_in_its_row():
    for name in ("layer", "V3"):
        run, inputs = make("observe", name)
        assert_a_nan_stays_in_its_row(run, inputs)


@pytest.mark.parametrize("name", ["one", "plain", "wide"])
@pytest.mark.parametrize("op", INPUTS)
def test_threads_change_nothing(op, name, threads):
    run, inputs = make(op, name)
    assert_threads_change_nothing(run, inputs, threads)


def test_packs_follow_the_norms():
    """Changed in place, or another eps, order of gates or bias of the update gate."""
    run, inputs = make("observe", "V3")
    params = inputs["params"]
    changes = [params._replace(gru=params.gru._replace(update_bias=0.5))]
    changes.append(params._replace(gru=params.gru._replace(gates="cru")))
    for norm in ({"eps": 0.1}, {"kind": "rms", "bias": None}):
        gru = params.gru._replace(norm=params.gru.norm._replace(**norm))
        changes.append(params._replace(gru=gru))
        inp = params.inp._replace(norms=tuple(n._replace(**norm) for n in params.inp.norms))
        changes.append(params._replace(inp=inp))
    assert_packs_follow(run, inputs, changes, [params.gru.norm.weight])


@pytest.mark.parametrize("frozen", ["weights", "norms"])
def test_frozen_parameters_get_no_gradient(frozen):
    run, inputs = make("observe", "V3")
    params = inputs["params"]
    norms = [*params.gru.norm[1:3]]
    for mlp in (params.inp, params.prior, params.post):
        norms += parameters(mlp.norms)
    rest = [t for t in parameters(params) if all(t is not n for n in norms)]
    trained = rest if frozen == "norms" else norms
    assert_gradients_of_some(run, inputs, trained)


def test_the_bindings_refuse():
    from fastdreamer import _native

    weight, bias, norm = (torch.ones(*shape).numpy() for shape in [(6, 5), (6,), (6,)])

    def mlp(norms):
        return _native.PackedMlp([weight], [bias], norms, "elu", True, False, True, 0, 0, 0, 1)

    def gru(weight, norm, gates):
        action = (0, False)
        return _native.PackedGru(weight, None, norm, False, gates, -1.0, action, False, True, 1)

    for norms, message in [
        ([("batch", norm, norm, 1e-3)], "norm must be layer or rms, got 'batch'"),
        ([("layer", norm[:3], norm, 1e-3)], r"norm weight must be \[6\]"),
        ([("layer", norm, norm[:3], 1e-3)], r"norm bias must be \[6\]"),
        ([("layer", norm, norm)], "norm must be"),
        ([None, None], "2 norms"),
    ]:
        with pytest.raises(ValueError, match=message):
            mlp(norms)
    with pytest.raises(ValueError, match=r"weight must be \[3D"):
        gru(weight[:, :2].copy(), None, "rcu")
    with pytest.raises(ValueError, match="gates must be r, c and u"):
        gru(weight, None, "rcz")
    with pytest.raises(ValueError, match=r"norm weight must be \[6\]"):
        gru(weight, ("layer", norm[:2], None, 1e-3), "rcu")


@pytest.mark.parametrize("op", INPUTS)
def test_auto_takes_native(op):
    run, inputs = make(op, "V3")
    run(**inputs)
    assert last_backend(op) == "native"


@pytest.mark.parametrize("op", ["observe", "rssm_step", "open_loop"])
def test_bound_actions(op):
    """Of those that are given, in ``decide`` beside a policy, too."""
    run, inputs = make(op, "V3")
    params = inputs["params"]._replace(bound_action=True)
    inputs |= {"params": params, "action": 3 * inputs["action"]}
    got = compare(run, inputs)
    free = compare(run, inputs | {"params": params._replace(bound_action=False)})
    assert not torch.allclose(got["grad_action"], free["grad_action"])
    sizes, _, B, style = CASES["V3"]
    inputs = style.apply(decide, testing.decide_inputs(sizes, B))
    params = inputs["params"]._replace(bound_action=True)
    inputs |= {"params": params, "action": 3 * inputs["action"]}
    compare(decide, inputs, wrt=())
    compare(decide, inputs | {"actor": None, "action_noise": None}, wrt=())


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
