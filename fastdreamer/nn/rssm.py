"""The recurrent state-space model's parameters (report section 2)."""

from __future__ import annotations

from typing import Literal

from torch import nn

from fastdreamer.config.sections import Norms
from fastdreamer.nn.heads import MLP, make_norm, norm_params
from fastdreamer.ops.cells import GRUParams, LateGRUParams
from fastdreamer.ops.params import Categorical, RSSMParams, State, StdTransform


class RSSM(nn.Module):
    """h' = GRU(act(W[s, a]), h); prior and posterior of one hidden layer each.

    Args:
        action_dim, deter, embed: A, D and E.
        stoch: S; of categorical latents how many they are, C.
        hidden: units of prior and posterior.
        input_hidden: units of the input layer W.
        activation: elu, relu, silu or tanh.
        min_std: added to the softplus of a standard deviation.
        norm: of all hidden layers, and of the late-reset cell's product.
        cell: gru, or late-reset, DreamerV2's.
        classes: K of each categorical latent; None: the latents are Gaussian.
        unimix: part of the uniform distribution in the categoricals.
    """

    def __init__(
        self,
        *,
        action_dim: int,
        deter: int,
        stoch: int,
        hidden: int,
        input_hidden: int,
        embed: int,
        activation: str,
        min_std: float,
        norm: Norms = "none",
        cell: Literal["gru", "late-reset"] = "gru",
        classes: int | None = None,
        unimix: float = 0.0,
    ) -> None:
        super().__init__()
        self.deter, self.stoch = deter, stoch * (classes or 1)
        self.latent = StdTransform(min=min_std)
        if classes is not None:
            self.latent = Categorical(classes, unimix)
        outputs = 2 * stoch if classes is None else self.stoch
        self.inp = MLP([self.stoch + action_dim, input_hidden], activation, norm, active=True)
        sizes = input_hidden, deter
        self.gru = nn.GRUCell(*sizes) if cell == "gru" else LateGRU(*sizes, norm)
        self.prior = MLP([deter, hidden, outputs], activation, norm)
        self.post = MLP([deter + embed, hidden, outputs], activation, norm)

    @property
    def feat_size(self) -> int:
        """F = D + S."""
        return self.deter + self.stoch

    def params(self) -> RSSMParams:
        """The parameters as tensors, in place."""
        gru = self.gru
        if isinstance(gru, LateGRU):
            cell = gru.params()
        else:
            cell = GRUParams(gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh)
        mlps = self.inp.params(), cell, self.prior.params(), self.post.params()
        return RSSMParams(*mlps, self.latent)

    def initial(self, batch: int) -> State:
        """The state before an episode: zeros, deter [batch, D] and stoch [batch, S]."""
        weight = self.prior.layers[0].weight
        return State(weight.new_zeros(batch, self.deter), weight.new_zeros(batch, self.stoch))


class LateGRU(nn.Module):
    """The GRU of DreamerV2 and V3, see :class:`fastdreamer.ops.cells.LateGRUParams`."""

    def __init__(self, inputs: int, deter: int, norm: Norms) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs + deter, 3 * deter, bias=norm == "none")
        self.norm = make_norm(norm, 3 * deter)

    def params(self) -> LateGRUParams:
        """The parameters as tensors, in place."""
        linear = self.linear
        return LateGRUParams(linear.weight, linear.bias, norm_params(self.norm))
