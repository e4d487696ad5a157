"""What of the ops' vocabulary a model uses, and which compiled bodies have it.

Every body has Linear layers with bias, ELU, ReLU, SiLU or tanh between them, ``torch.nn.GRUCell``'s
recurrence, Gaussian latents, tanh-Normal policies and heads whose first output is the number.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastdreamer.ops.cells import BlockGRUParams, GRUParams
from fastdreamer.ops.layers import MLPParams
from fastdreamer.ops.params import ActorParams, Branches, Categorical, ReturnParams, RSSMParams

BODIES: dict[str, frozenset[str]] = {"native": frozenset(), "triton": frozenset()}
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
    if params is not None:
        split = isinstance(params.inp, Branches)
        mlps += [*(params.inp if split else (params.inp,)), params.prior, params.post]
    if actor is not None:
        mlps.append(actor.mlp)
    if returns is not None:
        mlps += returns.heads()
    words = dict.fromkeys((*_of_layers(mlps), *_of_model(params), *_of_heads(actor, returns)))
    if not words:
        return {}
    missing = {name: [word for word in words if word not in has] for name, has in BODIES.items()}
    return {name: f"it has no {', no '.join(what)}" for name, what in missing.items() if what}


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
            yield "one-hot actions"
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
        elif head.outputs > 1:
            yield "heads of several outputs"
        if readout.squashed:
            yield "symexp heads"
    if returns.hard_discount:
        yield "continuation by its mode"
