"""The decoder by PyTorch as fast as we know how: what stands for eager in every comparison.

Its library's transposed convolution of stride 2 is slow on a CPU. Each of the four parities of
output rows and columns is an ordinary convolution, so one of those does it (Shi et al. 2016, "Is
the deconvolution layer the same as a convolutional layer?"), and the gradient of the bias is a sum.
Both functions have the arguments of the eager bodies of their ops; ``test_tools.py`` holds them to
those.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from fastdreamer.ops.codec import pixels_to_float
from fastdreamer.ops.params import DecoderParams


def decode(params: DecoderParams, feat: Tensor) -> Tensor:
    x = F.linear(feat, *params.linear)
    x = F.relu(x) if params.linear_relu else x
    # [in, k, k, out], so that the result is channels_last
    weight = params.weights[0].permute(0, 2, 3, 1)
    x = ((x @ weight.flatten(1)).unflatten(1, weight.shape[1:]) + params.biases[0]).permute(
        0, 3, 1, 2
    )
    for weight, bias in zip(params.weights[1:], params.biases[1:], strict=True):
        args = F.relu(x), weight, bias
        if torch.is_autocast_enabled("cpu"):  # does not reach into a Function's backward
            args = tuple(tensor.to(torch.get_autocast_dtype("cpu")) for tensor in args)
        x = _TransposedConvolution.apply(*args)
    return x.permute(0, 2, 3, 1).to(feat.dtype)


def decode_error(params: DecoderParams, feat: Tensor, target: Tensor) -> Tensor:
    mean = decode(params, feat)
    return F.mse_loss(mean, pixels_to_float(target, feat.dtype), reduction="sum")


class _TransposedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _subpixel_convolution(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        *needed, bias_needed = ctx.needs_input_grad
        dx, dw, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1, [*needed, False]
        )
        return dx, dw, grad.sum((0, 2, 3)) if bias_needed else None


def _subpixel_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [N, in, h, w], weight [in, out, k, k] -> [N, out, 2h − 2 + k, 2w − 2 + k].

    In one dimension y[2i + a] = Σ_j weight[2j + a] · x[i − j]: for each parity a an ordinary
    convolution with every other tap, reversed. An odd kernel gets a zero tap, and the row and
    column which that adds are cropped.
    """
    size, k = weight.shape[:2], weight.shape[2]
    taps = (k + 1) // 2
    weight = F.pad(weight, (0, k % 2, 0, k % 2)).view(*size, taps, 2, taps, 2).flip(2, 4)
    weight = weight.permute(3, 5, 1, 0, 2, 4).reshape(4 * size[1], size[0], taps, taps)
    weight = weight.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x, weight, bias.repeat(4), padding=taps - 1)  # [N, 2·2·out, h', w']
    y = y.permute(0, 2, 3, 1).unflatten(3, (2, -1))  # [N, h', w', 2, 2·out]
    y = y.transpose(2, 3).reshape(len(y), 2 * y.shape[1], 2 * y.shape[2], size[1])
    return y[:, : y.shape[1] - k % 2, : y.shape[2] - k % 2].permute(0, 3, 1, 2)
