"""What today's Dreamers are made of as Triton kernels, under Triton's interpreter.

Values and all gradients against eager float64; see test_triton.py, whose checks these continue.
"""

import sys
from math import inf
from unittest import mock

import pytest
import test_blocks_native
import test_triton
import torch
from test_native import make_inputs
from test_normed_native import Style
from test_readout_native import PLAIN, SYMEXP, WRT, Case, symlog_bins
from test_triton import OPS, cem_inputs, check, on_device

from fastdreamer import testing
from fastdreamer.ops.decide import decide
from fastdreamer.ops.layers import MLPParams, Norm
from fastdreamer.ops.observe import observe
from fastdreamer.ops.params import Begin, Categorical, OneHot, StdTransform, two_hot
from fastdreamer.ops.triton.program import Launch
from fastdreamer.testing import Sizes

# remainders of every block; several blocks of columns; two blocks of rows
SMALL = Sizes(3, 21, 5, 7, 17, 19, 1, 2, 1, "silu", 20)
WIDE = Sizes(2, 35, 17, 33, 70, 35, 1, 0, 1, "elu", 40)
ROWS = Sizes(1, 7, 3, 2, 5, 18, 1, 1, 1, "tanh")


HEADS = Sizes(3, 9, 6, 3, 17, 18, 1, 1, 1, "elu")
V3 = {"late": {}, "latent": Categorical(5, 0.01)}
LATENTS = SMALL._replace(S=15)


def styled(op: str, style: Style, sizes: Sizes, steps: int, rows: int, *layers: int) -> dict:
    """Arguments of an op for a model of that style; layers of inp, and of prior and posterior."""
    inputs = make_inputs(op, sizes, steps, rows, layers or (1, 2))
    return on_device(style.apply(OPS[op], inputs))


# --- what a process of its own runs -------------------------------------------------------------


def check_norms() -> None:
    """LayerNorm and RMSNorm, with and without weight and bias; layers without bias."""
    check("observe", styled("observe", Style(), SMALL, 2, 3, 2, 3))
    check("imagine", styled("imagine", Style("rms", eps=1e-6), WIDE, 1, 17))
    check("rssm_step", styled("rssm_step", Style(affine=False, bias=True), ROWS, 1, 1, 2, 2))
    check("open_loop", styled("open_loop", Style(None), SMALL, 2, 2))
    inputs = on_device(Style().apply(OPS["cem"], cem_inputs(SMALL, 1, 1, 17, 2)))
    check("cem", inputs, wrt=())


def check_norms_of_any_layer() -> None:
    """Layers of different widths, one with a norm and one without; a weight without a bias.

    A mean far from zero, a variance of nearly nothing; bfloat16.
    """
    inputs = make_inputs("observe", SMALL, 2, 3)
    params = inputs["params"]
    draw = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=draw)

    widths = (params.dims()["D"], 9, 18, 10)
    weights = tuple(randn(b, a) / a**0.5 for a, b in zip(widths[:-1], widths[1:], strict=True))
    norms = (Norm("layer", 1 + randn(9) / 3, None, 0.0), None)
    prior = MLPParams(weights, (None, randn(18), randn(10)), "relu", norms)
    check("observe", on_device(inputs | {"params": params._replace(prior=prior)}))
    inputs = styled("rssm_step", Style(bias=True), SMALL, 1, 3)
    params, inp = inputs["params"], inputs["params"].inp
    for layer in (
        inp._replace(biases=(inp.biases[0] + 300,)),
        inp._replace(weights=(1e-4 * inp.weights[0],), biases=(0 * inp.biases[0],)),
    ):
        check("rssm_step", inputs | {"params": params._replace(inp=layer)}, wrt=("state",))
    check("rssm_step", styled("rssm_step", Style("rms"), SMALL, 1, 5, 2, 2), bf16=True)


def check_late_gru() -> None:
    """Both orders of columns, some of gates; with a norm, another or none, with a bias or not."""
    check("observe", styled("observe", Style(late={}), SMALL, 2, 3, 2, 2))
    other = {"norm": "rms", "gates": "ruc", "update_bias": 0.5, "deter_first": True, "bias": True}
    check("imagine", styled("imagine", Style("rms", late=other), WIDE, 1, 17))
    plain = Style(None, True, late={"norm": None, "gates": "ucr"})
    check("rssm_step", styled("rssm_step", plain, ROWS, 1, 1))
    check("open_loop", styled("open_loop", Style(late={"bias": True}), SMALL, 2, 5), bf16=True)


