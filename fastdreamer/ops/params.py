"""What the recurrent ops take and return: parameters as plain tensors, states, distributions.

Nothing here owns a parameter or imports a module class, so that ``nn`` and other people's modules
drive the same ops. Weights are laid out as in ``torch.nn.Linear`` and ``torch.nn.GRUCell``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"elu": F.elu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


class State(NamedTuple):
    """A latent state or a trajectory of them."""

    deter: Tensor  # [..., D]
    stoch: Tensor  # [..., S]

    @property
    def feat(self) -> Tensor:
        """deter ⊕ stoch, [..., F]; a copy."""
        return torch.cat([self.deter, self.stoch], -1)


class Normal(NamedTuple):
    """Parameters of a diagonal Normal distribution."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std · noise, reparameterised; noise is standard normal."""
        return self.mean + self.std * noise


class MLPParams(NamedTuple):
    """Linear layers with an activation between them (none behind the last)."""

    weights: tuple[Tensor, ...]  # [out, in] each
    biases: tuple[Tensor, ...]  # [out] each
    activation: str

    def detach(self) -> MLPParams:
        return MLPParams(
            tuple(w.detach() for w in self.weights),
            tuple(b.detach() for b in self.biases),
            self.activation,
        )


class GRUParams(NamedTuple):
    """The layout of ``torch.nn.GRUCell``: rows in the order reset, update, new."""

    weight_ih: Tensor  # [3D, hidden]
    weight_hh: Tensor  # [3D, D]
    bias_ih: Tensor  # [3D]
    bias_hh: Tensor  # [3D]

    def detach(self) -> GRUParams:
        return GRUParams(*(p.detach() for p in self))


class RSSMParams(NamedTuple):
    """Recurrent state-space model; ``post`` may be None where no observation is used."""

    inp: MLPParams  # one layer: [stoch, action] -> hidden, the activation follows
    gru: GRUParams
    prior: MLPParams  # deter -> hidden -> 2S
    post: MLPParams | None  # [deter, embed] -> hidden -> 2S
    min_std: float

    def dims(self) -> dict[str, int]:
        """Sizes that the weights fix: A, D, S and, with a posterior, E."""
        deter, stoch = self.gru.weight_hh.shape[1], len(self.prior.biases[-1]) // 2
        dims = {"A": self.inp.weights[0].shape[1] - stoch, "D": deter, "S": stoch}
        return dims if self.post is None else dims | {"E": self.post.weights[0].shape[1] - deter}

    def detach(self) -> RSSMParams:
        """The same parameters, receiving no gradient: frozen dynamics."""
        return RSSMParams(
            self.inp.detach(),
            self.gru.detach(),
            self.prior.detach(),
            self.post.detach() if self.post is not None else None,
            self.min_std,
        )


class ActorParams(NamedTuple):
    """A tanh-Normal policy: feat -> 2A, see ``actor_dist``."""

    mlp: MLPParams
    mean_scale: float
    std_offset: float
    min_std: float


class ReturnParams(NamedTuple):
    """What values a trajectory of states 1..H: heads feat -> 1, and the λ-return's constants.

    ``critic`` may be None where rewards alone are summed; ``target`` bootstraps in its place
    where given (a slowly moving copy of the critic).
    """

    reward: MLPParams
    critic: MLPParams | None
    target: MLPParams | None
    gamma: float
    lam: float

    def detach(self) -> ReturnParams:
        """The same heads, receiving no gradient."""
        heads = (head if head is None else head.detach() for head in self[:3])
        return ReturnParams(*heads, self.gamma, self.lam)


def mlp(params: MLPParams, x: Tensor) -> Tensor:
    """Apply the layers to x [..., in] -> [..., out]."""
    act = ACTIVATIONS[params.activation]
    last = len(params.weights) - 1
    for i, (weight, bias) in enumerate(zip(params.weights, params.biases, strict=True)):
        x = F.linear(x, weight, bias)
        if i < last:
            x = act(x)
    return x


def gru_cell(params: GRUParams, x: Tensor, h: Tensor) -> Tensor:
    """h' of a gated recurrent unit (Cho et al. 2014, the variant of ``torch.nn.GRUCell``)."""
    xr, xz, xn = F.linear(x, params.weight_ih, params.bias_ih).chunk(3, -1)
    hr, hz, hn = F.linear(h, params.weight_hh, params.bias_hh).chunk(3, -1)
    reset = torch.sigmoid(xr + hr)
    update = torch.sigmoid(xz + hz)
    new = torch.tanh(xn + reset * hn)
    return (1 - update) * new + update * h


def latent_dist(raw: Tensor, min_std: float, dtype: torch.dtype) -> Normal:
    """Normal(mean, softplus(std) + min_std) of raw [..., 2S].

    Cast first: under autocast raw is bfloat16, too coarse for a KL divergence.
    """
    mean, std = raw.to(dtype).chunk(2, -1)
    return Normal(mean, F.softplus(std) + min_std)


def actor_dist(params: ActorParams, feat: Tensor) -> Normal:
    """The policy's Normal before the squashing tanh.

    mean = c·tanh(x/c), std = softplus(y + std_offset) + min_std; an action is tanh(mean + std·ε)
    (report section 3; c = 5 is the original Dreamer's).
    """
    x, y = mlp(params.mlp, feat).to(feat.dtype).chunk(2, -1)
    mean = params.mean_scale * torch.tanh(x / params.mean_scale)
    return Normal(mean, F.softplus(y + params.std_offset) + params.min_std)
