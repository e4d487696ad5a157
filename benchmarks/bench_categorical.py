"""Categorical latents at DreamerV3's usual sizes: 32 of 32 classes, 16 sequences of 64.

Imagination with heads of one output, and with its two-hot heads of 255 bins.

Deterministic state, layers and actions are as wide as in torchrl's ``RSSMRolloutV3`` by default (an
embedding of 1024) and in dreamerv3-torch (of 4096), whose layers are normalised besides.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from benchmarks import bench_imagine, bench_observe, compiled, flops
from benchmarks.race import Case
from fastdreamer import testing
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.layers import MLPParams
from fastdreamer.ops.observe import OP, observe
from fastdreamer.ops.params import Categorical, Readout

T, B = 64, 16
H, ROWS = 15, 256  # imagined from a quarter of the states of such a batch
LATENT = Categorical(32, 0.01)
SIZES = testing.Sizes(6, 512, 32 * 32, 1024, 512, 512, 2, 2, 2, "silu")
OF = ", 32 × 32 classes"
BINS = Readout(torch.linspace(-20, 20, 255), squashed=True)  # those of dreamerv3-torch


def _seen(E: int) -> dict[str, Any]:
    return testing.categorical(testing.observe_inputs(SIZES._replace(E=E), T, B), LATENT)


def _dreamt(*, heads: bool, two_hot: bool = False) -> dict[str, Any]:
    x = testing.categorical(bench_imagine.inputs(H, ROWS, SIZES, heads=heads), LATENT)
    return _two_hot(x) if two_hot else x


@functools.cache  # found once: by a run in float64
def _observed(E: int) -> dict[str, Any]:
    return testing.away_from_borders(observe, _seen(E))


@functools.cache
def _imagined(*, heads: bool, two_hot: bool = False) -> dict[str, Any]:
    return testing.away_from_borders(imagine, _dreamt(heads=heads, two_hot=two_hot))


def _two_hot(x: dict[str, Any]) -> dict[str, Any]:
    """The arguments with reward and value in bins."""
    generator = torch.Generator().manual_seed(3)

    def widened(head: MLPParams) -> MLPParams:
        width = head.weights[-1].shape[1]
        weight = torch.randn(len(BINS.bins), width, generator=generator) / width**0.5
        weights = (*head.weights[:-1], weight)
        return head._replace(
            weights=weights, biases=(*head.biases[:-1], weight.new_zeros(len(weight)))
        )

    returns = x["returns"]
    heads = {name: widened(getattr(returns, name)) for name in ("reward", "critic")}
    return x | {"returns": returns._replace(**heads, reward_as=BINS, value_as=BINS)}


def _with_two_hot() -> list[Case]:
    """What an actor's update imagines."""
    make = functools.partial(_imagined, two_hot=True)
    cases = bench_imagine.cases(_dreamt(heads=True, two_hot=True), make, f"{OF}, two-hot")
    return [case for case in cases if case.name.startswith(("imagine + heads", "actor update"))]


def _observe(E: int, *, backward: bool) -> Case:
    count = flops.observe(_seen(E)["params"], T, B, backward=backward)
    name = f"observe{' + backward' * backward}{OF}, E {E}"
    leaves = bench_observe.leaves if backward else None
    inputs = functools.partial(_observed, E)
    return Case(name, OP, inputs, count, observe, compiled.observe, leaves=leaves)


CASES = [
    _observe(1024, backward=False),
    *(_observe(E, backward=True) for E in (1024, 4096)),
    *bench_imagine.cases(_dreamt(heads=True), _imagined, OF),
    *_with_two_hot(),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_categorical(contest, case: Case) -> None:
    contest(case)