def check_activations() -> None:
    for activation in ("gelu", "gelu_tanh", "mish"):
        sizes = ROWS._replace(activation=activation, reward_layers=0, actor_layers=0)
        check("rssm_step", styled("rssm_step", Style(None, True), sizes, 1, 3))
        check("open_loop", styled("open_loop", Style("rms"), sizes, 1, 2))


def check_categorical() -> None:
    """Straight-through samples: one and many, of one to more than 16 classes, mixed or not."""
    inputs = styled("observe", Style(**V3), LATENTS, 2, 3)
    inputs["is_first"][1, 2] = True
    check("observe", inputs)
    seen = observe(**inputs, backend="triton")
    assert torch.equal(seen.state.stoch, observe(**inputs, backend="eager").state.stoch)
    plain = Style(None, True, latent=Categorical(17))
    check("imagine", styled("imagine", plain, WIDE._replace(S=34), 1, 17))
    one = Style(None, True, latent=Categorical(1))
    check("rssm_step", styled("rssm_step", one, ROWS, 1, 1))
    inputs = styled("rssm_step", plain, WIDE._replace(S=17), 1, 2)
    for output in ("out[0].stoch", "out[1].logits"):
        check("rssm_step", inputs, using=(output,), wrt=("state", "params.prior"))
    check("open_loop", styled("open_loop", Style(**V3), LATENTS, 2, 5), bf16=True)
    inputs = Style(**V3).apply(OPS["cem"], testing.cem_inputs(LATENTS, 1, 1, 17, 2))
    check("cem", on_device(inputs | {"num_elites": 17}), wrt=())
    inputs = on_device(Style(**V3, begin=True).apply(decide, testing.decide_inputs(LATENTS, 2)))
    found = (decide(**inputs, backend=backend) for backend in ("triton", "eager"))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    check_borders()


def check_gumbel() -> None:
    """Straight-through Gumbel-softmax samples: mixed or not, or nothing else; of sure logits, too.

    Of every class the noise, forward and backward; the class is the one that eager draws.
    """
    mixed = {"latent": Categorical(5, 0.01, gumbel=True)}
    inputs = styled("observe", Style(late={}, **mixed), LATENTS, 2, 3)
    inputs["is_first"][1, 2] = True
    check("observe", inputs)
    seen = observe(**inputs, backend="triton")
    assert torch.equal(seen.state.stoch, observe(**inputs, backend="eager").state.stoch)
    plain = Style(None, True, latent=Categorical(17, gumbel=True))
    inputs = styled("rssm_step", plain, WIDE._replace(S=34), 1, 3)
    check("rssm_step", inputs)
    prior = inputs["params"].prior  # probabilities that are zero in float32
    sure = prior._replace(weights=(*prior.weights[:-1], 300 * prior.weights[-1]))
    inputs["params"] = inputs["params"]._replace(prior=sure)
    inputs = testing.away_from_borders(OPS["rssm_step"], inputs)
    for output in ("out[0].stoch", "out[1].logits"):
        check("rssm_step", inputs, using=(output,), wrt=("state", "params.inp"))
    for unimix in (0.5, 1.0):
        style = Style(None, True, latent=Categorical(3, unimix, gumbel=True))
        check("open_loop", styled("open_loop", style, LATENTS, 2, 2))
    check("open_loop", styled("open_loop", Style(**mixed), LATENTS, 2, 5), bf16=True)
    inputs = Style(**mixed).apply(OPS["cem"], testing.cem_inputs(LATENTS, 1, 1, 17, 2))
    check("cem", on_device(inputs | {"num_elites": 17}), wrt=())
    inputs = on_device(Style(**mixed, begin=True).apply(decide, testing.decide_inputs(LATENTS, 2)))
    found = (decide(**inputs, backend=backend) for backend in ("triton", "eager"))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    sizes = HEADS._replace(A=6, D=7, hidden=5)
    latent = Categorical(3, 0.01, gumbel=True)
    for std, more in (
        (Categorical(6, gumbel=True), {}),
        (Categorical(3, 0.01, gumbel=True), {"through": True, "latent": latent}),
        (Categorical(2, 0.01), {"through": True, "latent": latent}),
    ):
        case = Case(sizes, 2, 3, std=std, **more)
        check("imagine", on_device(case.imagine()), wrt=WRT)
    check_ties()


