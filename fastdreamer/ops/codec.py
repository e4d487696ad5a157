"""Encoder and decoder of images: convolutions of stride 2, and transposed ones back.

Three ops: :func:`encode`, :func:`decode`, and :func:`decode_error`, which is the decoder and the
squared error of what it shows in one, so that a compiled body need not keep the images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdreamer.ops.backend import Op
from fastdreamer.ops.checks import check_tensor
from fastdreamer.ops.params import DecoderParams, EncoderParams


def encode(params: EncoderParams, pixels: Tensor, *, backend: str | None = None) -> Tensor:
    """Embed images.

    Args:
        params: the stack's tensors, of one floating dtype and device.
        pixels: [N, height, width, channels] uint8; the network sees x/255 − 0.5.
        backend: see ``fastdreamer.ops.backend``.

    Returns:
        [N, E] in the parameters' dtype, under autocast in autocast's (native knows bfloat16's
        alone). Without a linear layer E is the last convolution's output in the order channels,
        height, width.

    Raises:
        TypeError: not a tensor. ValueError: a shape, dtype or device does not fit. BackendError: an
        explicitly chosen backend cannot run.

    Source: report section 2 (the representation model's encoder).
    """
    like = params.weights[0]
    channels = like.shape[1]
    _check_stack("encode", params.weights, params.biases, transposed=False)
    check_tensor(
        "encode", "pixels", pixels, ("N", "height", "width", channels), {}, dtype=torch.uint8
    )
    size = tuple(pixels.shape[1:3])
    for weight in params.weights:
        size = tuple((n - weight.shape[2]) // 2 + 1 for n in size)
        if min(size) < 1:
            raise ValueError(f"encode: pixels {list(pixels.shape)} are too small for the kernels")
    if params.linear is not None:
        flat = params.weights[-1].shape[0] * size[0] * size[1]
        _check_linear("encode", params.linear, flat, like)
    depth, lacking = len(params.weights), _lacking(params.weights)
    # bytes say nothing of the networks' dtype and device, a bias does, of whatever strides
    given = (pixels, params.biases[0].contiguous())
    return ENCODE.select(backend, *given, depth=depth, lacking=lacking)(params, pixels)


def decode(params: DecoderParams, feat: Tensor, *, backend: str | None = None) -> Tensor:
    """Show what features stand for: the means of unit-variance Normals over images.

    Args:
        params: the stack's tensors, of one floating dtype and device.
        feat: [N, F] of the same.
        backend: see ``fastdreamer.ops.backend``.

    Returns:
        [N, height, width, channels] in x/255 − 0.5, in the features' dtype.

    Raises:
        TypeError: not a tensor. ValueError: a shape, dtype or device does not fit. BackendError: an
        explicitly chosen backend cannot run.

    Source: report section 2 (the observation model).
    """
    _check_decoder("decode", params, feat)
    depth, lacking = len(params.weights), _lacking(params.weights, least=2)
    return DECODE.select(backend, feat, depth=depth, lacking=lacking)(params, feat)


def decode_error(
    params: DecoderParams, feat: Tensor, target: Tensor, *, backend: str | None = None
) -> Tensor:
    """Σ (decode(feat) − target)² over images, pixels and channels.

    Args:
        params, feat, backend: of :func:`decode`.
        target: [N, height, width, channels] uint8; it stands for x/255 − 0.5.

    Returns:
        A scalar in the features' dtype: twice the negative log-likelihood up to a constant.

    Raises:
        TypeError: not a tensor. ValueError: a shape, dtype or device does not fit. BackendError: an
        explicitly chosen backend cannot run.
    """
    dims = _check_decoder("decode_error", params, feat)
    side, channels = 1, params.weights[-1].shape[1]
    for weight in params.weights:
        side = 2 * (side - 1) + weight.shape[2]
    shape = ("N", side, side, channels)
    check_tensor("decode_error", "target", target, shape, dims, dtype=torch.uint8)
    depth, lacking = len(params.weights), _lacking(params.weights, least=2)
    body = DECODE_ERROR.select(backend, feat, target, depth=depth, lacking=lacking)
    return body(params, feat, target)


def _check_stack(
    op: str, weights: tuple[Tensor, ...], biases: tuple[Tensor, ...], *, transposed: bool
) -> None:
    if not weights or len(weights) != len(biases):
        raise ValueError(f"{op}: {len(weights)} weights, {len(biases)} biases")
    channels, like = None, weights[0]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        sides = ("in", "out") if transposed else ("out", "in")
        dims = {} if channels is None else {"in": channels}
        check_tensor(op, f"weights[{i}]", weight, (*sides, "k", "k"), dims, like=like)
        check_tensor(op, f"biases[{i}]", bias, ("out",), dims, like=like)
        channels = dims["out"]


def _check_linear(op: str, linear: tuple[Tensor, Tensor], inputs: int, like: Tensor) -> int:
    dims: dict[str, int] = {}
    check_tensor(op, "linear[0]", linear[0], ("out", inputs), dims, like=like)
    check_tensor(op, "linear[1]", linear[1], ("out",), dims, like=like)
    return dims["out"]


def _check_decoder(op: str, params: DecoderParams, feat: Tensor) -> dict[str, int]:
    like, dims = params.linear[0], {}
    _check_stack(op, params.weights, params.biases, transposed=True)
    check_tensor(op, "feat", feat, ("N", "F"), dims, like=like)
    out = _check_linear(op, params.linear, dims["F"], params.weights[0])
    if out != params.weights[0].shape[0]:
        raise ValueError(
            f"{op}: the linear layer has {out} outputs, the first convolution takes "
            f"{params.weights[0].shape[0]}"
        )
    return dims


def _lacking(weights: tuple[Tensor, ...], least: int = 1) -> dict[str, str]:
    """What the core has no loop for; its convolutions are at most so large."""
    if len(weights) < least:
        return {"native": f"there is one convolution, native needs {least}"}
    try:
        from fastdreamer._native import MAX_KERNEL as most
    except ImportError:  # then it is not the kernel that keeps native from running
        return {}
    largest = max([weight.shape[2] for weight in weights])
    return {"native": f"a kernel of {largest}, native has {most}"} if largest > most else {}


def pixels_to_float(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [0, 255] -> [−0.5, 0.5] in a floating dtype; ValueError for any other input."""
    if pixels.dtype != torch.uint8:
        raise ValueError(f"pixels_to_float: pixels must be uint8, got {str(pixels.dtype)[6:]}")
    return pixels.to(dtype).div_(255).sub_(0.5)


def eager_encode(params: EncoderParams, pixels: Tensor) -> Tensor:
    # NHWC memory seen as NCHW is what PyTorch calls channels_last: no copy
    x = pixels_to_float(pixels, params.weights[0].dtype).permute(0, 3, 1, 2)
    for weight, bias in zip(params.weights, params.biases, strict=True):
        x = F.relu(F.conv2d(x, weight, bias, stride=2))
    x = x.flatten(1)
    return x if params.linear is None else F.linear(x, *params.linear)


def eager_decode(params: DecoderParams, feat: Tensor) -> Tensor:
    x = F.linear(feat, *params.linear)
    x = F.relu(x) if params.linear_relu else x
    # of one pixel the transposed convolution is a matrix product, and a library's slowest way to it
    weight, bias = params.weights[0], params.biases[0]
    x = (x @ weight.flatten(1)).unflatten(1, weight.shape[1:]) + bias[:, None, None]
    for weight, bias in zip(params.weights[1:], params.biases[1:], strict=True):
        x = F.conv_transpose2d(F.relu(x), weight, bias, stride=2)
    return x.permute(0, 2, 3, 1).to(feat.dtype)


def eager_decode_error(params: DecoderParams, feat: Tensor, target: Tensor) -> Tensor:
    # one pass over the images forward and one backward; as separate operations it is six
    target = pixels_to_float(target, feat.dtype)
    return F.mse_loss(eager_decode(params, feat), target, reduction="sum")


def _load(name: str) -> Callable:
    def load() -> Callable:
        from fastdreamer.ops.native import codec

        return getattr(codec, name)

    return load


# On a GPU cuDNN's convolutions are as fast as any: among Triton's loops the eager bodies run.
ENCODE = Op("encode", eager=eager_encode, native=_load("encode"), triton=lambda: eager_encode)
DECODE = Op("decode", eager=eager_decode, native=_load("decode"), triton=lambda: eager_decode)
DECODE_ERROR = Op(
    "decode_error",
    eager=eager_decode_error,
    native=_load("decode_error"),
    triton=lambda: eager_decode_error,
)
