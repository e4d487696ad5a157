"""Multilayer perceptrons: heads that say a number, ensembles of them, and the actor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdreamer.config import BehaviorConfig, ModelConfig
from fastdreamer.config.sections import Norms, Readouts
from fastdreamer.ops.layers import ACTIVATIONS, MLPParams, Norm, mlp
from fastdreamer.ops.params import (
    ActorParams,
    Normal,
    Readout,
    StdTransform,
    actor_dist,
    scalar,
    two_hot,
)

_NORMS = {"layer": (nn.LayerNorm, 1e-3), "rms": (nn.RMSNorm, 1e-4)}
"""By name, with the eps of the DreamerV3 that had it (LayerNorm first, RMSNorm today)."""


def make_norm(kind: Norms, size: int) -> nn.Module | None:
    """What normalises a layer of that many outputs; None for "none"."""
    if kind == "none":
        return None
    make, eps = _NORMS[kind]
    return make(size, eps=eps)


def norm_params(norm: nn.Module | None) -> Norm | None:
    """It as tensors, in place."""
    if norm is None:
        return None
    kind = "layer" if isinstance(norm, nn.LayerNorm) else "rms"
    return Norm(kind, norm._parameters["weight"], norm._parameters.get("bias"), norm.eps)


class MLP(nn.Module):
    """Linear layers with an activation between them, perhaps normalised in front of it.

    Args:
        sizes: in, hidden..., out.
        activation: elu, relu, silu or tanh.
        norm: of the layers that an activation follows; a normalised layer has no bias.
        active: whether one follows the last layer, too (who calls sees to that).
    """

    def __init__(
        self, sizes: list[int], activation: str, norm: Norms = "none", *, active: bool = False
    ) -> None:
        super().__init__()
        pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
        normed = 0 if norm == "none" else len(pairs) - (not active)
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=i >= normed) for i, (a, b) in enumerate(pairs)
        )
        self.norms = nn.ModuleList(make_norm(norm, size) for _, size in pairs[:normed])
        self.activation = activation

    def params(self) -> MLPParams:
        """The layers as tensors, in place."""
        layers = [layer._parameters for layer in self.layers]  # looked up by name it takes longer
        weights, biases = ([layer[name] for layer in layers] for name in ("weight", "bias"))
        norms = tuple([norm_params(norm) for norm in self.norms])
        return MLPParams(tuple(weights), tuple(biases), self.activation, norms)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return mlp(self.params(), x)


class ScalarHead(MLP):
    """An MLP whose outputs say one number, see :class:`fastdreamer.ops.params.Readout`.

    Args:
        sizes: in, hidden...
        activation, norm: of the MLP.
        readout: plain, symlog or two-hot. bins: of two-hot; equally likely at first, which is 0.
    """

    def __init__(
        self, sizes: list[int], activation: str, norm: Norms, readout: Readouts, bins: int
    ) -> None:
        two = readout == "two-hot"
        super().__init__([*sizes, bins if two else 1], activation, norm)
        self.kind = readout
        self.register_buffer("bins", two_hot(bins).bins if two else None, persistent=False)
        if two:
            for parameter in self.layers[-1].parameters():
                nn.init.zeros_(parameter)

    @classmethod
    def from_config(cls, model: ModelConfig, feat_size: int, layers: int) -> ScalarHead:
        """The head of so many hidden layers that a configuration describes."""
        sizes = [feat_size, *[model.units] * layers]
        return cls(sizes, model.activation, model.norm, model.readout, model.bins)

    @property
    def readout(self) -> Readout:
        """How its outputs say the number."""
        return Readout(self.bins, squashed=self.kind == "symlog")

    def number(self, feat: Tensor) -> Tensor:
        """The number, [..., in] -> [...]."""
        return scalar(self.params(), self.readout, feat)


class Ensemble(nn.Module):
    """M multilayer perceptrons of one architecture, each initialised by itself.

    All of them are evaluated together: the first layer is one matrix product, since they share
    their input, every further one a batched product.

    Args:
        members: M.
        sizes: in, hidden..., out of each.
        activation: elu, relu, silu or tanh.
    """

    def __init__(self, members: int, sizes: list[int], activation: str) -> None:
        super().__init__()
        made = [MLP(sizes, activation).layers for _ in range(members)]
        layers = range(len(sizes) - 1)
        stack = lambda name: nn.ParameterList(  # noqa: E731
            torch.stack([getattr(member[i], name).detach() for member in made]) for i in layers
        )
        self.weights, self.biases = stack("weight"), stack("bias")  # [M, out, in], [M, out]
        self.members, self.activation = members, activation

    def forward(self, x: Tensor, *, frozen: bool = False) -> Tensor:
        """[..., in] -> [M, ..., out]; ``frozen`` gives a gradient to x and none to the weights."""
        weights, biases = list(self.weights), list(self.biases)
        if frozen:
            weights, biases = [w.detach() for w in weights], [b.detach() for b in biases]
        lead, act = x.shape[:-1], ACTIVATIONS[self.activation]
        rows = F.linear(x.flatten(0, -2), weights[0].flatten(0, 1), biases[0].flatten())
        rows = rows.unflatten(-1, (self.members, -1)).transpose(0, 1)  # [M, N, units]
        for weight, bias in zip(weights[1:], biases[1:], strict=True):
            rows = torch.baddbmm(bias.unsqueeze(1), act(rows), weight.mT)
        return rows.unflatten(1, lead)


class Actor(nn.Module):
    """The tanh-Normal policy, feat [..., F] -> Normal over A before the tanh."""

    def __init__(
        self,
        sizes: list[int],
        activation: str,
        *,
        mean_scale: float,
        std_offset: float,
        min_std: float,
        norm: Norms = "none",
    ) -> None:
        super().__init__()
        self.mlp = MLP([*sizes[:-1], 2 * sizes[-1]], activation, norm)
        self.mean_scale, self.std_offset, self.min_std = mean_scale, std_offset, min_std

    @classmethod
    def from_config(
        cls, model: ModelConfig, behavior: BehaviorConfig, feat_size: int, action_dim: int
    ) -> Actor:
        """The policy that a configuration describes."""
        return cls(
            [feat_size, *[model.units] * behavior.actor_layers, action_dim],
            model.activation,
            mean_scale=behavior.mean_scale,
            std_offset=behavior.std_offset,
            min_std=behavior.min_std,
            norm=model.norm,
        )

    def params(self) -> ActorParams:
        """The policy as tensors, in place."""
        std = StdTransform(offset=self.std_offset, min=self.min_std)
        return ActorParams(self.mlp.params(), self.mean_scale, std)

    def forward(self, feat: Tensor) -> Normal:
        return actor_dist(self.params(), feat)
