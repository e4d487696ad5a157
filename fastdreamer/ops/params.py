"""What the recurrent ops take and return: parameters as plain tensors, states, distributions.

Nothing here owns a parameter or imports a module class, so that ``nn`` and other people's modules
drive the same ops. Weights are laid out as in ``torch.nn.Linear`` and ``torch.nn.GRUCell``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"elu": F.elu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}
STDS = {"softplus": F.softplus, "sigmoid": torch.sigmoid, "exp": torch.exp}


class State(NamedTuple):
    """A latent state or a trajectory of them."""

    deter: Tensor  # [..., D]
    stoch: Tensor  # [..., S]

    @property
    def feat(self) -> Tensor:
        """deter ⊕ stoch, [..., F]; a copy."""
        return torch.cat([self.deter, self.stoch], -1)

    def concat(self, stoch_first: bool) -> Tensor:
        """The features in the order that a head takes: stoch ⊕ deter, or as ``feat``."""
        return torch.cat([self.stoch, self.deter], -1) if stoch_first else self.feat


class Normal(NamedTuple):
    """Parameters of a diagonal Normal distribution."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std · noise, reparameterised; noise is standard normal."""
        return self.mean + self.std * noise


class OneHot(NamedTuple):
    """Parameters of C independent categorical distributions over one-hot vectors of K."""

    logits: Tensor  # [..., C, K], raw
    unimix: float = 0.0

    @property
    def probs(self) -> Tensor:
        """p = (1 − u)·softmax(logits) + u/K, [..., C, K]."""
        probs = torch.softmax(self.logits, -1)
        return (1 - self.unimix) * probs + self.unimix / probs.shape[-1] if self.unimix else probs

    def sample(self, noise: Tensor) -> Tensor:
        """One-hot vectors, straight-through, [..., C·K]; noise [..., C] is uniform in [0, 1).

        The class drawn is the one whose part of the cumulative sums of p holds the noise: class k
        from Σ_{j<k} p_j on and below Σ_{j≤k} p_j, the last one wherever rounding leaves a gap. The
        gradient is that of p (Bengio et al. 2013; DreamerV2).
        """
        probs = self.probs
        below = (probs.detach().cumsum(-1) <= noise.unsqueeze(-1)).sum(-1, keepdim=True)
        drawn = below.clamp(max=probs.shape[-1] - 1)
        hard = torch.zeros_like(probs).scatter(-1, drawn, 1.0)
        return (hard + (probs - probs.detach())).flatten(-2)


Latent = Normal | OneHot
"""What prior and posterior are."""


def stack(dists: Sequence[Latent]) -> Latent:
    """Distributions of successive steps as one, [T, ...]."""
    if isinstance(dists[0], Normal):
        return Normal(*(torch.stack(parts) for parts in zip(*dists, strict=True)))
    return dists[0]._replace(logits=torch.stack([dist.logits for dist in dists]))


class MLPParams(NamedTuple):
    """Linear layers with an activation between them (none behind the last)."""

    weights: tuple[Tensor, ...]  # [out, in] each
    biases: tuple[Tensor, ...]  # [out] each
    activation: str

    @property
    def inputs(self) -> int:
        return self.weights[0].shape[1]

    @property
    def outputs(self) -> int:
        return self.weights[-1].shape[0]

    def detach(self) -> MLPParams:
        return MLPParams(
            tuple(w.detach() for w in self.weights),
            tuple(b.detach() for b in self.biases),
            self.activation,
        )


class StdTransform(NamedTuple):
    """How a raw output y becomes a standard deviation: max(scale·f(slope·y + offset) + min, floor).

    Dreamer's latent has softplus(y) + 0.1 and its policy softplus(y + offset) + 1e-4; others are
    2·sigmoid(y/2) + 0.1 (DreamerV2), exp(y), and a softplus that a floor bounds (torchrl).
    """

    kind: str = "softplus"  # f: softplus, sigmoid or exp
    scale: float = 1.0
    slope: float = 1.0
    offset: float = 0.0
    min: float = 0.0
    floor: float = 0.0  # below it the gradient is zero; 0 bounds nothing


