"""``encode`` and ``decode_error``: all that an update does with images, forward and backward."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks import compiled, flops, subpixel
from benchmarks.race import Case
from benchmarks.variants import OURS
from fastdreamer import testing
from fastdreamer.ops.codec import DECODE_ERROR, decode_error, encode

N = 400  # images: a batch of 8 × 50, preset report


class Seen(NamedTuple):
    """What an update needs of its images."""

    embed: Tensor  # [N, E]
    error: Tensor  # a scalar


def inputs(N: int) -> dict[str, Any]:
    """Parameters of both stacks, images and features.

    Few units are near their ReLU's kink, where a variant's rounding would switch a gradient.
    """
    by_op = testing.codec_inputs(testing.REPORT_CODEC, N, smooth=True)
    return {
        "params": (by_op["encode"]["params"], by_op["decode"]["params"]),
        "pixels": by_op["encode"]["pixels"],
        "feat": by_op["decode"]["feat"],
    }


def _call(*, params: Any, pixels: Tensor, feat: Tensor, backend: str) -> Seen:
    encoder, decoder = params
    embed = encode(encoder, pixels, backend=backend)
    native = functools.partial(decode_error, backend=backend)
    error = (native if backend in OURS else subpixel.decode_error)(decoder, feat, pixels)
    # float32 for the gate; under autocast an embedding is bfloat16
    return Seen(embed.to(feat.dtype), error / N)


def _compiled(*, params: Any, pixels: Tensor, feat: Tensor) -> Seen:
    encoder, decoder = params
    embed = compiled.encode(encoder, pixels)
    return Seen(embed.to(feat.dtype), compiled.decode_error(decoder, feat, pixels) / N)


def _leaves(x: dict[str, Any]) -> list[list[Tensor]]:
    return [[t for t in pytree.tree_leaves(x["params"]) if isinstance(t, Tensor)], [x["feat"]]]


def _cases() -> list[Case]:
    params = inputs(1)["params"]
    case = functools.partial(
        Case,
        op=DECODE_ERROR,
        inputs=functools.partial(inputs, N),
        call=_call,
        compiled=_compiled,
    )
    return [
        case(name="encode + decode", flops=flops.codec(*params, N)),
        case(
            name="encode + decode + backward",
            flops=flops.codec(*params, N, backward=True),
            leaves=_leaves,
        ),
    ]


CASES = _cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_codec(contest, case: Case) -> None:
    contest(case)
