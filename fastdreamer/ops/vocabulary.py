"""What of the ops' vocabulary a model uses, and which compiled bodies have it.

Every body has Linear layers with bias, ELU, ReLU, SiLU or tanh between them, ``torch.nn.GRUCell``'s
recurrence, Gaussian latents, tanh-Normal policies and heads whose first output is the number.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastdreamer.ops.cells import BlockGRUParams, GRUParams
from fastdreamer.ops.layers import MLPParams
from fastdreamer.ops.params import (
    SQUASHES,
    ActorParams,
    Branches,
    Categorical,
    ReturnParams,
    RSSMParams,
    StdTransform,
)

BODIES: dict[str, frozenset[str]] = {
    "native": frozenset(
        (
            *("layers without bias", "LayerNorm", "RMSNorm", "gelu", "gelu_tanh", "mish"),
            *("GRU with its reset inside the candidate", "block-diagonal GRU"),
            *("layers of stoch and action apart", "learned start"),
            *("categorical latents", "Gumbel-softmax latents"),
            *("bound on actions", "bound on its own actions"),
            *("one-hot actions", "Gumbel-softmax actions"),
            *(f"policy squashed by {squash!r}" for squash in SQUASHES),
            *("two-hot heads", "symexp heads", "heads of several outputs"),
            "continuation by its mode",
        )
    ),
    "triton": frozenset(
        (
            *("layers without bias", "LayerNorm", "RMSNorm"),
            *("GRU with its reset inside the candidate", "categorical latents", "learned start"),
            *("bound on actions", "bound on its own actions", "gelu", "gelu_tanh", "mish"),
            *("block-diagonal GRU", "layers of stoch and action apart"),
            *("two-hot heads", "symexp heads", "heads of several outputs", "one-hot actions"),
            *("Gumbel-softmax latents", "Gumbel-softmax actions"),
            *(f"policy squashed by {squash!r}" for squash in SQUASHES),
            "continuation by its mode",
        )
    ),
}
"""What each compiled backend has besides, in the words of :func:`lacking`."""

_BASE = frozenset(("elu", "relu", "silu", "tanh"))


def lacking(
    params: RSSMParams | None = None,
    actor: ActorParams | None = None,
    returns: ReturnParams | None = None,
    *others: MLPParams | None,
) -> dict[str, str]:
    """Backends without a body for a model, and all that each has not."""
    mlps: list[MLPParams | None] = list(others)
    plain = True
    if params is not None:
        inp, gru, prior, post, latent, _, _, bound, begin = params
        split = isinstance(inp, Branches)
        mlps += [*(inp if split else (inp,)), prior, post]
        plain = type(gru) is GRUParams and type(latent) is StdTransform and not split
        plain = plain and not bound and begin is None
    if actor is not None:
        mlps.append(actor.mlp)
        plain = plain and type(actor.std) is StdTransform and actor.squash == "tanh"
    if returns is not None:
        mlps += returns.heads()
        plain = plain and _plain_heads(returns)
    if plain and all([mlp is None or _plain(mlp) for mlp in mlps]):  # every call asks: at once
        return {}
    words = dict.fromkeys((*_of_layers(mlps), *_of_model(params), *_of_heads(actor, returns)))
    if params is not None and params.bound_action and (actor is not None or returns is not None):
        words["bound on its own actions"] = None
    missing = {name: [word for word in words if word not in has] for name, has in BODIES.items()}
    return {name: f"it has no {', no '.join(what)}" for name, what in missing.items() if what}


def _plain(mlp: MLPParams) -> bool:
    """Whether every body has such layers."""
    if mlp.norms or mlp.activation not in _BASE:
        return False
    return all([bias is not None for bias in mlp.biases])  # `in` would compare tensors


def _plain_heads(returns: ReturnParams) -> bool:
    """Whether every body reads such heads."""
    for readout in (returns.reward_as, returns.value_as):
        if readout.bins is not None or readout.squashed:
            return False
    if returns.hard_discount:
        return False
    numbers = returns.reward, returns.critic, returns.target
    return all([head is None or head.weights[-1].shape[0] == 1 for head in numbers])


def _of_layers(mlps: list[MLPParams | None]) -> Iterator[str]:
    for mlp in mlps:
        if mlp is None:
            continue
        if any(bias is None for bias in mlp.biases):
            yield "layers without bias"
        for norm in mlp.norms:
            if norm is not None:
                yield "RMSNorm" if norm.kind == "rms" else "LayerNorm"
        if mlp.activation not in _BASE:
            yield mlp.activation


def _of_model(params: RSSMParams | None) -> Iterator[str]:
    if params is None:
        return
    if not isinstance(params.gru, GRUParams):
        block = isinstance(params.gru, BlockGRUParams)
        yield "block-diagonal GRU" if block else "GRU with its reset inside the candidate"
    if isinstance(params.inp, Branches):
        yield "layers of stoch and action apart"
    if isinstance(params.latent, Categorical):
        yield "Gumbel-softmax latents" if params.latent.gumbel else "categorical latents"
    if params.bound_action:
        yield "bound on actions"
    if params.begin is not None:
        yield "learned start"


def _of_heads(actor: ActorParams | None, returns: ReturnParams | None) -> Iterator[str]:
    if actor is not None:
        if isinstance(actor.std, Categorical):
            yield "Gumbel-softmax actions" if actor.std.gumbel else "one-hot actions"
        elif actor.squash != "tanh":
            yield f"policy squashed by {actor.squash!r}"
    if returns is None:
        return
    numbers = [(returns.reward, returns.reward_as), (returns.critic, returns.value_as)]
    for head, readout in [*numbers, (returns.target, returns.value_as)]:
        if head is None:
            continue
        if readout.bins is not None:
            yield "two-hot heads"
            if readout.bins.requires_grad:
                yield "learned bins"
        elif head.outputs > 1:
            yield "heads of several outputs"
        if readout.squashed:
            yield "symexp heads"
    if returns.hard_discount:
        yield "continuation by its mode"