class Categorical(NamedTuple):
    """How raw outputs become C = S / K categorical latents of K classes, see :class:`OneHot`.

    The outputs are the logits, one class after another; the latents of DreamerV2 and V3.
    """

    classes: int  # K
    unimix: float = 0.0  # u, the part of the uniform distribution that is mixed in


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

    inp: MLPParams  # [stoch, action] -> hidden, the activation follows the last layer, too
    gru: GRUParams
    prior: MLPParams  # deter -> hidden -> 2S, or S of categorical latents
    post: MLPParams | None  # [deter, embed] -> the same
    latent: StdTransform | Categorical  # what prior and posterior make of it
    action_first: bool = False  # inp takes [action, stoch]
    embed_first: bool = False  # post takes [embed, deter]

    def dims(self) -> dict[str, int]:
        """Sizes that the weights fix: A, D, S; C of categorical latents; with a posterior E."""
        deter, stoch = self.gru.weight_hh.shape[1], len(self.prior.biases[-1])
        dims = {"D": deter}
        if isinstance(self.latent, Categorical):
            dims["C"], rest = divmod(stoch, self.latent.classes)
            if rest:
                classes = self.latent.classes
                raise ValueError(
                    f"latent: {stoch} logits make no categoricals of {classes} classes"
                )
        else:
            stoch //= 2
        dims |= {"A": self.inp.weights[0].shape[1] - stoch, "S": stoch}
        return dims if self.post is None else dims | {"E": self.post.weights[0].shape[1] - deter}

    @property
    def noise(self) -> str:
        """The letter of a step's noise: S standard normals, or C uniforms in [0, 1)."""
        return "C" if isinstance(self.latent, Categorical) else "S"

    def lacking(self) -> dict[str, str]:
        """Backends without a body for these latents, and why."""
        if not isinstance(self.latent, Categorical):
            return {}
        return dict.fromkeys(("native", "triton"), "it has Gaussian latents alone")

    def detach(self) -> RSSMParams:
        """The same parameters, receiving no gradient: frozen dynamics."""
        return RSSMParams(
            self.inp.detach(),
            self.gru.detach(),
            self.prior.detach(),
            self.post.detach() if self.post is not None else None,
            *self[4:],
        )


class ActorParams(NamedTuple):
    """A tanh-Normal policy: feat -> 2A, see ``actor_dist``."""

    mlp: MLPParams
    mean_scale: float  # c; infinite: the mean is x itself
    std: StdTransform
    stoch_first: bool = False  # mlp takes [stoch, deter]
    through_feat: bool = False  # whether imagined gradients pass through the features it looks at


class ReturnParams(NamedTuple):
    """What values a trajectory of states 1..H: heads feat -> 1, and the λ-return's constants.

    ``critic`` may be None where rewards alone are summed; ``target`` bootstraps in its place
    where given (a slowly moving copy of the critic). With a ``discount`` head the factor of a
    state is γ·sigmoid(discount(feat)), else γ. The reward that the λ-return pairs with the value of
    state t + 1 is that of arriving there, reward(feat_{t+1}); with ``departure``, as the report's
    code has it, that of the state before, reward(feat_t).
    """

    reward: MLPParams
    critic: MLPParams | None
    target: MLPParams | None
    gamma: float
    lam: float
    discount: MLPParams | None = None
    stoch_first: bool = False  # the heads take [stoch, deter]
    departure: bool = False

    def heads(self) -> tuple[MLPParams | None, ...]:
        """Reward, critic, target and discount."""
        return self.reward, self.critic, self.target, self.discount

    def detach(self) -> ReturnParams:
        """The same heads, receiving no gradient."""
        heads = ("reward", "critic", "target", "discount")
        given = {name: head for name in heads if (head := getattr(self, name)) is not None}
        return self._replace(**{name: head.detach() for name, head in given.items()})


class EncoderParams(NamedTuple):
    """Convolutions of stride 2 with a ReLU behind each, then perhaps a linear layer."""

    weights: tuple[Tensor, ...]  # [out, in, k, k] each, as in torch.nn.Conv2d
    biases: tuple[Tensor, ...]  # [out]
    linear: tuple[Tensor, Tensor] | None  # weight [E, channels · h · w] and bias [E]


