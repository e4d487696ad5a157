"""``encode``, ``decode`` and ``decode_error``: all that an update does with images."""

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
from fastdreamer.ops.codec import DECODE, DECODE_ERROR, ENCODE, decode, decode_error, encode

N = 400  # images: a batch of 8 × 50, preset report


class Seen(NamedTuple):
    """What an update needs of its images."""

    embed: Tensor  # [N, E]
    error: Tensor  # a scalar


# Few units are near their ReLU's kink, where a variant's rounding would switch a gradient. Results
# are float32 for the gate; under autocast an embedding is bfloat16.


def inputs(op: str, N: int) -> dict[str, Any]:
    """Arguments of one op, or with "both" of encoder and decoder together."""
    by_op = testing.codec_inputs(testing.REPORT_CODEC, N, smooth=True)
    if op != "both":
        return by_op[op]
    return {
        "params": (by_op["encode"]["params"], by_op["decode"]["params"]),
        "pixels": by_op["encode"]["pixels"],
        "feat": by_op["decode"]["feat"],
    }


def _encode(*, params: Any, pixels: Tensor, backend: str) -> Tensor:
    return encode(params, pixels, backend=backend).float()


def _encode_compiled(*, params: Any, pixels: Tensor) -> Tensor:
    return compiled.encode(params, pixels).float()


# PyTorch's own decoder is slow on a CPU; on a GPU it is cuDNN's.


def _decode(*, params: Any, feat: Tensor, backend: str) -> Tensor:
    if backend in OURS or feat.device.type != "cpu":
        return decode(params, feat, backend=backend)
    return subpixel.decode(params, feat)


def _error(*, params: Any, feat: Tensor, target: Tensor, backend: str) -> Tensor:
    if backend in OURS or feat.device.type != "cpu":
        return decode_error(params, feat, target, backend=backend)
    return subpixel.decode_error(params, feat, target)


def _both(*, params: Any, pixels: Tensor, feat: Tensor, backend: str) -> Seen:
    error = _error(params=params[1], feat=feat, target=pixels, backend=backend)
    return Seen(_encode(params=params[0], pixels=pixels, backend=backend), error / len(feat))


def _both_compiled(*, params: Any, pixels: Tensor, feat: Tensor) -> Seen:
    error = compiled.decode_error(params[1], feat, pixels)
    return Seen(_encode_compiled(params=params[0], pixels=pixels), error / len(feat))


def _leaves(x: dict[str, Any]) -> list[list[Tensor]]:
    held = [x["params"], x.get("feat")]
    return [[t for t in pytree.tree_leaves(held) if isinstance(t, Tensor)]]


def _cases() -> list[Case]:
    encoder, decoder = inputs("both", 1)["params"]
    both = functools.partial(
        Case,
        op=DECODE_ERROR,
        inputs=functools.partial(inputs, "both", N),
        call=_both,
        compiled=_both_compiled,
    )
    return [
        Case(
            "encode + backward",
            ENCODE,
            functools.partial(inputs, "encode", N),
            flops.codec(encoder, None, N, backward=True),
            _encode,
            _encode_compiled,
            leaves=_leaves,
        ),
        Case(
            "decode + backward",
            DECODE,
            functools.partial(inputs, "decode", N),
            flops.codec(None, decoder, N, backward=True),
            _decode,
            compiled.decode,
            leaves=_leaves,
        ),
        both(name="encode + decode_error", flops=flops.codec(encoder, decoder, N)),
        both(
            name="encode + decode_error + backward",
            flops=flops.codec(encoder, decoder, N, backward=True),
            leaves=_leaves,
        ),
    ]


CASES = _cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_codec(contest, case: Case) -> None:
    contest(case)
