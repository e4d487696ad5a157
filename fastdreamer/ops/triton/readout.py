"""The number that a head's outputs stand for, see ``fastdreamer.ops.params.Readout``.

Built with ``enable_fp_fusion`` off: terms that are to cancel have to be rounded alike.
"""

import triton
import triton.language as tl

BLOCK = 2048  # outputs that a program handles, those that pad a row included


@triton.jit
def expm1(x):
    """Of x at least 0; the quotient makes up for the rounding of exp near 1 (Kahan)."""
    u = tl.exp(x)
    near = tl.where(u == 1.0, x, (u - 1.0) * (x / tl.where(u == 1.0, 1.0, tl.log(u))))
    return tl.where(x < 1.0, near, u - 1.0)


@triton.jit
def exponentials(raw, row, n, inside, most, N: tl.constexpr):
    """exp(y - most) of a block [BR, NP]."""
    y = tl.load(raw + row[:, None] * N + n[None, :], mask=inside, other=-float("inf"))
    return tl.where(inside, tl.exp(y - most[:, None]), 0.0)


@triton.jit
def expectation(raw, bins, row, real, N: tl.constexpr, NP: tl.constexpr):
    """Σ p · b of each row and p [BR, NP], p = softmax(y).

    The sum is one of mirrored pairs: equal p of bins that stand symmetrically about 0 give 0.
    """
    n = tl.arange(0, NP)
    inside = real[:, None] & (n < N)[None, :]
    y = tl.load(raw + row[:, None] * N + n[None, :], mask=inside, other=-float("inf"))
    most = tl.max(y, 1)
    e = exponentials(raw, row, n, inside, most, N)
    total = tl.sum(e, 1)[:, None]
    p = e / total
    mirrored = exponentials(raw, row, N - 1 - n, inside, most, N) / total
    b = tl.load(bins + n, mask=n < N, other=0.0)[None, :]
    other = tl.load(bins + N - 1 - n, mask=n < N, other=0.0)[None, :]
    return 0.5 * tl.sum(p * b + mirrored * other, 1), p


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    raw,  # [rows, N] float32, as all the others
    bins,  # [N], or None: the first output is the number
    out,  # [rows], written
    rows,
    N: tl.constexpr,
    NP: tl.constexpr,  # a power of two, at least N
    SQUASHED: tl.constexpr,
    BR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    real = row < rows
    if bins is None:
        x = tl.load(raw + row * N, mask=real, other=0.0)
    else:
        x, _ = expectation(raw, bins, row, real, N, NP)
    if SQUASHED:
        y = expm1(tl.abs(x))
        x = tl.where(x < 0, -y, y)
    tl.store(out + row, x, mask=real)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    raw,
    bins,
    d_out,  # [rows]
    d_raw,  # [rows, N], written
    rows,
    N: tl.constexpr,
    NP: tl.constexpr,
    SQUASHED: tl.constexpr,
    BR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    real = row < rows
    n = tl.arange(0, NP)
    d = tl.load(d_out + row, mask=real, other=0.0)
    if bins is None:
        x = tl.load(raw + row * N, mask=real, other=0.0)
        by = tl.where(n == 0, 1.0, 0.0)[None, :]
    else:
        x, p = expectation(raw, bins, row, real, N, NP)
        b = tl.load(bins + n, mask=n < N, other=0.0)
        by = p * (b[None, :] - x[:, None])
    if SQUASHED:
        d *= tl.exp(tl.abs(x))
    at = row[:, None] * N + n[None, :]
    tl.store(d_raw + at, d[:, None] * by, mask=real[:, None] & (n < N)[None, :])
