"""One-hot samples of categoricals and their gradients; see ``fastdreamer.ops.params.OneHot``.

The classes of a categorical lie side by side, and categoricals of all rows one behind the other, so
that what a program handles is a block of categoricals, whatever rows they are of.
"""

import triton
import triton.language as tl

BLOCK = 2048  # classes that a program handles, those that pad a categorical included


@triton.jit
def classes(items, K: tl.constexpr, KP: tl.constexpr, BI: tl.constexpr):
    """The categoricals of a program, their classes, where those lie and which there are."""
    item = tl.program_id(0).to(tl.int64) * BI + tl.arange(0, BI)
    k = tl.arange(0, KP)
    inside = (item < items)[:, None] & (k < K)[None, :]
    return item, k, item[:, None] * K + k[None, :], inside


@triton.jit
def softmax(logits, at, inside):
    """Of each row [BI, KP] of a block; undefined throughout where a logit is."""
    x = tl.load(logits + at, mask=inside, other=-float("inf"))
    e = tl.where(inside, tl.exp(x - tl.max(x, 1)[:, None]), 0.0)
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def gumbel_softmax(logits, noise, at, inside, keep, each):
    """softmax(log p + noise) of each row, the softmax of its logits, and p.

    Where nothing is mixed in log p is the logarithm of no softmax, which may be zero in float32.
    """
    x = tl.load(logits + at, mask=inside, other=-float("inf"))
    x -= tl.max(x, 1)[:, None]
    e = tl.where(inside, tl.exp(x), 0.0)
    total = tl.sum(e, 1)[:, None]
    s = e / total
    p = keep * s + each
    log_p = tl.where(each > 0.0, tl.log(p), x - tl.log(total))
    y = log_p + tl.load(noise + at, mask=inside, other=0.0)
    y = tl.where(inside, y, -float("inf"))
    e = tl.where(inside, tl.exp(y - tl.max(y, 1)[:, None]), 0.0)
    return e / tl.sum(e, 1)[:, None], s, p


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
    item, k, at, inside = classes(items, K, KP, BI)
    p = keep * softmax(logits, at, inside) + each
    u = tl.load(noise + item, mask=item < items, other=0.0)
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
    _, _, at, inside = classes(items, K, KP, BI)
    s = softmax(logits, at, inside)
    d = keep * tl.load(d_sample + at, mask=inside, other=0.0)
    d = s * (d - tl.sum(s * d, 1)[:, None])
    if d_more is not None:
        d += tl.load(d_more + at, mask=inside, other=0.0)
    tl.store(d_logits + at, d, mask=inside)


@triton.jit(do_not_specialize=["items"])
def gumbel_sample_kernel(
    logits,
    noise,  # [items, K] standard Gumbel
    sample,
    items,
    keep,
    each,
    K: tl.constexpr,
    KP: tl.constexpr,
    BI: tl.constexpr,
):
    """The class of the greatest of softmax(log p + noise), the first of equals."""
    _, k, at, inside = classes(items, K, KP, BI)
    soft, _, _ = gumbel_softmax(logits, noise, at, inside, keep, each)
    greatest = soft == tl.max(soft, 1)[:, None]
    drawn = tl.min(tl.where(greatest & inside, k[None, :], KP), 1)
    hot = tl.where(k[None, :] == drawn[:, None], 1.0, 0.0)
    tl.store(sample + at, tl.where(soft == soft, hot, soft), mask=inside)


@triton.jit(do_not_specialize=["items"])
def gumbel_backward_kernel(
    logits,
    noise,
    d_sample,  # [items, K]: straight-through, of softmax(log p + noise)
    d_more,
    d_logits,
    items,
    keep,
    each,
    K: tl.constexpr,
    KP: tl.constexpr,
    BI: tl.constexpr,
):
    """r - s · Σ r with s the softmax and r what reaches its logarithm through log p."""
    _, _, at, inside = classes(items, K, KP, BI)
    soft, s, p = gumbel_softmax(logits, noise, at, inside, keep, each)
    d = tl.load(d_sample + at, mask=inside, other=0.0)
    r = soft * (d - tl.sum(soft * d, 1)[:, None])
    r *= tl.where(each > 0.0, keep * s / p, 1.0)
    d = r - s * tl.sum(r, 1)[:, None]
    if d_more is not None:
        d += tl.load(d_more + at, mask=inside, other=0.0)
    tl.store(d_logits + at, d, mask=inside)
