"""Native bodies of :mod:`fastdreamer.ops.codec`: one autograd node a stack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdreamer import _native
from fastdreamer.ops.native.packs import arrays, asked_bf16, autocast_bf16, cached, first_order
from fastdreamer.ops.params import DecoderParams, EncoderParams


def encode(params: EncoderParams, pixels: Tensor) -> Tensor:
    """See ``fastdreamer.ops.codec``."""
    bf16 = autocast_bf16()
    tensors = (*params.weights, *params.biases, *(params.linear or ()))
    if torch.is_grad_enabled() and any([t.requires_grad for t in tensors]):
        embed = _Encode.apply(bf16, len(params.weights), pixels, *tensors)
    else:
        embed = _encode(bf16, len(params.weights), pixels, tensors, keep=False)[0]
    # as on every machine, also where the core computes in float32 all the same
    return embed.bfloat16() if asked_bf16() else embed


def decode(params: DecoderParams, feat: Tensor) -> Tensor:
    """See ``fastdreamer.ops.codec``."""
    return _decode(params, feat, None)


def decode_error(params: DecoderParams, feat: Tensor, target: Tensor) -> Tensor:
    """See ``fastdreamer.ops.codec``."""
    return _decode(params, feat, target)


def _decode(params: DecoderParams, feat: Tensor, target: Tensor | None) -> Tensor:
    tensors = (*params.weights, *params.biases, *params.linear)
    given = (autocast_bf16(), params.linear_relu, feat, target, *tensors)
    if torch.is_grad_enabled() and any([t.requires_grad for t in (feat, *tensors)]):
        return _Decode.apply(*given)
    return _run_decoder(*given[:4], tensors, keep=False)[0]


def _stack(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Weights as the core has them, [coarse, k, k, fine]: of channels_last ones a view."""
    return [t.detach().permute(0, 2, 3, 1).contiguous() for t in tensors]


def _encode(
    bf16: bool, depth: int, pixels: Tensor, tensors: tuple[Tensor, ...], *, keep: bool
) -> tuple[Tensor, Any]:
    def make(gradients: bool) -> Any:
        weights, biases, linear = tensors[:depth], tensors[depth : 2 * depth], tensors[2 * depth :]
        return _native.PackedEncoder(
            arrays(*_stack(weights)),
            arrays(*[t.contiguous() for t in biases]),
            *(arrays(*[t.contiguous() for t in linear]) or (None, None)),
            bf16,
            gradients,
            torch.get_num_threads(),
        )

    pack = cached(("encoder", bf16), tensors, keep, make)
    last = tensors[-2] if len(tensors) > 2 * depth else None
    size = len(last) if last is not None else _flat_size(tensors[:depth], pixels)
    embed = pixels.new_empty(len(pixels), size, dtype=torch.bfloat16 if bf16 else torch.float32)
    tape = _native.encode_forward(pack, pixels.numpy(), _bits(embed), keep, torch.get_num_threads())
    return embed, tape


def _flat_size(weights: tuple[Tensor, ...], pixels: Tensor) -> int:
    height, width = pixels.shape[1:3]
    for weight in weights:
        k = weight.shape[2]
        height, width = (height - k) // 2 + 1, (width - k) // 2 + 1
    return len(weights[-1]) * height * width


def _bits(tensor: Tensor) -> Any:
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _new_gradients(tensors: tuple[Tensor, ...], depth: int) -> tuple[list[Tensor], tuple]:
    """Gradients in their parameters' layouts, and how the core takes them: weights, biases and the
    linear layer's two, or Nones."""
    news, given = [], []
    for i, tensor in enumerate(tensors):
        if i < depth:  # [coarse, fine, k, k], channels_last
            memory = tensor.new_empty([tensor.shape[d] for d in (0, 2, 3, 1)])
            news.append(memory.permute(0, 3, 1, 2))
        else:
            memory = tensor.new_empty(tensor.shape)
            news.append(memory)
        given.append(memory)
    linear = arrays(*given[2 * depth :]) or [None, None]
    return news, (arrays(*given[:depth]), arrays(*given[depth : 2 * depth]), *linear)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bf16, depth, pixels, *tensors):
        embed, ctx.tape = _encode(bf16, depth, pixels, tensors, keep=True)
        ctx.depth = depth
        # the tape points into pixels; saved, so that autograd refuses if anything is changed
        ctx.save_for_backward(pixels, *tensors)
        return embed

    @staticmethod
    @first_order
    def backward(ctx, grad):
        _, *tensors = ctx.saved_tensors
        news, given = _new_gradients(tuple(tensors), ctx.depth)
        _native.encode_backward(ctx.tape, _bits(grad.contiguous()), *given, torch.get_num_threads())
        return None, None, None, *news


def _run_decoder(
    bf16: bool,
    linear_relu: bool,
    feat: Tensor,
    target: Tensor | None,
    tensors: tuple[Tensor, ...],
    *,
    keep: bool,
) -> tuple[Tensor, Any]:
    depth = (len(tensors) - 2) // 2
    weights, biases, linear = tensors[:depth], tensors[depth : 2 * depth], tensors[2 * depth :]

    def make(gradients: bool) -> Any:
        return _native.PackedDecoder(
            arrays(*_stack(weights)),
            arrays(*[t.contiguous() for t in biases]),
            *arrays(*[t.contiguous() for t in linear]),
            linear_relu,
            bf16,
            gradients,
            torch.get_num_threads(),
        )

    pack = cached(("decoder", bf16, linear_relu), tensors, keep, make)
    pixels = None
    if target is None:
        side = 1
        for weight in weights:
            side = 2 * (side - 1) + weight.shape[2]
        pixels = feat.new_empty(len(feat), side, side, weights[-1].shape[1])
    tape, error = _native.decode_forward(
        pack, *arrays(feat, pixels, target), keep, torch.get_num_threads()
    )
    return (feat.new_tensor(error) if pixels is None else pixels), tape


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bf16, linear_relu, feat, target, *tensors):
        out, ctx.tape = _run_decoder(bf16, linear_relu, feat, target, tensors, keep=True)
        ctx.fused = target is not None
        kept = (feat, *tensors) if target is None else (feat, *tensors, target)
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    @first_order
    def backward(ctx, grad):
        feat, *tensors = ctx.saved_tensors[: -1 if ctx.fused else None]
        needs = ctx.needs_input_grad
        d_feat = torch.empty_like(feat) if needs[2] else None
        news, given = [None] * len(tensors), (None, None, None, None)
        if any(needs[4:]):
            news, given = _new_gradients(tuple(tensors), (len(tensors) - 2) // 2)
        _native.decode_backward(
            ctx.tape,
            *((None, grad.item()) if ctx.fused else (grad.contiguous().numpy(), 1.0)),
            *arrays(d_feat),
            *given,
            torch.get_num_threads(),
        )
        return None, None, d_feat, None, *news