def each_block(_, rows: int, depth: int, programs: int) -> tuple[int, int]:
    """In the place of ``Builder._splits``: in parts, which else only many rows are."""
    return -(-rows // depth), depth


def check_learned_start() -> None:
    """Of both halves of the state, and of one; its mode with a gradient and without.

    Its own gradient in parts, too.
    """
    from fastdreamer.ops.triton import build

    inputs = make_inputs("observe", ROWS, 3, 11)
    inputs["is_first"][::2, ::3] = True
    with mock.patch.object(build.Builder, "_splits", each_block):
        check("observe", on_device(Style(begin=True).apply(observe, inputs)))
    for style, sizes, reset, through in (
        (V3, LATENTS, "all", True),
        (V3, LATENTS, "state", False),
        ({}, SMALL, "stoch", True),
        ({}, SMALL, "deter", True),
    ):
        inputs = make_inputs("observe", sizes, 2, 3) | {"reset": reset}
        inputs["is_first"][0, 1] = inputs["is_first"][1, 2] = True
        inputs = Style(**style, begin=True).apply(observe, inputs)
        begin = inputs["params"].begin._replace(through=through)
        inputs["params"] = inputs["params"]._replace(begin=begin)
        check("observe", on_device(inputs))
    inputs["params"].begin.weight[:] = torch.nan  # stays where episodes begin
    seen = [observe(**inputs, backend=backend) for backend in ("triton", "eager")]
    undefined = [torch.cat(one.state, -1).isnan() for one in seen]
    assert torch.equal(*undefined) and undefined[0].any() and not undefined[0].all()


def check_bounds() -> None:
    """Actions beyond 1, given, or proposed to a search whose clip is."""
    style = Style(late={})
    for op in ("observe", "rssm_step", "cem"):
        inputs = cem_inputs(SMALL, 1, 1, 17, 2) if op == "cem" else make_inputs(op, SMALL, 2, 3)
        inputs = on_device(style.apply(OPS[op], inputs))
        inputs["params"] = inputs["params"]._replace(bound_action=True)
        inputs |= {"clip": 3.0} if op == "cem" else {"action": 3 * inputs["action"]}
        check(op, inputs, **({"wrt": ()} if op == "cem" else {}))
        free = inputs | {"params": inputs["params"]._replace(bound_action=False)}
        found = (OPS[op](**given, backend="triton") for given in (inputs, free))
        assert not torch.equal(*(out.scores if op == "cem" else out[0].deter for out in found))


def check_heads() -> None:
    """Two-hot heads of even and odd bins, symexp'd and wider ones, a continuation by its mode."""
    cases = (
        Case(HEADS, 2, 3, (two_hot(33), 33), (symlog_bins(8), 8), hard=False),
        Case(HEADS, 1, 17, (PLAIN, 2), (two_hot(3), 3), hard=True),
        Case(HEADS, 2, 1, (SYMEXP, 1), (SYMEXP, 3)),
    )
    for case in cases:
        check("imagine", on_device(case.imagine()), wrt=WRT)
    check("imagine", on_device(cases[0].imagine()), wrt=("returns.critic",), using=("out.value",))
    inputs = cases[0].make(OPS["cem"], hard=True, **testing.cem_inputs(HEADS, 1, 1, 17, 2))
    for score in ("lambda_return", "reward"):
        check("cem", on_device(inputs | {"num_elites": 17, "score": score}), wrt=())
    inputs = on_device(cases[0].imagine())
    level = inputs["returns"].reward
    level = level._replace(weights=(*level.weights[:-1], 0 * level.weights[-1]),
                           biases=(*level.biases[:-1], 0 * level.biases[-1]))  # fmt: skip
    inputs["returns"] = inputs["returns"]._replace(reward=level)
    assert not OPS["imagine"](**inputs, backend="triton").reward.any(), (
        "equal parts of mirrored bins"
    )


def check_policies() -> None:
    """Squashed otherwise than by a tanh; one-hot actions, one or two; bounded before a step."""
    for squash, scale, more in (
        ("bound", 1.0, {"through": True}),
        ("none", inf, {"bound": True}),
        ("none", 1.0, {"bound": True, "through": True}),
        ("clip", inf, {}),
    ):
        case = Case(HEADS, 2, 3, squash=squash, std=StdTransform(min=0.6), mean_scale=scale, **more)
        check("imagine", on_device(case.imagine()), wrt=WRT)
    sizes = HEADS._replace(A=6, D=7, hidden=5)
    for classes, more in ((6, {}), (3, {"through": True, "latent": Categorical(2, 0.01)})):
        case = Case(sizes, 2, 3, std=Categorical(classes, 0.01), **more)
        check("imagine", on_device(case.imagine()), wrt=WRT)


def check_ties() -> None:
    """The first of equals; a class without probability is not drawn; NaN as in eager."""
    from fastdreamer.ops.triton.build import _categoricals
    from fastdreamer.ops.triton.categorical import gumbel_backward_kernel, gumbel_sample_kernel
    from fastdreamer.ops.triton.layout import Classes

    def drawn(logits: list, noise: list, unimix: float = 0.0) -> torch.Tensor:
        logits, noise = (torch.tensor(x, device=test_triton.DEVICE) for x in (logits, noise))
        items, K = logits.shape
        got, grad = torch.full_like(logits, -9.0), torch.full_like(logits, -9.0)
        _, blocks = _categoricals(Classes(K, unimix, True), logits.numel())
        grid = (-(-items // blocks["BI"]),)
        mix = 1.0 - unimix, unimix / K
        gumbel_sample_kernel[grid](logits, noise, got, items, *mix, **blocks)
        d_sample = torch.linspace(-1, 1, items * K, device=logits.device).view(items, K)
        gumbel_backward_kernel[grid](logits, noise, d_sample, d_sample, grad, items, *mix, **blocks)
        by = logits.clone().requires_grad_()
        want = OneHot(by[:, None], unimix, True).sample(noise)
        (of_sample,) = torch.autograd.grad(want, by, d_sample)
        torch.testing.assert_close(got, want.detach(), rtol=0, atol=0, equal_nan=True)
        close = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}
        torch.testing.assert_close(grad, of_sample + d_sample, **close)
        return got

    nan = torch.nan
    level = [[0.0] * 5] * 3
    noise = [[0.5] * 5, [0.0, 1, 0, 1, 1], [-3.0, -2, -9, -2, -3]]
    for unimix in (0.0, 0.01, 1.0):
        assert drawn(level, noise, unimix).argmax(1).tolist() == [0, 1, 1]
    none = [[-inf, 0.0, -inf, 0.0]]
    assert drawn(none, [[50.0, 0.0, 50.0, 1.0]]).argmax() == 3
    assert drawn(none, [[0.0, 0.0, 50.0, 1.0]], 0.01).argmax() == 2
    # probabilities that are zero in float32, far noise, huge logits
    faint = [[0.0, -300.0], [-300.0, -301.0], [3e38, -3e38], [1e4, 1e4]]
    drawn(faint, [[0.0, 299.0], [0.0, 5.0], [0.0, 9.0], [-2.0, 4.0]])
    assert drawn([[0.0, -300.0]], [[0.0, 301.0]]).argmax() == 1
    undefined = [[0.0, inf], [nan, 0.0], [0.0, nan], [-inf, -inf], [0.0, 0.0], [0.0, 0.0]]
    for unimix in (0.0, 0.01):
        got = drawn(undefined, [[0.0, 0.0]] * 4 + [[nan, 0.0], [0.0, 1.0]], unimix)
        assert got.isnan().all(1).tolist() == [True] * 5 + [False]


def check_borders() -> None:
    """Class k has [Σ_{j<k} p, Σ_{j≤k} p), the last all that rounding leaves; NaN as in eager."""
    from fastdreamer.ops.triton.build import _categoricals
    from fastdreamer.ops.triton.categorical import sample_kernel
    from fastdreamer.ops.triton.layout import Classes

    def drawn(logits: list | torch.Tensor, noise: list, unimix: float = 0.0) -> torch.Tensor:
        logits, noise = (torch.as_tensor(x, device=test_triton.DEVICE) for x in (logits, noise))
        items, K = logits.shape
        got = torch.full_like(logits, -9.0)
        _, blocks = _categoricals(Classes(K, unimix), logits.numel())
        sample_kernel[(-(-items // blocks["BI"]),)](
            logits.contiguous(), noise, got, items, 1.0 - unimix, unimix / K, **blocks
        )
        want = OneHot(logits[:, None], unimix).sample(noise[:, None])
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        return got

    nan = torch.nan
    quarters = [0.0, 0.25, 0.5, 0.75, 0.9999999]
    assert drawn(torch.zeros(5, 4), quarters).argmax(1).tolist() == [0, 1, 2, 3, 3]
    drawn(torch.zeros(5, 4), [x + 1e-3 for x in quarters[:4]] + [nan], 0.01)
    none = [[-inf, 0.0, -inf, 0.0]] * 4
    assert drawn(none, [0.0, 0.4, 0.5, 0.9999]).argmax(1).tolist() == [1, 1, 3, 3]
    assert drawn(none, [0.1, 0.3, 0.9999, 0.6], 0.8).argmax(1).tolist() == [0, 1, 3, 2]
    drawn([[0.0, -300.0], [-300.0, -301.0], [88.0, 89.0]], [0.5, 0.9, 0.1])
    undefined = drawn([[0.0, inf], [nan, 0.0], [0.0, nan], [-inf, -inf], [0.0, 0.0]], [0.5] * 5)
    assert undefined.isnan().all(1).tolist() == [True] * 4 + [False]
    for classes in (1, 3, 33, 300):
        drawn(torch.zeros(2, classes), [0.0, 1 - 2.0**-24])


def built(op: str, sizes: Sizes, steps: int, rows: int, blocks: int | None, *rest, **style) -> dict:
    """Arguments of an op for a model with the block-diagonal GRU, or with layers apart."""
    inputs = make_inputs(op, sizes, steps, rows, rest or (1, 2))
    return on_device(test_blocks_native.Style(blocks, **style).apply(OPS[op], inputs))


def check_block_gru() -> None:
    """Blocks of one part and of many, with a norm, another or none, with a bias or not.

    One layer and several of each kind, one of x; both orders of columns; rows in several blocks.
    """
    from fastdreamer.ops.triton import blocks

    sizes, one_hot = SMALL._replace(D=22, S=15), Categorical(5, 0.01)
    inputs = built("observe", sizes, 2, 3, 2, latent=one_hot, features=(9, 20), depth=2)
    inputs["is_first"][1, 2] = True
    check("observe", inputs)
    wide = WIDE._replace(D=70)
    with mock.patch.object(blocks, "COLUMNS", 32):
        style = {"kind": "layer", "bias": False, "features": (20, 70), "apart": ((35, 17), (18,))}
        check("imagine", built("imagine", wide, 1, 17, 2, action_first=True, **style))
        plain = {"kind": None, "deter_first": False, "update_bias": 0.5, "apart": None}
        inputs = built("imagine", wide, 2, 1, 5, act="silu", **plain)
        inputs["actor"] = inputs["actor"]._replace(through_feat=True)
        check("imagine", inputs)
    check("rssm_step", built("rssm_step", sizes, 1, 3, 11, depth=0, kind=None, act="gelu"))
    for output in ("out[0].deter", "out[1].std"):
        check("rssm_step", built("rssm_step", sizes, 1, 2, 1), using=(output,))
    test_triton.check_overall_of(
        "observe", built("observe", Sizes(3, 64, 12, 48, 64, 64, 2, 3, 4, "elu"), 4, 8, 4)
    )


def check_block_gru_without_gradients() -> None:
    sizes, latent = SMALL._replace(D=22, S=15), Categorical(5, 0.01, gumbel=True)
    style = test_blocks_native.Style(2, latent=latent)
    inputs = on_device(style.apply(OPS["cem"], testing.cem_inputs(sizes, 2, 1, 9, 2)))
    check("cem", inputs | {"num_elites": 9}, wrt=())
    inputs = on_device(style.apply(decide, testing.decide_inputs(sizes, 2)))
    found = (decide(**inputs, backend=backend) for backend in ("triton", "eager"))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def check_starts_of_a_block_gru() -> None:
    """What begins an episode: zeros in the place of some, a learned start; actions bounded."""
    sizes, latent = SMALL._replace(D=22, S=15), Categorical(5, 0.01, gumbel=True)
    for reset, learned in (("all", False), ("state", True), ("stoch", False), ("deter", True)):
        inputs = built("observe", sizes, 3, 3, 2, latent=latent if learned else None, kind="layer")
        inputs["is_first"][0, 1] = inputs["is_first"][2, 2] = True
        inputs |= {"reset": reset, "action": 3 * inputs["action"]}
        params = inputs["params"]._replace(bound_action=True)
        if learned:
            params = params._replace(
                begin=Begin(torch.linspace(-2, 2, 22, device=inputs["action"].device))
            )
        check("observe", inputs | {"params": params})


def check_layers_apart() -> None:
    """Before torch's GRU and before the one of DreamerV2, with its norm and without.

    Gradients of weights in parts, which only many rows have.
    """
    from fastdreamer.ops.triton import build

    check("observe", built("observe", SMALL, 2, 3, None, apart=((7, 18), (5,))))
    apart = {"kind": "layer", "apart": ((35,), (3, 18)), "action_first": True}
    check("imagine", built("imagine", WIDE, 2, 17, 0, deter_first=False, **apart))
    inputs = built("rssm_step", SMALL, 1, 35, 0, kind="layer")
    gru = inputs["params"].gru._replace(norm=None, bias=None, gates="ucr")
    with mock.patch.object(build.Builder, "_splits", each_block):
        check("rssm_step", inputs | {"params": inputs["params"]._replace(gru=gru)})
    inputs = built("open_loop", SMALL._replace(units=64, D=64), 2, 17, None, bias=False, kind=None)
    check("open_loop", inputs, bf16=True)


def test_a_learned_start_has_its_gradient_in_parts():
    """Of few columns: one program after another would read all rows."""
    from fastdreamer.ops.triton import before, layout, weights
    from fastdreamer.ops.triton import observe as module
    from fastdreamer.ops.triton.build import Precision

    params, _, _ = testing.make_params(SMALL)
    spec = module._Spec(
        50, 50, Precision(True, 90), layout.step_shape(params, posterior=True),
        layout.prior_shape(params), layout.embed_shape(params), True, True, ("deter", "stoch"),
    )  # fmt: skip
    wants = module._Wants(False, False, False)
    launches = module.backward_program(spec, wants, frozenset({"deter"})).body
    found = [x for x in launches if isinstance(x, Launch)]
    kernels = [x.kernel.fn for x in found]
    assert kernels[-4:] == [before.begin_gradient_kernel, weights.sum_kernel] * 2
    assert [x.grid for x in found[-4::2]] == [(1, 20, 1)] * 2  # 128 of 2500 rows each


def test_a_block_of_a_row_has_a_column_for_each_thread():
    """A gradient that is loaded and stored in its place is one thread's alone."""
    from fastdreamer.ops.triton import blocks, layout
    from fastdreamer.ops.triton import observe as module
    from fastdreamer.ops.triton.build import Precision

    inputs = make_inputs("observe", SMALL._replace(D=64), 2, 3)
    params = test_blocks_native.Style(2).apply(observe, inputs)["params"]
    step = layout.step_shape(params, posterior=True)
    assert [layer.width for layer in step.layers] == [64, 192]
    spec = module._Spec(
        2, 3, Precision(False, 90), step, layout.prior_shape(params), layout.embed_shape(params),
        True, True,
    )  # fmt: skip
    wants, given = module._Wants(True, True, True), frozenset(module.outputs(step))
    programs = module.forward_program(spec), module.backward_program(spec, wants, given)
    kernels = {
        *(blocks.activation_kernel, blocks.activation_backward_kernel),
        *(blocks.gates_kernel, blocks.gates_backward_kernel),
    }
    launches = [launch for program in programs for launch, _ in program.launches()]
    found = [launch.kernel for launch in launches if launch.kernel.fn in kernels]
    assert {kernel.fn for kernel in found} == kernels
    assert all(kernel.constants["BN"] >= 32 * kernel.options["num_warps"] for kernel in found)


QUICK = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_") and name not in ("check_borders", "check_ties")
}


@pytest.mark.parametrize("name", QUICK)
def test_under_the_interpreter(name):
    assert test_triton.run_self(name, __file__) == "triton"


if __name__ == "__main__":
    test_triton.main(QUICK, sys.argv[1])
