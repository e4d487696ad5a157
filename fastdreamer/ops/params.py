"""What the recurrent ops take and return: parameters as plain tensors, states, distributions.

Nothing here owns a parameter or imports a module class, so that ``nn`` and other people's modules
drive the same ops. Weights are laid out as in ``torch.nn.Linear`` and ``torch.nn.GRUCell``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdreamer.ops.cells import BlockGRUParams, Recurrence
from fastdreamer.ops.layers import MLPParams, mlp, symexp

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

    def mode(self) -> Tensor:
        return self.mean


class OneHot(NamedTuple):
    """Parameters of C independent categorical distributions over one-hot vectors of K."""

    logits: Tensor  # [..., C, K], raw
    unimix: float = 0.0
    gumbel: bool = False

    @property
    def probs(self) -> Tensor:
        """p = (1 − u)·softmax(logits) + u/K, [..., C, K]."""
        probs = torch.softmax(self.logits, -1)
        return (1 - self.unimix) * probs + self.unimix / probs.shape[-1] if self.unimix else probs

    @property
    def log_probs(self) -> Tensor:
        """log p, [..., C, K]."""
        return self.probs.log() if self.unimix else torch.log_softmax(self.logits, -1)

    def sample(self, noise: Tensor) -> Tensor:
        """One-hot vectors, straight-through, [..., C·K]; noise [..., C] is uniform in [0, 1).

        The class drawn is the one whose part of the cumulative sums of p holds the noise: class k
        from Σ_{j<k} p_j on and below Σ_{j≤k} p_j, the last one wherever rounding leaves a gap. The
        gradient is that of p (Bengio et al. 2013; DreamerV2). With ``gumbel`` the noise [..., C·K]
        is standard Gumbel, the class the greatest of log p + noise, the first of equals, and the
        gradient that of softmax(log p + noise) (Jang et al. 2017).
        """
        if self.gumbel:
            soft = torch.softmax(self.log_probs + noise.view_as(self.logits), -1)
            return _straight_through(soft.argmax(-1, keepdim=True), soft)
        probs = self.probs
        below = (probs.detach().cumsum(-1) <= noise.unsqueeze(-1)).sum(-1, keepdim=True)
        return _straight_through(below.clamp(max=probs.shape[-1] - 1), probs)

    def mode(self) -> Tensor:
        """The likeliest class, the first of equals, with the gradient of log p, [..., C·K]."""
        return _straight_through(self.logits.argmax(-1, keepdim=True), self.log_probs)


def _straight_through(chosen: Tensor, soft: Tensor) -> Tensor:
    """One-hot vectors of the classes [..., C, 1] with the gradient of soft, [..., C·K]."""
    hard = torch.zeros_like(soft).scatter(-1, chosen, 1.0)
    return (hard + (soft - soft.detach())).flatten(-2)


Latent = Normal | OneHot
"""What prior and posterior are."""


def stack(dists: Sequence[Latent]) -> Latent:
    """Distributions of successive steps as one, [T, ...]."""
    if isinstance(dists[0], Normal):
        return Normal(*(torch.stack(parts) for parts in zip(*dists, strict=True)))
    return dists[0]._replace(logits=torch.stack([dist.logits for dist in dists]))


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
    floor: float = 0.0  # below it the gradient is zero


class Categorical(NamedTuple):
    """How raw outputs become C = S / K categorical latents of K classes, see :class:`OneHot`.

    The outputs are the logits, one class after another; the latents of DreamerV2 and V3.
    """

    classes: int  # K
    unimix: float = 0.0  # u, the part of the uniform distribution that is mixed in
    gumbel: bool = False  # straight-through Gumbel-softmax samples


def noise_of(latent: StdTransform | Categorical) -> tuple[str, Callable[..., Tensor]]:
    """The letter of a step's noise, and what draws it, called as ``torch.randn`` is with a shape.

    S standard normals or, of Gumbel-softmax samples, Gumbels; or C uniforms in [0, 1).
    """
    if not isinstance(latent, Categorical):
        return "S", torch.randn
    return ("S", gumbel) if latent.gumbel else ("C", torch.rand)


def noise_size(latent: StdTransform | Categorical, size: int) -> int:
    """How many numbers of it a sample of that size takes: one each, or one uniform a one-hot."""
    return size // latent.classes if noise_of(latent)[0] == "C" else size


def gumbel(
    shape: Sequence[int], *, generator: torch.Generator | None = None, **options: Any
) -> Tensor:
    """Standard Gumbel numbers, −log e of standard exponential e."""
    return torch.empty(shape, **options).exponential_(generator=generator).log().neg()


class Branches(NamedTuple):
    """Stochastic state and action, each through layers of its own, joined behind them."""

    stoch: MLPParams
    action: MLPParams

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Those of the deeper branch."""
        return max(self.stoch.weights, self.action.weights, key=len)

    def detach(self) -> Branches:
        return Branches(self.stoch.detach(), self.action.detach())


