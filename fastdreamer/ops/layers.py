"""Linear layers, what normalises them and what stands between them, as plain tensors."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "elu": F.elu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "mish": F.mish,
}


class Norm(NamedTuple):
    """What a layer's n outputs pass through before the activation.

    LayerNorm (Ba et al. 2016), (x − mean) / √(variance + eps), or RMSNorm (Zhang & Sennrich 2019),
    x / √(mean of x² + eps), over all n of them; then times ``weight``, plus ``bias``.
    """

    kind: str  # layer or rms
    weight: Tensor | None  # [n]; None scales nothing
    bias: Tensor | None  # [n]; None, as torch's RMSNorm has it, shifts nothing
    eps: float

    def detach(self) -> Norm:
        weight, bias = (None if p is None else p.detach() for p in self[1:3])
        return Norm(self.kind, weight, bias, self.eps)


class MLPParams(NamedTuple):
    """Linear layers with an activation between them (none behind the last), perhaps normalised.

    A weight of three dimensions is block-diagonal: of G blocks each takes its part of the inputs
    to its part of the outputs.
    """

    weights: tuple[Tensor, ...]  # [out, in] each, or [G, in / G, out / G]
    biases: tuple[Tensor | None, ...]  # [out] each; None adds nothing
    activation: str
    norms: tuple[Norm | None, ...] = ()  # one a layer that an activation follows; () is none

    @property
    def inputs(self) -> int:
        weight = self.weights[0]
        return weight.shape[1] if weight.ndim == 2 else weight.shape[0] * weight.shape[1]

    @property
    def outputs(self) -> int:
        weight = self.weights[-1]
        return weight.shape[0] if weight.ndim == 2 else weight.shape[0] * weight.shape[2]

    def detach(self) -> MLPParams:
        return MLPParams(
            tuple(w.detach() for w in self.weights),
            tuple(None if b is None else b.detach() for b in self.biases),
            self.activation,
            tuple(None if n is None else n.detach() for n in self.norms),
        )


def deepest(*mlps: MLPParams | None) -> int:
    """The layers of the deepest of them; None has none."""
    return max([len(mlp.weights) for mlp in mlps if mlp is not None])


def mlp(params: MLPParams, x: Tensor) -> Tensor:
    """Apply the layers to x [..., in] -> [..., out]."""
    x = _hidden(params, x, len(params.weights) - 1)
    return linear(params.weights[-1], params.biases[-1], x)


def mlp_act(params: MLPParams, x: Tensor) -> Tensor:
    """The same with norm and activation behind the last layer, too."""
    return _hidden(params, x, len(params.weights))


def _hidden(params: MLPParams, x: Tensor, count: int) -> Tensor:
    act, norms = ACTIVATIONS[params.activation], params.norms or (None,) * count
    for weight, bias, norm in zip(params.weights[:count], params.biases, norms, strict=False):
        x = act(normalise(norm, linear(weight, bias, x)))
    return x


def linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """W·x + b, [..., in] -> [..., out], block by block where the weight is [G, in / G, out / G]."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    blocks = x.unflatten(-1, (len(weight), -1))  # [..., G, in / G]
    x = torch.einsum("...gi,gio->...go", blocks, weight).flatten(-2)
    return x if bias is None else x + bias


def normalise(norm: Norm | None, x: Tensor) -> Tensor:
    """See :class:`Norm`; [..., n] -> the same.

    In float32 at least: of the bfloat16 that autocast makes, means would be too coarse. Without
    autocast the model itself is in bfloat16, and so is the result.
    """
    if norm is None:
        return x
    given, kind = x.dtype, torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if p is None else p.to(kind) for p in norm[1:3])
    x = x.to(kind)
    if norm.kind == "rms":
        x = F.rms_norm(x, x.shape[-1:], weight, norm.eps)
        x = x if bias is None else x + bias
    else:
        x = F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x if kind == given or autocast else x.to(given)


def symlog(x: Tensor) -> Tensor:
    """sign(x)·log(1 + |x|): keeps small values, tames large ones (DreamerV3)."""
    return torch.sign(x) * torch.log1p(x.abs())


def symexp(x: Tensor) -> Tensor:
    """sign(x)·(exp|x| − 1), the inverse of :func:`symlog`."""
    return torch.sign(x) * torch.expm1(x.abs())


def embed_vector(params: MLPParams, x: Tensor) -> Tensor:
    """act(mlp(symlog(x))), the embedding of numbers observed, [..., n] -> [..., units]."""
    return mlp_act(params, symlog(x))


def embed_all(embed: Tensor | None, encoder: MLPParams | None, vector: Tensor | None) -> Tensor:
    """The embedding [B, E] of all that was observed."""
    if encoder is None:
        return embed
    behind = embed_vector(encoder, vector)
    return behind if embed is None else torch.cat([embed.to(behind.dtype), behind], -1)
