"""What today's Dreamers are made of as Triton kernels, under Triton's interpreter.

Values and all gradients against eager float64; see test_triton.py, whose checks these continue.
"""

import sys

import pytest
import test_triton
import torch
from test_native import make_inputs
from test_normed_native import Style
from test_triton import OPS, cem_inputs, check, on_device

from fastdreamer.ops.layers import MLPParams, Norm
from fastdreamer.testing import Sizes

# remainders of every block; several blocks of columns; two blocks of rows
SMALL = Sizes(3, 21, 5, 7, 17, 19, 1, 2, 1, "silu", 20)
WIDE = Sizes(2, 35, 17, 33, 70, 35, 1, 0, 1, "elu", 40)
ROWS = Sizes(1, 7, 3, 2, 5, 18, 1, 1, 1, "tanh")


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


def check_mixed_norms() -> None:
    """Layers of different widths, one with a norm and one without; a weight without a bias."""
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


def check_statistics() -> None:
    """A mean far from zero, a variance of nearly nothing; what autocast rounds is as rounded."""
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


QUICK = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_")
}


@pytest.mark.parametrize("name", QUICK)
def test_under_the_interpreter(name):
    assert test_triton.run_self(name, __file__) == "triton"


if __name__ == "__main__":
    test_triton.main(QUICK, sys.argv[1])
