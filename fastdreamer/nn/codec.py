"""Observations to embeddings and features back to observations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from fastdreamer.nn.heads import MLP
from fastdreamer.ops.params import embed_vector


class Encoder(nn.Module):
    """Embed an observation of pixels, state, or both (concatenated).

    Args:
        obs_shapes: shape of each kind without batch, ``{"pixels": (64, 64, 3), "state": (n,)}``.
        channels: of the four convolutions (kernel 4, stride 2, ReLU): 64² to 31², 14², 6², 2².
        linear: size of a linear layer behind them, or None.
        units, layers: of the state MLP.
        activation: of the state MLP.
    """

    def __init__(
        self,
        obs_shapes: dict[str, tuple[int, ...]],
        *,
        channels: tuple[int, ...],
        linear: int | None,
        units: int,
        layers: int,
        activation: str,
    ) -> None:
        super().__init__()
        self.embed_size = 0
        self.convs = self.linear = self.state = None
        if "pixels" in obs_shapes:
            sizes = (3, *channels)
            self.convs = nn.ModuleList(
                nn.Conv2d(a, b, 4, stride=2) for a, b in zip(sizes[:-1], sizes[1:], strict=True)
            ).to(memory_format=torch.channels_last)
            flat = channels[-1] * 2 * 2
            if linear is not None:
                self.linear = nn.Linear(flat, linear)
            self.embed_size += linear or flat
        if "state" in obs_shapes:
            (n,) = obs_shapes["state"]
            self.state = MLP([n, *[units] * max(layers, 1)], activation)
            self.embed_size += units

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        """Embed observations.

        Args:
            obs: ``pixels`` [..., 64, 64, 3] uint8 and/or ``state`` [..., n] float.

        Returns:
            [..., E]; ``embed_size`` is E.
        """
        parts = []
        if self.convs is not None:
            parts.append(self.embed_pixels(obs["pixels"]))
        if self.state is not None:
            parts.append(embed_vector(self.state.params(), obs["state"]))
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """The images' part of the embedding, which comes first: [..., 64, 64, 3] -> [..., E]."""
        lead = pixels.shape[:-3]
        # NHWC memory seen as NCHW is what PyTorch calls channels_last: no copy.
        x = pixels_to_float(pixels)
        x = x.reshape(lead.numel(), *x.shape[-3:]).permute(0, 3, 1, 2)
        for conv in self.convs:
            x = F.relu_(conv(x))
        x = x.flatten(1)
        if self.linear is not None:
            x = self.linear(x)
        return x.reshape(*lead, x.shape[-1])


class Decoder(nn.Module):
    """Reconstruct what the encoder saw from feat.

    Args:
        feat_size: F.
        obs_shapes: as for the encoder.
        channels: between the four transposed convolutions (kernels 5 5 6 6, stride 2):
            1² -> 5² -> 13² -> 30² -> 64².
        linear: size of the linear layer before them.
        linear_relu: apply a ReLU behind it.
        units, layers, activation: of the state MLP.
    """

    def __init__(
        self,
        feat_size: int,
        obs_shapes: dict[str, tuple[int, ...]],
        *,
        channels: tuple[int, ...],
        linear: int,
        linear_relu: bool,
        units: int,
        layers: int,
        activation: str,
    ) -> None:
        super().__init__()
        self.linear_relu = linear_relu
        self.linear = self.convs = self.state = None
        if "pixels" in obs_shapes:
            self.linear = nn.Linear(feat_size, linear)
            sizes = zip((linear, *channels), (*channels, 3), (5, 5, 6, 6), strict=True)
            self.convs = nn.ModuleList(
                nn.ConvTranspose2d(a, b, k, stride=2) for a, b, k in sizes
            ).to(memory_format=torch.channels_last)
        if "state" in obs_shapes:
            (n,) = obs_shapes["state"]
            self.state = MLP([feat_size, *[units] * layers, n], activation)

    def forward(self, feat: Tensor) -> dict[str, Tensor]:
        """Means of the observations' unit-variance Normals.

        Args:
            feat: [..., F].

        Returns:
            ``pixels`` [..., 64, 64, 3], in x/255 − 0.5; ``state`` [..., n], in symlog units.
        """
        means = {}
        if self.convs is not None:
            lead = feat.shape[:-1]
            x = self.linear(feat.reshape(lead.numel(), feat.shape[-1]))
            if self.linear_relu:
                x = F.relu(x)
            x = _from_one_pixel(self.convs[0], x)
            for conv in self.convs[1:]:
                x = _conv_transpose2d(conv, F.relu(x))
            x = x.permute(0, 2, 3, 1)
            means["pixels"] = x.reshape(*lead, *x.shape[1:])
        if self.state is not None:
            means["state"] = self.state(feat)
        return means


def _from_one_pixel(conv: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """conv of a 1×1 image, x [N, in] -> [N, out, k, k]: one matrix product.

    The library's transposed convolution takes three times as long for it.
    """
    weight = conv.weight.permute(0, 2, 3, 1)  # [in, k, k, out], so that the result is channels_last
    y = (x @ weight.flatten(1)).unflatten(1, weight.shape[1:]) + conv.bias
    return y.permute(0, 3, 1, 2)


def _conv_transpose2d(conv: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """conv(x) and its gradients up to rounding, for a stride of 2 without padding.

    On the CPU by ``_TransposedConvolution``; a GPU's library needs no help.
    """
    if x.device.type != "cpu":
        return conv(x)
    args = x, conv.weight, conv.bias
    if torch.is_autocast_enabled("cpu"):  # does not reach into a Function's backward
        args = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in args)
    return _TransposedConvolution.apply(*args)


class _TransposedConvolution(torch.autograd.Function):
    """A transposed convolution of stride 2 from the parts that oneDNN is fast at.

    Forward by ``_subpixel_convolution``. Backward by the library's own transposed convolution: its
    gradients of input and weight are ordinary convolutions already, only that of the bias is slow
    (in bfloat16 it can take longer than the other two), so a sum takes its place.
    """

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

    In one dimension the transposed convolution is y[2i + a] = Σ_j weight[2j + a] · x[i − j]: for
    each parity a an ordinary convolution with every other tap, reversed. So one convolution with
    out channels per pair of parities, whose results are then interleaved (Shi et al. 2016, "Is the
    deconvolution layer the same as a convolutional layer?"). An odd kernel gets a zero tap, and
    the row and column which that adds are cropped.
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


def pixels_to_float(pixels: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [−0.5, 0.5]; ValueError for any other dtype."""
    if pixels.dtype != torch.uint8:
        raise ValueError(f"pixels_to_float: pixels must be uint8, got {str(pixels.dtype)[6:]}")
    return pixels.float().div_(255).sub_(0.5)


def float_to_pixels(x: Tensor) -> Tensor:
    """The inverse, clipped to what a pixel can hold."""
    return x.float().add(0.5).mul(255).round().clamp(0, 255).to(torch.uint8)