class Begin(NamedTuple):
    """What an episode begins with in the place of zeros: h = tanh(w), s the mode of its prior."""

    weight: Tensor  # w [D]
    through: bool = True  # whether the mode of categoricals has a gradient, that of log p

    def state(self, params: RSSMParams) -> State:
        """That state, of one row; a gradient reaches w and the prior."""
        deter = torch.tanh(self.weight)[None]
        mode = latent_dist(mlp(params.prior, deter), params.latent, deter.dtype).mode()
        return State(deter, mode if self.through else mode.detach())

    def detach(self) -> Begin:
        return self._replace(weight=self.weight.detach())


class RSSMParams(NamedTuple):
    """Recurrent state-space model; ``post`` may be None where no observation is used."""

    inp: MLPParams | Branches  # [stoch, action] -> hidden, an activation behind the last layer, too
    gru: Recurrence
    prior: MLPParams  # deter -> hidden -> 2S, or S of categorical latents
    post: MLPParams | None  # [deter, embed] -> the same
    latent: StdTransform | Categorical  # what prior and posterior make of it
    action_first: bool = False  # inp takes [action, stoch]
    embed_first: bool = False  # post takes [embed, deter]
    bound_action: bool = False  # inp takes a / max(1, |a|), the divisor without a gradient
    begin: Begin | None = None  # zeros

    @property
    def like(self) -> Tensor:
        """A tensor of the parameters' dtype and device."""
        return self.prior.weights[0]

    @property
    def to_deter(self) -> tuple[MLPParams | Branches, ...]:
        """The layers that h' comes of."""
        if not isinstance(self.gru, BlockGRUParams):
            return (self.inp,)
        return self.inp, self.gru.hidden, self.gru.blocks

    def dims(self) -> dict[str, int]:
        """Sizes that the weights fix: A, D, S; C of categorical latents; with a posterior E."""
        deter, stoch = self.prior.weights[0].shape[1], self.prior.weights[-1].shape[0]
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
        split = isinstance(self.inp, Branches)
        taken = self.inp.action.inputs + stoch if split else self.inp.weights[0].shape[1]
        dims |= {"A": taken - stoch, "S": stoch}
        return dims if self.post is None else dims | {"E": self.post.weights[0].shape[1] - deter}

    def taken(self, action: Tensor) -> Tensor:
        """An action [..., A] as ``inp`` takes it."""
        return bounded(action) if self.bound_action else action

    @property
    def noise(self) -> str:
        """The letter of a step's noise, see :func:`noise_of`."""
        return noise_of(self.latent)[0]

    def detach(self) -> RSSMParams:
        """The same parameters, receiving no gradient: frozen dynamics."""
        return RSSMParams(
            self.inp.detach(),
            self.gru.detach(),
            self.prior.detach(),
            self.post.detach() if self.post is not None else None,
            *self[4:8],
            self.begin and self.begin.detach(),
        )


class ActorParams(NamedTuple):
    """A policy, feat -> 2A of a Normal or A of one-hot actions, see ``actor_dist`` and ``act``."""

    mlp: MLPParams
    mean_scale: float  # c; infinite: the mean is x itself
    std: StdTransform | Categorical  # one-hot actions of as many classes, A = K or several of them
    stoch_first: bool = False  # mlp takes [stoch, deter]
    through_feat: bool = False  # whether imagined gradients pass through the features it looks at
    squash: str = "tanh"  # what the Normal's sample passes through, of SQUASHES

    def noise(self, size: int) -> str | int:
        """How much noise an action takes: the letter A, or what :func:`noise_size` says."""
        return noise_size(self.std, size) if noise_of(self.std)[0] == "C" else "A"


class Readout(NamedTuple):
    """How a head's raw outputs y become one number x: y_0, or with bins b Σ softmax(y)·b.

    Of a Normal's mean and log std y_0 is the mean. With ``squashed`` the number is symexp(x):
    a head in symlog space, or DreamerV3's two-hot head where its bins are.
    """

    bins: Tensor | None = None  # [n]
    squashed: bool = False


