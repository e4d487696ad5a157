"""Observations to embeddings and features back to observations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdreamer.config.sections import Norms
from fastdreamer.nn.heads import MLP
from fastdreamer.ops.codec import decode, decode_error, encode
from fastdreamer.ops.layers import embed_vector, symlog
from fastdreamer.ops.params import DecoderParams, EncoderParams


class Encoder(nn.Module):
    """Embed an observation of pixels, state, or both (concatenated).

    Args:
        obs_shapes: shape of each kind without batch, ``{"pixels": (64, 64, 3), "state": (n,)}``.
        channels: of the four convolutions (kernel 4, stride 2, ReLU): 64² to 31², 14², 6², 2².
        linear: size of a linear layer behind them, or None.
        units, layers: of the state MLP.
        activation, norm: of the state MLP.
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
        norm: Norms = "none",
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
            self.state = MLP([n, *[units] * layers], activation, norm, active=True)
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
        *lead, height, width, channels = pixels.shape
        x = encode(self.params(), pixels.reshape(-1, height, width, channels))
        return x.reshape(*lead, x.shape[-1])

    def params(self) -> EncoderParams:
        """The convolutions' and the linear layer's tensors, as the op takes them."""
        linear = None if self.linear is None else (self.linear.weight, self.linear.bias)
        return EncoderParams(*_tensors(self.convs), linear)


class Decoder(nn.Module):
    """Reconstruct what the encoder saw from feat.

    Args:
        feat_size: F.
        obs_shapes: as for the encoder.
        channels: between the four transposed convolutions (kernels 5 5 6 6, stride 2):
            1² -> 5² -> 13² -> 30² -> 64².
        linear: size of the linear layer before them.
        linear_relu: apply a ReLU behind it.
        units, layers, activation, norm: of the state MLP.
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
        norm: Norms = "none",
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
            self.state = MLP([feat_size, *[units] * layers, n], activation, norm)

    def forward(self, feat: Tensor) -> dict[str, Tensor]:
        """Means of the observations' unit-variance Normals.

        Args:
            feat: [..., F].

        Returns:
            ``pixels`` [..., 64, 64, 3], in x/255 − 0.5; ``state`` [..., n], in symlog units.
        """
        means = {}
        if self.convs is not None:
            x = decode(self.params(), feat.reshape(-1, feat.shape[-1]))
            means["pixels"] = x.reshape(*feat.shape[:-1], *x.shape[1:])
        if self.state is not None:
            means["state"] = self.state(feat)
        return means

    def squared_errors(self, feat: Tensor, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Σ (mean − observation)² over everything, of each kind; forward()'s, but for the images.

        Args:
            feat: [..., F].
            obs: ``pixels`` [..., 64, 64, 3] uint8 and/or ``state`` [..., n] float.

        Returns:
            Scalars by kind; of the state in symlog units.
        """
        errors = {}
        if self.convs is not None:
            pixels = obs["pixels"].flatten(0, -4)
            errors["pixels"] = decode_error(self.params(), feat.reshape(len(pixels), -1), pixels)
        if self.state is not None:
            mean = self.state(feat).to(feat.dtype)
            errors["state"] = F.mse_loss(mean, symlog(obs["state"]), reduction="sum")
        return errors

    def params(self) -> DecoderParams:
        """The linear layer's and the transposed convolutions' tensors, as the op takes them."""
        linear = self.linear.weight, self.linear.bias
        return DecoderParams(linear, self.linear_relu, *_tensors(self.convs))


def _tensors(convs: nn.ModuleList) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return tuple(conv.weight for conv in convs), tuple(conv.bias for conv in convs)


def float_to_pixels(x: Tensor) -> Tensor:
    """The inverse, clipped to what a pixel can hold."""
    return x.float().add(0.5).mul(255).round().clamp(0, 255).to(torch.uint8)
