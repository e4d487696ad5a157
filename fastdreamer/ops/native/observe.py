"""Native body of :mod:`fastdreamer.ops.observe`: one autograd node for the whole sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdreamer import _native
from fastdreamer.ops.native.packs import (
    arrays,
    autocast_bf16,
    flat,
    layers,
    pack_mlp,
    pack_rssm,
    split,
)
from fastdreamer.ops.params import Normal, RSSMParams, State


def observe(
    params: RSSMParams,
    start: State,
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    noise: Tensor,
) -> tuple[State, Normal, Normal]:
    """See ``fastdreamer.ops.observe``: posterior states, posterior and prior."""
    bf16 = autocast_bf16()
    if embed.dtype == torch.bfloat16 and not bf16:
        embed = embed.float()
    groups = (flat(params.inp), tuple(params.gru), flat(params.prior), flat(params.post))
    recording = torch.is_grad_enabled()  # off inside of forward, and not in its ctx
    deter, stoch, *rest = _Observe.apply(
        params,
        bf16,
        recording,
        *start,
        embed,
        action,
        is_first,
        noise,
        *(t for g in groups for t in g),
    )
    return State(deter, stoch), Normal(*rest[:2]), Normal(*rest[2:])


class _Observe(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, params, bf16, recording, deter, stoch, embed, action, is_first, noise, *parameters
    ):
        T, B, S = noise.shape
        D = deter.shape[1]
        keep = recording and any(ctx.needs_input_grad)
        pack = {"bf16": bf16, "gradients": keep}
        first = params.post._replace(weights=params.post.weights[:1], biases=params.post.biases[:1])
        model = (
            *pack_rssm(params, **pack),
            pack_mlp(params.post, columns=(0, D), bias=False, **pack),
            pack_mlp(first, columns=(D, embed.shape[2]), **pack),
        )
        outputs = (noise.new_empty(T, B, D), *(torch.empty_like(noise) for _ in range(5)))
        bits = embed.view(torch.int16) if embed.dtype == torch.bfloat16 else embed
        ctx.tape = _native.observe_forward(
            model,
            *arrays(deter, stoch, bits, action, is_first, noise),
            tuple(arrays(*outputs)),
            keep,
            torch.get_num_threads(),
        )
        ctx.set_materialize_grads(False)
        ctx.sizes = [2 * len(params.inp.weights), 4, 2 * len(params.prior.weights)]
        ctx.sizes.append(2 * len(params.post.weights))
        # the tape points into these; saved, so that autograd refuses if they are changed
        ctx.save_for_backward(deter, stoch, embed, action, is_first, noise, *outputs, *parameters)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        deter, stoch, embed, action, _, _, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        inputs = [
            torch.empty(t.shape, dtype=torch.float32) if need else None
            for t, need in zip((deter, stoch, embed, action), needs[3:7], strict=True)
        ]
        parameters = saved[6:]
        groups = [[None] * n for n in ctx.sizes]
        given = None
        if any(needs[9:]):
            layout = torch.contiguous_format
            new = [torch.empty_like(t, memory_format=layout) for t in parameters]
            groups = split(new, ctx.sizes)
            inp, gru, prior, post = groups
            given = (layers(inp), arrays(*gru), layers(prior), layers(post))
        _native.observe_backward(
            ctx.tape,
            tuple(None if g is None else g.contiguous().numpy() for g in grads),
            tuple(arrays(*inputs)),
            given,
            torch.get_num_threads(),
        )
        if grads[4] is None and grads[5] is None:  # nothing reaches the prior
            groups[2] = [None] * ctx.sizes[2]
        if inputs[2] is not None:
            inputs[2] = inputs[2].to(embed.dtype)
        return None, None, None, *inputs, None, None, *(t for group in groups for t in group)
