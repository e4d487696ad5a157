"""Native body of :mod:`fastdreamer.ops.observe`: one autograd node for the whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdreamer import _native
from fastdreamer.ops.native.packs import (
    arrays,
    autocast_bf16,
    first_order,
    flat,
    flat_gru,
    latent_of,
    like,
    new_latent,
    pack_mlp,
    pack_rssm,
    split,
)
from fastdreamer.ops.params import Latent, RSSMParams, State


def observe(
    params: RSSMParams,
    start: State,
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    noise: Tensor,
    resets: tuple[bool, bool, bool],
) -> tuple[State, Latent, Latent]:
    """See ``fastdreamer.ops.observe``: posterior states, posterior and prior."""
    action = params.taken(action)
    bf16 = autocast_bf16()
    if embed.dtype == torch.bfloat16 and not bf16:
        embed = embed.float()
    begin = (None, None) if params.begin is None else params.begin.state(params)
    inputs = (*start, embed, action, *begin, is_first, noise)
    if torch.is_grad_enabled():
        groups = (flat(params.inp), flat_gru(params.gru), flat(params.prior), flat(params.post))
        sizes = [len(group) for group in groups]
        parameters = [tensor for group in groups for tensor in group]
        outputs = _Observe.apply(params, bf16, resets, sizes, *inputs, *parameters)
    else:  # without the node, which takes as long as a step of one row
        outputs, _ = _run(params, bf16, resets, inputs, keep=False)
    deter, stoch, *rest = outputs
    return State(deter, stoch), latent_of(params, *rest[:2]), latent_of(params, *rest[2:])


def _run(
    params: RSSMParams, bf16: bool, resets: tuple, inputs: Sequence[Tensor], *, keep: bool
) -> tuple[tuple[Tensor | None, ...], Any]:
    """deter, stoch, mean and std (or logits and None) of posterior and prior; and the tape, if it
    is to be kept."""
    deter, stoch, embed, action, *begin, is_first, noise = inputs
    T, B, _ = noise.shape
    D, S, E = deter.shape[1], stoch.shape[1], embed.shape[2]
    of_deter, of_embed = (E, 0) if params.embed_first else (0, D)  # first columns
    pack = {"bf16": bf16, "gradients": keep}
    post = params.post
    first = post._replace(weights=post.weights[:1], biases=post.biases[:1], norms=())
    model = (
        *pack_rssm(params, **pack),
        pack_mlp(params.post, columns=(of_deter, D), bias=False, **pack),
        pack_mlp(first, columns=(of_embed, E), **pack),
    )
    drawn = noise.new_empty(T, B, S)
    post, prior = new_latent(params, drawn), new_latent(params, drawn)
    outputs = (noise.new_empty(T, B, D), drawn, *post, *prior)
    bits = embed.view(torch.int16) if embed.dtype == torch.bfloat16 else embed
    tape = _native.observe_forward(
        model,
        *arrays(deter, stoch, bits, action, is_first),
        resets,
        noise.detach().numpy(),
        tuple(arrays(*outputs)),
        keep,
        torch.get_num_threads(),
        None if begin[0] is None else tuple(arrays(*begin)),
    )
    return outputs, tape


class _Observe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, params, bf16, resets, sizes, *tensors):
        inputs, parameters = tensors[:8], tensors[8:]
        outputs, ctx.tape = _run(params, bf16, resets, inputs, keep=any(ctx.needs_input_grad))
        ctx.set_materialize_grads(False)
        ctx.sizes = sizes
        # the tape points into these; saved, so that autograd refuses if they are changed
        ctx.save_for_backward(*inputs, *outputs, *parameters)
        return outputs

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        saved = ctx.saved_tensors  # once: a checkpoint unpacks each but one time
        inputs, parameters = saved[:6], saved[14:]
        needs = ctx.needs_input_grad[4:]
        starts = [
            t.new_empty(t.shape, dtype=torch.float32) if need else None
            for t, need in zip(inputs, needs, strict=False)
        ]
        groups = [[None] * n for n in ctx.sizes]
        given = None
        if any(needs[8:]):
            groups = split(like(parameters), ctx.sizes)
            given = tuple(arrays(*group) for group in groups)
        _native.observe_backward(
            ctx.tape,
            tuple(None if g is None else g.contiguous().numpy() for g in grads),
            tuple(arrays(*starts)),
            given,
            torch.get_num_threads(),
        )
        if grads[4] is None and grads[5] is None:  # nothing reaches the prior
            groups[2] = [None] * ctx.sizes[2]
        d_deter, d_stoch, d_embed, d_action, *d_begin = starts
        if d_embed is not None:
            d_embed = d_embed.to(inputs[2].dtype)
        parts = (d_deter, d_stoch, d_embed, d_action, *d_begin, None, None)
        return None, None, None, None, *parts, *(t for group in groups for t in group)
