"""Multilayer perceptrons: reward, critic, ensembles of them, and the actor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdreamer.config import BehaviorConfig, ModelConfig
from fastdreamer.ops.layers import ACTIVATIONS, MLPParams, mlp
from fastdreamer.ops.params import ActorParams, Normal, StdTransform, actor_dist


class MLP(nn.Module):
    """Linear layers with an activation between them.

    Args:
        sizes: in, hidden..., out.
        activation: elu, relu, silu or tanh.
    """

    def __init__(self, sizes: list[int], activation: str) -> None:
        super().__init__()
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        self.activation = activation

    def params(self) -> MLPParams:
        """The layers as tensors, in place."""
        layers = [layer._parameters for layer in self.layers]  # looked up by name it takes longer
        weights, biases = ([layer[name] for layer in layers] for name in ("weight", "bias"))
        return MLPParams(tuple(weights), tuple(biases), self.activation)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return mlp(self.params(), x)


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
    ) -> None:
        super().__init__()
        self.mlp = MLP([*sizes[:-1], 2 * sizes[-1]], activation)
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
        )

    def params(self) -> ActorParams:
        """The policy as tensors, in place."""
        std = StdTransform(offset=self.std_offset, min=self.min_std)
        return ActorParams(self.mlp.params(), self.mean_scale, std)

    def forward(self, feat: Tensor) -> Normal:
        return actor_dist(self.params(), feat)