class DecoderParams(NamedTuple):
    """A linear layer to one pixel, then transposed convolutions of stride 2, ReLU between them."""

    linear: tuple[Tensor, Tensor]  # weight [channels, F] and bias
    linear_relu: bool  # whether a ReLU follows it
    weights: tuple[Tensor, ...]  # [in, out, k, k] each, as in torch.nn.ConvTranspose2d
    biases: tuple[Tensor, ...]  # [out]


def deepest(*mlps: MLPParams | None) -> int:
    """The layers of the deepest of them; None has none."""
    return max([len(mlp.weights) for mlp in mlps if mlp is not None])


def mlp(params: MLPParams, x: Tensor) -> Tensor:
    """Apply the layers to x [..., in] -> [..., out]."""
    act = ACTIVATIONS[params.activation]
    last = len(params.weights) - 1
    for i, (weight, bias) in enumerate(zip(params.weights, params.biases, strict=True)):
        x = F.linear(x, weight, bias)
        if i < last:
            x = act(x)
    return x


def symlog(x: Tensor) -> Tensor:
    """sign(x)·log(1 + |x|): keeps small values, tames large ones (DreamerV3)."""
    return torch.sign(x) * torch.log1p(x.abs())


def embed_vector(params: MLPParams, x: Tensor) -> Tensor:
    """act(mlp(symlog(x))), the embedding of numbers observed, [..., n] -> [..., units]."""
    return ACTIVATIONS[params.activation](mlp(params, symlog(x)))


def gru_cell(params: GRUParams, x: Tensor, h: Tensor) -> Tensor:
    """h' of a gated recurrent unit (Cho et al. 2014, the variant of ``torch.nn.GRUCell``)."""
    xr, xz, xn = F.linear(x, params.weight_ih, params.bias_ih).chunk(3, -1)
    hr, hz, hn = F.linear(h, params.weight_hh, params.bias_hh).chunk(3, -1)
    reset = torch.sigmoid(xr + hr)
    update = torch.sigmoid(xz + hz)
    new = torch.tanh(xn + reset * hn)
    return (1 - update) * new + update * h


def std_of(transform: StdTransform, y: Tensor) -> Tensor:
    """The standard deviation of a raw output, see :class:`StdTransform`."""
    kind, scale, slope, offset, least, floor = transform
    if kind not in STDS:
        raise ValueError(f"std must be {', '.join(STDS)}, got {kind!r}")
    # what does nothing is left out
    y = y if slope == 1 else slope * y
    std = STDS[kind](y + offset if offset else y)
    std = std if scale == 1 else scale * std
    std = std + least if least else std
    return std.clamp(min=floor) if floor > 0 else std


def latent_dist(raw: Tensor, latent: StdTransform | Categorical, dtype: torch.dtype) -> Latent:
    """Normal(mean, std(y)) of raw = [mean, y], [..., 2S]; or categoricals of the logits [..., S].

    Cast first: under autocast raw is bfloat16, too coarse for a KL divergence.
    """
    raw = raw.to(dtype)
    if isinstance(latent, Categorical):
        return OneHot(raw.unflatten(-1, (-1, latent.classes)), latent.unimix)
    mean, y = raw.chunk(2, -1)
    return Normal(mean, std_of(latent, y))


def actor_dist(params: ActorParams, feat: Tensor) -> Normal:
    """The policy's Normal before the squashing tanh.

    mean = c·tanh(x/c), or x where c is infinite; an action is tanh(mean + std(y)·ε) (report section
    3; c = 5 is the original Dreamer's). ``feat`` is in the order that ``params`` says.
    """
    x, y = mlp(params.mlp, feat).to(feat.dtype).chunk(2, -1)
    c = params.mean_scale
    return Normal(x if math.isinf(c) else c * torch.tanh(x / c), std_of(params.std, y))


def embed_all(embed: Tensor | None, encoder: MLPParams | None, vector: Tensor | None) -> Tensor:
    """The embedding [B, E] of all that was observed."""
    if encoder is None:
        return embed
    behind = embed_vector(encoder, vector)
    return behind if embed is None else torch.cat([embed.to(behind.dtype), behind], -1)


def chosen_action(actor: ActorParams | None, state: State, noise: Tensor | None) -> Tensor | None:
    """The action of a policy in a state; None without one."""
    if actor is None:
        return None
    dist = actor_dist(actor, state.concat(actor.stoch_first))
    return torch.tanh(dist.mean if noise is None else dist.sample(noise))
