"""Weights packed for the C++ core, kept until the parameters change.

A pack is immutable. It is used again while every parameter it was made from is the same memory with
the same version counter, and neither has an optimiser stepped since nor a backward pass come
through an op: fused optimisers change parameters without counting a version, hence the hook, and
steps written by hand go by ``p.data -= lr * p.grad``. What none of them sees is another change
behind autograd's back (``p.data.copy_(…)`` or a write through ``p.detach().numpy()``): call
:func:`forget` after such, and pass ``p`` or ``p.detach()``, never ``p.data``, whose versions are
its own. Parameters in shared memory, which another process may change, are packed for every call.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

# first of all torch, so that the extension shares the OpenMP pool that torch loads
from fastdreamer import _native
from fastdreamer.ops.cells import BlockGRUParams, GRUParams, LateGRUParams, Recurrence
from fastdreamer.ops.layers import MLPParams, Norm
from fastdreamer.ops.params import (
    ActorParams,
    Branches,
    Categorical,
    Latent,
    Normal,
    OneHot,
    ReturnParams,
    RSSMParams,
)
from fastdreamer.ops.private import expired

LIMIT = 512
"""Packs kept at most; the oldest goes first."""


class _Entry(NamedTuple):
    pack: Any
    stamp: list  # versions of the parameters, and the count of steps, when it was made
    storages: list[StorageWeakRef]  # so that an address used again is not taken for the same


_packs: dict[tuple, _Entry] = {}
_sweep_at = 32
_step_counter = itertools.count(1)
_steps = 0
_counts = {"packed": 0, "reused": 0}


def _stepped(*_: Any) -> None:
    """An optimiser has stepped, or somebody got gradients to step by."""
    global _steps
    _steps = next(_step_counter)  # in one step: two threads' optimisers may step at once


register_optimizer_step_post_hook(_stepped)


def forget() -> None:
    """Drop every pack: the next call of each op packs its weights anew."""
    _packs.clear()


def counts() -> dict[str, int]:
    """How many packs were made and how many used again, since the process started."""
    return dict(_counts)


def asked_bf16() -> bool:
    """Whether the call is under autocast to bfloat16."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def autocast_bf16() -> bool:
    """Whether the call computes in bfloat16: that is asked for, and the core takes it.

    Where the CPU multiplies faster in float32, that is the answer to both, and more exact.
    """
    return asked_bf16() and _native.takes_bf16()


def arrays(*tensors: Tensor | None) -> list:
    """NumPy views (no copies) for the extension; None stays None."""
    # a needless detach() takes as long as the view itself
    return [None if t is None else (t.detach() if t.requires_grad else t).numpy() for t in tensors]


def first_order(backward: Callable) -> Callable:
    """Decorate a node's backward pass, which autograd cannot differentiate again; packs made before
    it are not used again."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():  # only where gradients are to have gradients
            raise RuntimeError("native gradients have none of their own: choose backend='eager'")
        _stepped()
        return backward(ctx, *grads)

    return checked


def flat(mlp: MLPParams | Branches) -> tuple[Tensor | None, ...]:
    """The weights, then the biases, of layers with norms then their weights and their biases.

    Of branches those of stoch, then those of action.
    """
    if isinstance(mlp, Branches):
        return (*flat(mlp.stoch), *flat(mlp.action))
    weights, biases, _, norms = mlp
    if not norms:
        return (*weights, *biases)
    none = (None,) * (len(weights) - len(norms))
    parts = [[None if norm is None else norm[i] for norm in norms] for i in (1, 2)]
    return (*weights, *biases, *parts[0], *none, *parts[1], *none)


def flat_gru(gru: Recurrence) -> tuple[Tensor | None, ...]:
    """The four of a GRU; of a late one weight, bias and those of its norm; of a block-diagonal one
    the :func:`flat` layers of h, then its blocks."""
    if isinstance(gru, GRUParams):
        return gru
    if isinstance(gru, BlockGRUParams):
        return (*flat(gru.hidden), *flat(gru.blocks))
    return (gru.weight, gru.bias, *((None, None) if gru.norm is None else gru.norm[1:3]))


def constants(part: MLPParams | Branches | Recurrence) -> Any:
    """What :func:`flat` and :func:`flat_gru` leave out."""
    if isinstance(part, MLPParams):
        _, _, activation, norms = part
        return (activation, *[_kind(norm) for norm in norms]) if norms else activation
    if isinstance(part, GRUParams):
        return None
    if isinstance(part, LateGRUParams):
        return (_kind(part.norm), *part[3:])
    # two MLPs, whose tensors follow each other
    mlps, rest = part[:2], part[2:]
    return (*[(len(mlp.weights), constants(mlp)) for mlp in mlps], *rest)


def _kind(norm: Norm | None) -> tuple | None:
    return None if norm is None else (norm.kind, norm.eps)


def like(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Memory for the gradients of parameters."""
    layout = torch.contiguous_format
    return [None if t is None else torch.empty_like(t, memory_format=layout) for t in tensors]


