"""Multilayer perceptrons: reward, critic, and the actor."""

from __future__ import annotations

from torch import Tensor, nn

from fastdreamer.ops.params import ActorParams, MLPParams, Normal, StdTransform, actor_dist, mlp


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
        return MLPParams(
            tuple(layer.weight for layer in self.layers),
            tuple(layer.bias for layer in self.layers),
            self.activation,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return mlp(self.params(), x)


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

    def params(self) -> ActorParams:
        """The policy as tensors, in place."""
        std = StdTransform(offset=self.std_offset, min=self.min_std)
        return ActorParams(self.mlp.params(), self.mean_scale, std)

    def forward(self, feat: Tensor) -> Normal:
        return actor_dist(self.params(), feat)
