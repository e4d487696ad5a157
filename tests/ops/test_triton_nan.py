"""A NaN in a state, an action or a weight reaches, through the Triton kernels, what it reaches in
eager: under Triton's interpreter, in a process of its own.
"""

import math
import sys

import forked
import pytest
import torch
from test_blocks_native import Style

from fastdreamer import testing
from fastdreamer.ops.cem import cem
from fastdreamer.ops.observe import observe
from fastdreamer.ops.params import Branches, Categorical, OneHot, RSSMParams, StdTransform
from fastdreamer.ops.rssm_step import rssm_step

nan = math.nan
SMALL = testing.Sizes(A=2, D=20, S=6, E=24, hidden=24, units=24, reward_layers=1, critic_layers=1,
                      actor_layers=1, activation="elu")  # fmt: skip
CASES = (
    ("deter", StdTransform("softplus")),
    ("stoch", StdTransform("sigmoid", floor=0.3)),
    ("action", StdTransform("exp")),
    ("weight", StdTransform("softplus")),
    ("deter", Categorical(3, 0.01)),
    ("stoch", Categorical(2, 0.01, gumbel=True)),
    ("action", Categorical(3, gumbel=True)),
    ("weight", Categorical(2, 0.01, gumbel=True)),
)
"""Where it is, and what the latents are."""


def with_nan(inputs: dict, where: str) -> dict:
    """A step's inputs with NaN in the second row of a state or action, or in a weight."""
    if where == "weight":
        first_weight(inputs["params"])[3, 1] = nan
    elif where == "action":
        inputs["action"][1, 0] = nan
    else:
        getattr(inputs["state"], where)[1, 0] = nan
    return inputs


def first_weight(params: RSSMParams) -> torch.Tensor:
    """Of the layers of stoch, or of stoch and action."""
    inp = params.inp
    return (inp.stoch if isinstance(inp, Branches) else inp).weights[0]


def values_and_gradients(inputs: dict, backend: str) -> tuple[list[torch.Tensor], ...]:
    weight, (deter, stoch) = first_weight(inputs["params"]), inputs["state"]
    by = [x.requires_grad_() for x in (deter, stoch, inputs["action"], weight)]
    state, prior = rssm_step(**inputs, backend=backend)
    values = [*state, *([prior.logits.flatten(-2)] if isinstance(prior, OneHot) else prior)]
    # one-hot vectors all have the same sum
    loss = sum((x * torch.linspace(-1, 2, x.shape[-1])).sum() for x in values)
    return [x.detach() for x in values], list(torch.autograd.grad(loss, by))


def check_step(activation: str) -> None:
    """In the values the same elements are NaN; a row without one has eager's gradients."""
    sizes = SMALL._replace(activation=activation)
    for where, latent in CASES:
        inputs = testing.rssm_step_inputs(sizes, 3)
        if isinstance(latent, Categorical):
            inputs = testing.away_from_borders(rssm_step, testing.categorical(inputs, latent))
        inputs["params"] = inputs["params"]._replace(latent=latent)
        compare(with_nan(inputs, where), where, activation)


def check_stages() -> None:
    """The same of the block-diagonal GRU, and of torch's behind layers of stoch and action apart.

    Of a filter: a NaN where an episode begins is zeroed with the state or action that it is in.
    """
    deep, plain = Style(4, kind="layer", features=(9, 5), depth=2), Style(kind=None)
    for style, *places in ((deep, "deter", "weight"), (Style(2), "action"), (plain, "stoch")):
        for where in places:
            inputs = style.apply(rssm_step, testing.rssm_step_inputs(SMALL, 3))
            compare(with_nan(inputs, where), where, "stages")
    inputs = Style(2).apply(rssm_step, testing.rssm_step_inputs(SMALL, 3))
    inputs["params"].gru.blocks.weights[0][1, 0, 0] = nan  # through a norm, so everywhere
    compare(inputs, "weight", "blocks")
    clean = Style(2).apply(observe, testing.observe_inputs(SMALL, 2, 3))
    clean["is_first"] = torch.tensor([[False, True, False], [False, False, True]])
    seen = clean | {name: clean[name].clone() for name in ("embed", "action")}
    seen["action"][0, 1] = seen["embed"][0, 2] = nan  # where an episode begins; before one does
    want, got = (observe(**inputs, backend="triton") for inputs in (clean, seen))
    assert torch.equal(got.state.deter, want.state.deter)
    assert got.state.stoch[0, 2].isnan().all() and got.state.stoch.isnan().sum() == SMALL.S


def compare(inputs: dict, where: str, label: str) -> None:
    """In the values the same elements are NaN; a row without one has eager's gradients."""
    eager, triton = (values_and_gradients(inputs, b) for b in ("eager", "triton"))
    rows = [True] * 3 if where == "weight" else [False, True, False]
    for ours, theirs in zip(triton[0], eager[0], strict=True):
        assert ours.isnan().all(1).tolist() == rows, f"{label}, NaN in {where}: {ours}"
        assert torch.equal(ours.isnan(), theirs.isnan())
    *by_rows, by_weight = triton[1]
    for ours, theirs in zip(by_rows, eager[1], strict=False):
        assert ours.isnan().any(1).tolist() == rows, f"{label}, NaN in {where}: {ours}"
        assert theirs.isnan().any(1).tolist() == rows
        torch.testing.assert_close(ours[::2], theirs[::2], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert by_weight.isnan().any()


def check_cem(activation: str) -> None:
    """A candidate whose action is NaN is scored NaN and is never an elite."""
    inputs = testing.cem_inputs(SMALL._replace(activation=activation), 2, 1, 6, 1)
    inputs["num_elites"] = 3
    inputs["action_noise"][0, 0, 0, 1, 0] = nan
    plans = {b: cem(**inputs, backend=b) for b in ("eager", "triton")}
    for name in ("mean", "std", "scores"):
        eager, triton = (getattr(plans[b], name) for b in ("eager", "triton"))
        assert torch.equal(triton.isnan(), eager.isnan()), (activation, name)
        torch.testing.assert_close(triton, eager, rtol=1e-4, atol=1e-5, equal_nan=True)
    scores = plans["triton"].scores
    assert scores.isnan().sum() == 1 and scores[0, 0, 1].isnan()
    assert plans["triton"].mean.isfinite().all()


@pytest.mark.parametrize("activation", ["elu", "relu", "silu", "tanh", "stages"])
def test_nan(activation):
    done = forked.run(__file__, activation, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    from interpreter import correct_minimum

    correct_minimum()
    if sys.argv[1] == "stages":
        check_stages()
    else:
        check_step(sys.argv[1])
        check_cem(sys.argv[1])
