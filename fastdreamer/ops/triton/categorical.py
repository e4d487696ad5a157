"""One-hot samples of categoricals and their gradients; see ``fastdreamer.ops.params.OneHot``.

The classes of a categorical lie side by side, and categoricals of all rows one behind the other, so
that what a program handles is a block of categoricals, whatever rows they are of.
"""

import triton
import triton.language as tl

BLOCK = 2048  # classes that a program handles, those that pad a categorical included


@triton.jit
def softmax(logits, at, inside):
    """Of each row [BI, KP] of a block; undefined throughout where a logit is."""
    x = tl.load(logits + at, mask=inside, other=-float("inf"))
    e = tl.where(inside, tl.exp(x - tl.max(x, 1)[:, None]), 0.0)
    return e / tl.sum(e, 1)[:, None]


@triton.jit(do_not_specialize=["items"])
def sample_kernel(
    logits,  # [items, K] float32, as all the others
    noise,  # [items] uniform in [0, 1)
    sample,  # [items, K], written
    items,
    keep,  # 1 - unimix
    each,  # unimix / K
    K: tl.constexpr,
    KP: tl.constexpr,  # a power of two, at least K
    BI: tl.constexpr,
):
    """The class whose part of the cumulative sums of p holds the noise, the last one behind all."""
    item = tl.program_id(0).to(tl.int64) * BI + tl.arange(0, BI)
    k = tl.arange(0, KP)
    real = item < items
    inside = real[:, None] & (k < K)[None, :]
    at = item[:, None] * K + k[None, :]
    p = keep * softmax(logits, at, inside) + each
    u = tl.load(noise + item, mask=real, other=0.0)
    below = (tl.cumsum(p, 1) <= u[:, None]) & (k < K)[None, :]
    drawn = tl.minimum(tl.sum(below.to(tl.int32), 1), K - 1)
    hot = tl.where(k[None, :] == drawn[:, None], 1.0, 0.0)
    tl.store(sample + at, tl.where(p == p, hot, p), mask=inside)


@triton.jit(do_not_specialize=["items"])
def backward_kernel(
    logits,
    d_sample,  # [items, K]: straight-through, of p
    d_more,  # what reaches the logits beside it, or None
    d_logits,  # written
    items,
    keep,
    K: tl.constexpr,
    KP: tl.constexpr,
    BI: tl.constexpr,
):
    """s · (d - Σ s · d) with s the softmax and d = keep · d_sample."""
    item = tl.program_id(0).to(tl.int64) * BI + tl.arange(0, BI)
    k = tl.arange(0, KP)
    inside = (item < items)[:, None] & (k < K)[None, :]
    at = item[:, None] * K + k[None, :]
    s = softmax(logits, at, inside)
    d = keep * tl.load(d_sample + at, mask=inside, other=0.0)
    d = s * (d - tl.sum(s * d, 1)[:, None])
    if d_more is not None:
        d += tl.load(d_more + at, mask=inside, other=0.0)
    tl.store(d_logits + at, d, mask=inside)