def split(items: Sequence, sizes: list[int]) -> list[Sequence]:
    """Cut a sequence into consecutive groups of these sizes."""
    ends = list(itertools.accumulate(sizes))
    return [items[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def pack_mlp(
    params: MLPParams,
    *,
    bf16: bool,
    gradients: bool,
    act_last: bool = False,
    columns: tuple[int, int] = (0, 0),
    rotate: int = 0,
    bias: bool = True,
) -> Any:
    """Pack layers, or return the pack made before.

    Args:
        params: the layers, float32.
        bf16: the precision they are packed in.
        gradients: whether a backward pass needs them, too.
        act_last: whether the activation follows the last layer as well.
        columns: (first, number) of the first layer's columns; (0, 0) takes all.
        rotate: the column of those that input 0 meets, the others following round the end: the
            size of what the weights take first and the input has last.
        bias: whether the first layer has its bias.
    """
    key = (bf16, act_last, columns, rotate, bias, constants(params))

    def make(gradients: bool) -> Any:
        first = () if bias else (None,)
        given = params._replace(biases=(*first, *params.biases[len(first) :]))
        return _native.PackedMlp(
            *_layers(given),
            *(params.activation, act_last, bf16, gradients, *columns, rotate),
            torch.get_num_threads(),
        )

    return cached(key, flat(params), gradients, make)


def pack_gru(
    params: Recurrence, *, bf16: bool, gradients: bool, action: tuple[int, bool] = (0, False)
) -> Any:
    """The same for a GRU cell; action: how many of its inputs come of layers of the action alone,
    and whether they are the first."""

    def make(gradients: bool) -> Any:
        if isinstance(params, GRUParams):
            given = _numbers(params)
        elif isinstance(params, LateGRUParams):
            given = [*_numbers(params[:2]), _norm(params.norm), *params[3:]]
        else:
            hidden = pack_mlp(params.hidden, act_last=True, bf16=bf16, gradients=gradients)
            given = [hidden, *_layers(params.blocks), params.blocks.activation, *params[2:]]
        return _native.PackedGru(*given, action, bf16, gradients, torch.get_num_threads())

    return cached((bf16, action, constants(params)), flat_gru(params), gradients, make)


def _pack_deter(params: RSSMParams, **pack: bool) -> tuple[Any, Any]:
    """Both for a model: its input layers, perhaps stoch's and action's apart, and its GRU."""
    inp, gru, first = params.inp, params.gru, params.action_first
    if isinstance(inp, Branches):
        parts = [pack_mlp(part, act_last=True, **pack) for part in inp]
        return (*parts, first), pack_gru(gru, action=(inp.action.outputs, first), **pack)
    rotate = params.dims()["A"] if first else 0
    return pack_mlp(inp, act_last=True, rotate=rotate, **pack), pack_gru(gru, **pack)


def _numbers(tensors: Sequence[Tensor | None]) -> list:
    return [None if t is None else t.detach().contiguous().numpy() for t in tensors]


def _layers(mlp: MLPParams) -> tuple[list, list, list]:
    """Weights, biases and norms as the extension takes them."""
    return _numbers(mlp.weights), _numbers(mlp.biases), [_norm(norm) for norm in mlp.norms]


def _norm(norm: Norm | None) -> tuple | None:
    return None if norm is None else (norm.kind, *_numbers(norm[1:3]), norm.eps)


def pack_rssm(params: RSSMParams, *, bf16: bool, gradients: bool) -> tuple:
    """Input layers, GRU, prior and what latents are: the dynamics as the extension takes them.

    One look-up where nothing has changed: a single step of one row takes less time than three.
    """
    inp, gru, prior = params.inp, params.gru, params.prior
    tensors = [*flat(inp), *flat_gru(gru), *flat(prior)]
    key = (bf16, constants(inp), constants(gru), constants(prior), *params[4:6])

    def make(gradients: bool) -> _Model:
        pack = {"bf16": bf16, "gradients": gradients}
        return _Model(
            (
                *_pack_deter(params, **pack),
                pack_mlp(params.prior, **pack),
                params.latent,
            ),
            gradients,
        )

    return cached(key, tensors, gradients, make).parts


def pack_decider(
    params: RSSMParams, actor: ActorParams | None, encoder: MLPParams | None, *, bf16: bool
) -> Any:
    """All that a decision needs, likewise in one look-up: dynamics, posterior, policy, encoder."""
    parts = [params.inp, params.gru, params.post]
    tensors = [*flat(params.inp), *flat_gru(params.gru), *flat(params.post)]
    key = (bf16, *map(constants, parts), *params[4:7])
    if actor is not None:
        tensors += flat(actor.mlp)
        key += (constants(actor.mlp), *actor[1:4], actor.squash)
    if encoder is not None:
        tensors += flat(encoder)
        key += (len(encoder.weights), constants(encoder))

    def make(gradients: bool) -> Any:
        pack, dims = {"bf16": bf16, "gradients": gradients}, params.dims()
        chooses = None
        if actor is not None:  # the core has [stoch, deter]
            rotate = 0 if actor.stoch_first else dims["D"]
            chooses = pack_actor(actor, rotate, **pack)
        return _native.PackedDecider(
            *_pack_deter(params, **pack),
            pack_mlp(params.post, rotate=dims["E"] if params.embed_first else 0, **pack),
            params.latent,
            encoder and pack_mlp(encoder, act_last=True, **pack),
            chooses,
        )

    return cached(key, tensors, False, make)


def pack_actor(actor: ActorParams, rotate: int, *, bf16: bool, gradients: bool) -> tuple:
    """A policy as the extension takes it; rotate as of :func:`pack_mlp`."""
    packed = pack_mlp(actor.mlp, rotate=rotate, bf16=bf16, gradients=gradients)
    return packed, actor.mean_scale, actor.std, actor.squash


def given_readouts(returns: ReturnParams) -> tuple:
    """What the outputs of heads mean, as the extension takes it: of reward, of critic and target,
    and whether the discount is a hard one."""
    like = returns.reward.weights[0]
    numbers = [
        (None if bins is None else arrays(bins.to(like).contiguous())[0], squashed)
        for bins, squashed in (returns.reward_as, returns.value_as)
    ]
    return (*numbers, returns.hard_discount)


def new_latent(params: RSSMParams, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Memory for a distribution as the extension leaves it: mean and std, or logits and None."""
    gaussian = not isinstance(params.latent, Categorical)
    return torch.empty_like(like), torch.empty_like(like) if gaussian else None


def latent_of(params: RSSMParams, mean: Tensor, std: Tensor | None) -> Latent:
    """That distribution."""
    if not isinstance(params.latent, Categorical):
        return Normal(mean, std)
    classes, unimix, gumbel = params.latent
    return OneHot(mean.unflatten(-1, (-1, classes)), unimix, gumbel)


class _Model(NamedTuple):
    parts: tuple
    gradients: bool


def _layout(tensors: Sequence[Tensor | None]) -> list[tuple | None]:
    """All that tells a tensor from another view of the same memory."""
    try:
        layout = [t if t is None else (t.data_ptr(), t.shape, t.stride()) for t in tensors]
        if any([t is not None and t.dtype is not torch.float32 for t in tensors]):
            kinds = ", ".join(sorted({str(t.dtype)[6:] for t in tensors if t is not None}))
            raise ValueError(f"weights and biases must be float32, got {kinds}")
        return layout
    except AttributeError:
        known = {"Tensor", "Parameter", "NoneType"}
        kinds = ", ".join(sorted({type(t).__name__ for t in tensors} - known))
        raise TypeError(f"weights and biases must be tensors, got {kinds}") from None
    except RuntimeError as error:  # sparse, or of a subclass without memory
        raise ValueError(f"weights and biases must be dense tensors: {error}") from None


def cached(key: tuple, tensors: Sequence[Tensor | None], gradients: bool, make: Callable) -> Any:
    key += (*_layout(tensors),)
    try:
        stamp = [t._version for t in tensors if t is not None]
    except RuntimeError:  # made in inference mode: nothing counts their changes
        _counts["packed"] += 1
        return make(gradients)
    stamp.append(_steps)
    entry = _packs.get(key)
    if entry is not None:
        if entry.stamp == stamp and not expired(entry.storages):
            if entry.pack.gradients or not gradients:
                _counts["reused"] += 1
                return entry.pack
        else:  # what was trained before is trained again: one pack serves both directions
            gradients = gradients or entry.pack.gradients
        _packs.pop(key, None)
    _counts["packed"] += 1
    pack = make(gradients)
    _make_room()
    tensors = [t for t in tensors if t is not None]
    storages = [StorageWeakRef(t.untyped_storage()) for t in tensors]
    if not any([t.is_shared() for t in tensors]):
        _packs[key] = _Entry(pack, stamp, storages)
    return pack


def _make_room() -> None:
    """Drop the packs of dead parameters, now and then, and the oldest where there are too many."""
    global _sweep_at
    if len(_packs) >= _sweep_at:
        for key, entry in list(_packs.items()):
            if expired(entry.storages):
                _packs.pop(key, None)  # another thread may have been faster, here and below
        _sweep_at = max(32, 2 * len(_packs))
    for key in list(_packs)[: len(_packs) - LIMIT + 1] if len(_packs) >= LIMIT else ():
        _packs.pop(key, None)
