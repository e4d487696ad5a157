"""Layers whose columns are shared out to programs, and what stands between them.

For recurrences too large for one program a block of rows: the block-diagonal one, whose blocks are
groups of columns, and any behind layers of stoch and action apart. A layer's inputs are up to four
pieces: one that each block has a part of to itself (``own``) and those that all blocks see. What a
kernel leaves in the tape or in ``grads`` the next one takes, so that only norms, which are over all
columns, have a barrier within.

Columns of a layer are padded part by part: block g's gate i begins at (3 · g + i) · NP. Shapes are
described by :class:`fastdreamer.ops.triton.layout.LinearShape`.
"""

import triton
import triton.language as tl

from fastdreamer.ops.triton.device import (
    accumulate,
    activate,
    activation_slope,
    before_norm,
    behind_norm,
    bias_block,
    keep_moments,
    kept_moments,
    moments,
    scaled,
    sigmoid,
    slope_at,
    standardised,
    tanh,
)
from fastdreamer.ops.triton.weights import add_rows

COLUMNS = 1024  # of a block of a row, at most
THREADS = 128  # of its program, and so columns at least: else several threads have one of them, and
# one may load a gradient in whose place another has stored already


@triton.jit
def pack_kernel(
    weight,  # float32, moved to the first input of the piece
    bias,  # [GROUPS · GATES · N], or None
    packed,  # [GROUPS][KP][GATES · NP], moved to the piece; or None
    transposed,  # [GROUPS][GATES · NP][KP], likewise
    biases,  # [GROUPS · GATES · NP], zeros without a bias; or None
    SG: tl.constexpr,  # strides of a block, an input and an output
    SK: tl.constexpr,
    SN: tl.constexpr,
    K: tl.constexpr,  # inputs of the piece
    K_PADDED: tl.constexpr,
    KP: tl.constexpr,  # padded inputs of all pieces
    N: tl.constexpr,
    NP: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    TOTAL: tl.constexpr = GATES * NP
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(2)
    of = n // NP * N + n % NP
    valid = (n < TOTAL) & (n % NP < N)
    w = tl.load(
        weight + group * SG + k[:, None] * SK + of[None, :] * SN,
        mask=(k < K)[:, None] & valid[None, :],
        other=0.0,
    )
    mask = (k < K_PADDED)[:, None] & (n < TOTAL)[None, :]
    if packed is not None:
        at = group * KP * TOTAL + k[:, None] * TOTAL + n[None, :]
        tl.store(packed + at, w.to(packed.dtype.element_ty), mask=mask)
    if transposed is not None:
        at = group * KP * TOTAL + n[None, :] * KP + k[:, None]
        tl.store(transposed + at, w.to(transposed.dtype.element_ty), mask=mask)
    if biases is not None:  # noqa: SIM102 (decided when compiling)
        if tl.program_id(0) == 0:
            b = tl.zeros([BLOCK_N], tl.float32)
            if bias is not None:
                b = tl.load(bias + group * GATES * N + of, mask=valid, other=0.0)
            tl.store(biases + group * TOTAL + n, b, mask=n < TOTAL)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    weights,  # [GROUPS][KP][TOTAL], the pieces one behind the other
    biases,  # [GROUPS · TOTAL] float32
    own,  # [rows, XS]: OWN columns of each block, APART from those of the next; or None
    x1,  # [rows, TAPE], K1 columns for all blocks; or None, as the next two
    x2,
    x3,
    sums,  # [rows, TAPE], GROUPS · TOTAL columns are written
    rows,
    OWN: tl.constexpr,
    XS: tl.constexpr,
    APART: tl.constexpr,
    KP: tl.constexpr,
    P1: tl.constexpr,  # where in KP the pieces for all blocks begin
    P2: tl.constexpr,
    P3: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    K3: tl.constexpr,
    TOTAL: tl.constexpr,
    TAPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """W [own, x1, x2, x3] + b of a block of rows and of columns."""
    TILES: tl.constexpr = (TOTAL + BN - 1) // BN
    begin = tl.program_id(0).to(tl.int64) * BM
    row = tl.arange(0, BM)
    real = begin + row < rows
    group = tl.program_id(1) // TILES
    column = tl.program_id(1) % TILES * BN + tl.arange(0, BN)
    inside = column < TOTAL
    w = weights + group * KP * TOTAL
    acc = bias_block(biases + group * TOTAL, column, inside, BM, BN)
    if own is not None:
        x = own + begin * XS + group * APART
        acc = accumulate(acc, x, w, row, real, column, inside, OWN, XS, TOTAL, BK)
    if x1 is not None:
        x = x1 + begin * TAPE
        acc = accumulate(acc, x, w + P1 * TOTAL, row, real, column, inside, K1, TAPE, TOTAL, BK)
    if x2 is not None:
        x = x2 + begin * TAPE
        acc = accumulate(acc, x, w + P2 * TOTAL, row, real, column, inside, K2, TAPE, TOTAL, BK)
    if x3 is not None:
        x = x3 + begin * TAPE
        acc = accumulate(acc, x, w + P3 * TOTAL, row, real, column, inside, K3, TAPE, TOTAL, BK)
    at = begin * TAPE + row[:, None] * TAPE + group * TOTAL + column[None, :]
    tl.store(sums + at, acc.to(sums.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    weights,  # [GROUPS][TOTAL][KP], moved to the piece
    grads,  # [rows, GRADS] by the sums, GROUPS · TOTAL columns
    d_x,  # [rows, XS], moved to the piece: K columns, of each block APART from those of the next
    rows,
    GROUPS: tl.constexpr,  # that see the same piece, whose gradients are summed; 1: each has one
    K: tl.constexpr,
    KP: tl.constexpr,
    XS: tl.constexpr,
    APART: tl.constexpr,
    TOTAL: tl.constexpr,
    GRADS: tl.constexpr,
    ADD: tl.constexpr,  # whether to what is there
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The gradient by a piece of the input."""
    TILES: tl.constexpr = (K + BN - 1) // BN
    begin = tl.program_id(0).to(tl.int64) * BM
    row = tl.arange(0, BM)
    real = begin + row < rows
    first = tl.program_id(1) // TILES
    column = tl.program_id(1) % TILES * BN + tl.arange(0, BN)
    inside = column < K
    acc = tl.zeros([BM, BN], tl.float32)
    for i in range(GROUPS):
        group = first + i
        g = grads + begin * GRADS + group * TOTAL
        w = weights + group * KP * TOTAL
        acc = accumulate(acc, g, w, row, real, column, inside, TOTAL, GRADS, KP, BK)
    at = begin * XS + row[:, None] * XS + first * APART + column[None, :]
    mask = real[:, None] & inside[None, :]
    if ADD:
        acc += tl.load(d_x + at, mask=mask, other=0.0)
    tl.store(d_x + at, acc.to(d_x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "share"])
def gradient_kernel(
    grads,  # [rows, GRADS] by the sums
    x,  # [rows, XS], a piece of the input: K columns, of each block APART from those of the next
    d_weight,  # [splits, SIZE] float32, moved to the piece
    d_bias,  # [splits, GROUPS · GATES · N] float32, or None
    rows,
    share,  # rows of a split, a multiple of BR
    GRADS: tl.constexpr,
    XS: tl.constexpr,
    APART: tl.constexpr,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    SG: tl.constexpr,  # strides of a block, an input and an output
    SK: tl.constexpr,
    SN: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    GATES: tl.constexpr,
    GROUPS: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BR: tl.constexpr,
):
    """Σ over rows of grads · inputᵀ, block by block; each split sums its share of the rows."""
    tiles: tl.constexpr = (N + BO - 1) // BO
    part = tl.program_id(0) // tiles  # block and gate
    group = part // GATES
    o = tl.program_id(0) % tiles * BO + tl.arange(0, BO)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    split = tl.program_id(2).to(tl.int64)
    begin = split * share
    left = (tl.minimum(begin + share, rows) - begin).to(tl.int32)
    grads += begin * GRADS + part * NP
    x += begin * XS + group * APART
    row = tl.arange(0, BR)
    acc = tl.zeros([BO, BI], tl.float32)
    total = tl.zeros([BO], tl.float32)
    for start in range(0, left, BR):
        acc, total = add_rows(
            acc, total, grads, x, None, d_bias, start, left, row, o, o < N, i, i < K, GRADS, XS
        )
    out = part % GATES * N + o
    tl.store(
        d_weight + split * SIZE + group * SG + out[:, None] * SN + i[None, :] * SK,
        acc,
        mask=(o < N)[:, None] & (i < K)[None, :],
    )
    if d_bias is not None:  # noqa: SIM102
        if tl.program_id(1) == 0:
            tl.store(d_bias + split * (GROUPS * GATES * N) + part * N + o, total, mask=o < N)


@triton.jit
def activation_kernel(
    sums,  # [rows, TAPE], W columns of it
    value,  # likewise, written
    norm,  # packed, or None
    stats,  # receives what the norm computed
    W: tl.constexpr,
    NP: tl.constexpr,  # columns of a block, the last of them perhaps padding
    TAPE: tl.constexpr,
    ACT: tl.constexpr,
    BN: tl.constexpr,
):
    """act(norm(sums)) of one row."""
    begin = tl.program_id(0).to(tl.int64) * TAPE
    row = tl.arange(0, 1)
    real = row < 1
    sums += begin
    value += begin
    if norm is not None:
        stats += begin
        mean, inverse = moments(sums, norm, row, real, W, NP, TAPE, 1, BN)
        keep_moments(stats, mean, inverse, row, real, TAPE)
    for start in range(0, W, BN):
        column = start + tl.arange(0, BN)
        inside = column < W
        mask = real[:, None] & inside[None, :]
        at = row[:, None] * TAPE + column[None, :]
        if norm is None:
            x = tl.load(sums + at, mask=mask, other=0.0).to(tl.float32)
        else:
            x = standardised(sums, mean, inverse, row, real, column, inside, TAPE)
            x = scaled(x, norm, column, inside, W)
        tl.store(value + at, activate(x, ACT).to(value.dtype.element_ty), mask=mask)


@triton.jit
def activation_backward_kernel(
    at_slope,  # [rows, TAPE]: with a norm the sums, without what ``activation_slope`` takes
    norm,
    stats,
    outer,  # [rows, GRADS] by the values; becomes that behind the norm
    inner,  # by the sums, written; without a norm in the same place
    W: tl.constexpr,
    NP: tl.constexpr,
    TAPE: tl.constexpr,
    GRADS: tl.constexpr,
    ACT: tl.constexpr,
    BN: tl.constexpr,
):
    row = tl.arange(0, 1)
    real = row < 1
    at_slope += tl.program_id(0).to(tl.int64) * TAPE
    outer += tl.program_id(0).to(tl.int64) * GRADS
    inner += tl.program_id(0).to(tl.int64) * GRADS
    if norm is not None:
        stats += tl.program_id(0).to(tl.int64) * TAPE
        mean, inverse = kept_moments(stats, row, real, TAPE)
        total = tl.zeros([1], tl.float32)
        along = tl.zeros([1], tl.float32)
    for start in range(0, W, BN):
        column = start + tl.arange(0, BN)
        inside = column < W
        mask = real[:, None] & inside[None, :]
        at = row[:, None] * GRADS + column[None, :]
        g = tl.load(outer + at, mask=mask, other=0.0).to(tl.float32)
        if norm is None:
            y = tl.load(at_slope + row[:, None] * TAPE + column[None, :], mask=mask, other=0.0)
            g *= activation_slope(y.to(tl.float32), ACT)
            tl.store(inner + at, g.to(inner.dtype.element_ty), mask=mask)
        else:
            x = standardised(at_slope, mean, inverse, row, real, column, inside, TAPE)
            g *= slope_at(scaled(x, norm, column, inside, W), ACT)
            total, along = behind_norm(
                g, x, norm, outer, total, along, row, real, column, inside, GRADS
            )
    if norm is not None:
        tl.debug_barrier()
        before_norm(
            inner, outer, at_slope, norm, mean, inverse, total, along, row, real,
            W, NP, TAPE, GRADS, 1, BN,
        )  # fmt: skip


@triton.jit
def gate(sums, norm, mean, inverse, row, real, column, inside, W: tl.constexpr, TAPE: tl.constexpr):
    """A block of a gate's sums, standardised, and what the norm makes of it."""
    if norm is None:
        at = row[:, None] * TAPE + column[None, :]
        x = tl.load(sums + at, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        y = x
    else:
        x = standardised(sums, mean, inverse, row, real, column, inside, TAPE)
        y = scaled(x, norm, column, inside, W)
    return x, y


@triton.jit
def gates_kernel(
    sums,  # [rows, TAPE]: of the gates or, torch's GRU, of their part by x
    of_h,  # the latter's part by h; or None
    norm,  # over all three gates, of one block; or None
    stats,
    deter,  # [rows, D] float32
    new_deter,
    D: tl.constexpr,
    UNITS: tl.constexpr,  # of a block
    NP: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,  # where reset, candidate and update are in the outputs of a block
    C: tl.constexpr,
    U: tl.constexpr,
    UPDATE_BIAS: tl.constexpr,
    TAPE: tl.constexpr,
    BN: tl.constexpr,
):
    """u · tanh(r · c) + (1 - u) · h, or torch's (1 - z) · tanh(nx + r · nh) + z · h, of one row."""
    begin = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, 1)
    real = row < 1
    sums += begin * TAPE
    mean = tl.zeros([1], tl.float32)
    inverse = tl.zeros([1], tl.float32)
    if of_h is not None:
        of_h += begin * TAPE
    if norm is not None:
        stats += begin * TAPE
        mean, inverse = moments(sums, norm, row, real, W, NP, TAPE, 1, BN)
        keep_moments(stats, mean, inverse, row, real, TAPE)
    for start in range(0, D, BN):
        column = start + tl.arange(0, BN)
        inside = column < D
        at = column // UNITS * (3 * NP) + column % UNITS
        mask = real[:, None] & inside[None, :]
        h = tl.load(deter + begin * D + column[None, :], mask=mask, other=0.0)
        _, r = gate(sums, norm, mean, inverse, row, real, at + R * NP, inside, W, TAPE)
        _, c = gate(sums, norm, mean, inverse, row, real, at + C * NP, inside, W, TAPE)
        _, u = gate(sums, norm, mean, inverse, row, real, at + U * NP, inside, W, TAPE)
        if of_h is None:
            u = sigmoid(u + UPDATE_BIAS)
            new = u * tanh(sigmoid(r) * c) + (1.0 - u) * h
        else:
            _, hr = gate(of_h, None, mean, inverse, row, real, at + R * NP, inside, W, TAPE)
            _, hc = gate(of_h, None, mean, inverse, row, real, at + C * NP, inside, W, TAPE)
            _, hu = gate(of_h, None, mean, inverse, row, real, at + U * NP, inside, W, TAPE)
            u = sigmoid(u + hu)
            new = (1.0 - u) * tanh(c + sigmoid(r + hr) * hc) + u * h
        tl.store(new_deter + begin * D + column[None, :], new, mask=mask)


@triton.jit
def gates_backward_kernel(
    sums,
    of_h,
    norm,
    stats,
    deter,
    d_new_deter,  # [rows, D] float32
    d_deter,  # the part that passes the gates is added
    outer,  # [rows, GRADS], gradients behind the norm are written; without one not used
    inner,  # by the sums, written
    inner_h,  # by the part by h, or None
    D: tl.constexpr,
    UNITS: tl.constexpr,
    NP: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    U: tl.constexpr,
    UPDATE_BIAS: tl.constexpr,
    TAPE: tl.constexpr,
    GRADS: tl.constexpr,
    BN: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, 1)
    real = row < 1
    sums += begin * TAPE
    inner += begin * GRADS
    mean = tl.zeros([1], tl.float32)
    inverse = tl.zeros([1], tl.float32)
    total = tl.zeros([1], tl.float32)
    along = tl.zeros([1], tl.float32)
    if of_h is not None:
        of_h += begin * TAPE
        inner_h += begin * GRADS
    if norm is not None:
        stats += begin * TAPE
        outer += begin * GRADS
        mean, inverse = kept_moments(stats, row, real, TAPE)
    for start in range(0, W // 3, BN):  # padding, too, where gradients are 0
        column = start + tl.arange(0, BN)
        inside = column < W // 3
        at = column // NP * (3 * NP) + column % NP
        to = row[:, None] * GRADS + at[None, :]
        mask = real[:, None] & inside[None, :]
        unit = column // NP * UNITS + column % NP
        on = begin * D + row[:, None] * D + unit[None, :]
        valid = mask & (column % NP < UNITS)[None, :]
        h = tl.load(deter + on, mask=valid, other=0.0)
        dh = tl.load(d_new_deter + on, mask=valid, other=0.0)
        xr, r = gate(sums, norm, mean, inverse, row, real, at + R * NP, inside, W, TAPE)
        xc, c = gate(sums, norm, mean, inverse, row, real, at + C * NP, inside, W, TAPE)
        xu, u = gate(sums, norm, mean, inverse, row, real, at + U * NP, inside, W, TAPE)
        if of_h is None:
            r, u = sigmoid(r), sigmoid(u + UPDATE_BIAS)
            n = tanh(r * c)
            dc = dh * u * (1.0 - n * n)
            du = dh * (n - h) * u * (1.0 - u)
            dr = dc * c * r * (1.0 - r)
            dc *= r
            kept = 1.0 - u
        else:
            _, hr = gate(of_h, None, mean, inverse, row, real, at + R * NP, inside, W, TAPE)
            _, hc = gate(of_h, None, mean, inverse, row, real, at + C * NP, inside, W, TAPE)
            _, hu = gate(of_h, None, mean, inverse, row, real, at + U * NP, inside, W, TAPE)
            r, u = sigmoid(r + hr), sigmoid(u + hu)
            n = tanh(c + r * hc)
            dc = dh * (1.0 - u) * (1.0 - n * n)
            du = dh * (h - n) * u * (1.0 - u)
            dr = dc * hc * r * (1.0 - r)
            kept = u
            tl.store(inner_h + to + R * NP, dr.to(inner_h.dtype.element_ty), mask=mask)
            tl.store(inner_h + to + C * NP, (dc * r).to(inner_h.dtype.element_ty), mask=mask)
            tl.store(inner_h + to + U * NP, du.to(inner_h.dtype.element_ty), mask=mask)
        direct = tl.load(d_deter + on, mask=valid, other=0.0)
        tl.store(d_deter + on, direct + dh * kept, mask=valid)
        if norm is None:
            tl.store(inner + to + R * NP, dr.to(inner.dtype.element_ty), mask=mask)
            tl.store(inner + to + C * NP, dc.to(inner.dtype.element_ty), mask=mask)
            tl.store(inner + to + U * NP, du.to(inner.dtype.element_ty), mask=mask)
        else:
            total, along = behind_norm(
                dr, xr, norm, outer, total, along, row, real, at + R * NP, inside, GRADS
            )
            total, along = behind_norm(
                dc, xc, norm, outer, total, along, row, real, at + C * NP, inside, GRADS
            )
            total, along = behind_norm(
                du, xu, norm, outer, total, along, row, real, at + U * NP, inside, GRADS
            )
    if norm is not None:
        tl.debug_barrier()
        before_norm(
            inner, outer, sums, norm, mean, inverse, total, along, row, real,
            W, NP, TAPE, GRADS, 1, BN,
        )  # fmt: skip