def two_hot(count: int, like: Tensor | None = None) -> Readout:
    """DreamerV3's two-hot head: bins symexp(-20) to symexp(20), of an odd count 0 in the middle.

    Args:
        count: of bins.
        like: whose dtype and device they have; float32 on the CPU.
    """
    half = symexp(torch.linspace(-20, 0, (count + 1) // 2, dtype=torch.float64))
    bins = torch.cat([half, -half[: count // 2].flip(0)])
    return Readout(bins.float() if like is None else bins.to(like))


class ReturnParams(NamedTuple):
    """What values a trajectory of states 1..H: heads feat -> 1, and the λ-return's constants.

    ``critic`` may be None where rewards alone are summed; ``target`` bootstraps in its place
    where given (a slowly moving copy of the critic). With a ``discount`` head the factor of a
    state is γ·sigmoid(discount(feat)), with ``hard_discount`` γ or 0, whichever is likelier; else
    γ. The reward that the λ-return pairs with the value of
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
    reward_as: Readout = Readout()
    value_as: Readout = Readout()  # of critic and target
    hard_discount: bool = False

    @property
    def soft_discount(self) -> bool:
        """Whether the factors of a discount head have a gradient."""
        return self.discount is not None and not self.hard_discount

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
    # a positive multiple of f, plus what is no less than the floor, is above it
    return std if scale >= 0 and least >= floor else std.clamp(min=floor)


def latent_dist(raw: Tensor, latent: StdTransform | Categorical, dtype: torch.dtype) -> Latent:
    """Normal(mean, std(y)) of raw = [mean, y], [..., 2S]; or categoricals of the logits [..., S].

    Cast first: under autocast raw is bfloat16, too coarse for a KL divergence.
    """
    raw = raw.to(dtype)
    if isinstance(latent, Categorical):
        classes, unimix, gumbel = latent
        return OneHot(raw.unflatten(-1, (-1, classes)), unimix, gumbel)
    mean, y = raw.chunk(2, -1)
    return Normal(mean, std_of(latent, y))


def bounded(action: Tensor) -> Tensor:
    """a / max(1, |a|) with the divisor taken for a constant."""
    return action / action.detach().abs().clamp(min=1)


def _clipped(action: Tensor) -> Tensor:
    """a within ±(1 − 1e-6), straight-through (DreamerV2)."""
    return action + (action.clamp(-1 + 1e-6, 1 - 1e-6) - action).detach()


SQUASHES = {"tanh": torch.tanh, "none": lambda a: a, "bound": bounded, "clip": _clipped}


def actor_dist(params: ActorParams, feat: Tensor) -> Latent:
    """The policy's Normal before the squashing tanh, or its one-hot distribution.

    mean = c·tanh(x/c), or x where c is infinite; an action is tanh(mean + std(y)·ε) (report section
    3; c = 5 is the original Dreamer's, c = 1 and no tanh DreamerV3's). ``feat`` is in the order
    that ``params`` says.
    """
    return policy_dist(mlp(params.mlp, feat).to(feat.dtype), params.mean_scale, params.std)


def policy_dist(raw: Tensor, c: float, std: StdTransform | Categorical) -> Latent:
    """The same of an actor's raw outputs."""
    if isinstance(std, Categorical):
        return latent_dist(raw, std, raw.dtype)
    x, y = raw.chunk(2, -1)
    return Normal(x if math.isinf(c) else c * torch.tanh(x / c), std_of(std, y))


def act(params: ActorParams, feat: Tensor, noise: Tensor | None) -> Tensor:
    """An action of the policy, [..., F] -> [..., A]; without noise that of its mode."""
    return choose(actor_dist(params, feat), params.squash, noise)


def choose(dist: Latent, squash: str, noise: Tensor | None) -> Tensor:
    """An action of its distribution."""
    action = dist.mode() if noise is None else dist.sample(noise)
    return action if isinstance(dist, OneHot) else SQUASHES[squash](action)


def scalar(head: MLPParams, readout: Readout, feat: Tensor) -> Tensor:
    """The number that a head gives, [..., F] -> [...].

    Cast first: under autocast the outputs are bfloat16.
    """
    return read_out(readout, mlp(head, feat).to(feat.dtype))


def read_out(readout: Readout, y: Tensor) -> Tensor:
    """The number of raw outputs, see :class:`Readout`.

    The sum over bins is taken in mirrored pairs: equal probabilities of bins that stand
    symmetrically about 0 give 0 exactly.
    """
    if readout.bins is None:
        x = y[..., 0]
    else:
        parts = torch.softmax(y, -1) * readout.bins.to(y)
        x = 0.5 * (parts + parts.flip(-1)).sum(-1)
    return symexp(x) if readout.squashed else x


def chosen_action(actor: ActorParams | None, state: State, noise: Tensor | None) -> Tensor | None:
    """The action of a policy in a state; None without one."""
    return None if actor is None else act(actor, state.concat(actor.stoch_first), noise)
