"""The recurrent state-space model's parameters (report section 2)."""

from __future__ import annotations

from torch import nn

from fastdreamer.nn.heads import MLP
from fastdreamer.ops.cells import GRUParams
from fastdreamer.ops.params import RSSMParams, State, StdTransform


class RSSM(nn.Module):
    """h' = GRU(act(W[s, a]), h); prior and posterior of one hidden layer each.

    Args:
        action_dim, deter, stoch, embed: A, D, S and E.
        hidden: units of prior and posterior.
        input_hidden: units of the input layer W.
        activation: elu, relu, silu or tanh.
        min_std: added to the softplus of a standard deviation.
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
    ) -> None:
        super().__init__()
        self.deter, self.stoch, self.min_std = deter, stoch, min_std
        self.inp = MLP([stoch + action_dim, input_hidden], activation)
        self.gru = nn.GRUCell(input_hidden, deter)
        self.prior = MLP([deter, hidden, 2 * stoch], activation)
        self.post = MLP([deter + embed, hidden, 2 * stoch], activation)

    @property
    def feat_size(self) -> int:
        """F = D + S."""
        return self.deter + self.stoch

    def params(self) -> RSSMParams:
        """The parameters as tensors, in place."""
        gru = self.gru
        return RSSMParams(
            self.inp.params(),
            GRUParams(gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh),
            self.prior.params(),
            self.post.params(),
            StdTransform(min=self.min_std),
        )

    def initial(self, batch: int) -> State:
        """The state before an episode: zeros, deter [batch, D] and stoch [batch, S]."""
        weight = self.gru.weight_hh
        return State(weight.new_zeros(batch, self.deter), weight.new_zeros(batch, self.stoch))
