"""The recurrences of the dynamics, h' of x and h, as plain tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdreamer.ops.layers import MLPParams, Norm, mlp, mlp_act, normalise


class GRUParams(NamedTuple):
    """The layout of ``torch.nn.GRUCell``: rows in the order reset, update, new."""

    weight_ih: Tensor  # [3D, hidden]
    weight_hh: Tensor  # [3D, D]
    bias_ih: Tensor  # [3D]
    bias_hh: Tensor  # [3D]

    def detach(self) -> GRUParams:
        return GRUParams(*(p.detach() for p in self))


class LateGRUParams(NamedTuple):
    """The GRU of DreamerV2 and V3: one product of x and h, normalised, its reset inside."""

    weight: Tensor  # [3D, hidden + D], columns of x and then of h
    bias: Tensor | None  # [3D]
    norm: Norm | None  # over all 3D together
    deter_first: bool = False  # columns of h and then of x
    gates: str = "rcu"  # the order of the rows: reset, candidate, update
    update_bias: float = -1.0

    def detach(self) -> LateGRUParams:
        tensors = [None if p is None else p.detach() for p in self[:3]]
        return LateGRUParams(*tensors, *self[3:])


class BlockGRUParams(NamedTuple):
    """The GRU of today's DreamerV3, its recurrent weights block-diagonal.

    Each of G blocks sees its part of h and all of the features, which are those of h and x.
    """

    hidden: MLPParams  # h -> features of it, norm and activation behind the last layer
    blocks: MLPParams  # G·(D / G + features) -> D -> ... -> 3D, in each block r, c, u
    deter_first: bool = True  # the features of h before x
    update_bias: float = -1.0

    def detach(self) -> BlockGRUParams:
        return BlockGRUParams(self.hidden.detach(), self.blocks.detach(), *self[2:])


Recurrence = GRUParams | LateGRUParams | BlockGRUParams
"""What advances the deterministic state."""


def recur(params: Recurrence, x: Tensor, h: Tensor) -> Tensor:
    """h' [B, D] of x [B, hidden] and h [B, D]."""
    if isinstance(params, GRUParams):
        return gru_cell(params, x, h)
    if isinstance(params, LateGRUParams):
        return late_gru_cell(params, x, h)
    return block_gru_cell(params, x, h)


def gru_cell(params: GRUParams, x: Tensor, h: Tensor) -> Tensor:
    """h' of a gated recurrent unit (Cho et al. 2014, the variant of ``torch.nn.GRUCell``)."""
    xr, xz, xn = F.linear(x, params.weight_ih, params.bias_ih).chunk(3, -1)
    hr, hz, hn = F.linear(h, params.weight_hh, params.bias_hh).chunk(3, -1)
    reset = torch.sigmoid(xr + hr)
    update = torch.sigmoid(xz + hz)
    new = torch.tanh(xn + reset * hn)
    return (1 - update) * new + update * h


def late_gru_cell(params: LateGRUParams, x: Tensor, h: Tensor) -> Tensor:
    """h' = u·tanh(r·c) + (1 − u)·h with r, c, u = norm(W[x, h] + b) (DreamerV2)."""
    joined = torch.cat((h, x) if params.deter_first else (x, h), -1)
    rows = normalise(params.norm, F.linear(joined, params.weight, params.bias))
    gate = dict(zip(params.gates, rows.chunk(3, -1), strict=True))
    return _gated(gate["r"], gate["c"], gate["u"] + params.update_bias, h)


def block_gru_cell(params: BlockGRUParams, x: Tensor, h: Tensor) -> Tensor:
    """The same of r, c, u that block-diagonal layers make of [h_g, f(h), x] (DreamerV3)."""
    G = len(params.blocks.weights[0])
    of_h = mlp_act(params.hidden, h)
    features = torch.cat((of_h, x) if params.deter_first else (x, of_h), -1)
    shared = features.unsqueeze(-2).expand(*features.shape[:-1], G, features.shape[-1])
    seen = torch.cat([h.unflatten(-1, (G, -1)).to(shared.dtype), shared], -1).flatten(-2)
    rows = mlp(params.blocks, seen).unflatten(-1, (G, 3, -1))  # [..., G, r c u, D / G]
    reset, new, update = (gate.flatten(-2) for gate in rows.unbind(-2))
    return _gated(reset, new, update + params.update_bias, h)


def _gated(reset: Tensor, new: Tensor, update: Tensor, h: Tensor) -> Tensor:
    update = torch.sigmoid(update)
    return update * torch.tanh(torch.sigmoid(reset) * new) + (1 - update) * h
