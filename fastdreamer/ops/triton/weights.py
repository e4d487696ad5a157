"""Weights into their packed form at the start of a program, and their gradients at its end."""

import triton
import triton.language as tl

from fastdreamer.ops.triton.device import kept_moments, standardised


@triton.jit
def pack_kernel(
    weight,  # [GROUPS · N, IN] float32, as torch.nn.Linear has it
    bias,  # [GROUPS · N] float32, or None
    packed,  # [K1P + K2P][GROUPS · NP], or None
    transposed,  # [GROUPS · NP][K1P + K2P], or None
    biases,  # [GROUPS · NP] float32, zeros without a bias; or None
    IN: tl.constexpr,
    FIRST1: tl.constexpr,  # the weight's column where each piece of the input begins
    K1: tl.constexpr,
    K1P: tl.constexpr,
    FIRST2: tl.constexpr,
    K2: tl.constexpr,
    K2P: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    KP: tl.constexpr = K1P + K2P
    TOTAL: tl.constexpr = GROUPS * NP
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    source_row = n // NP * N + n % NP
    valid_n = (n < TOTAL) & (n % NP < N)
    source_column = tl.where(k < K1P, FIRST1 + k, FIRST2 + k - K1P)
    valid_k = tl.where(k < K1P, k < K1, k - K1P < K2)
    w = tl.load(
        weight + source_row[None, :] * IN + source_column[:, None],
        mask=valid_k[:, None] & valid_n[None, :],
        other=0.0,
    )
    mask = (k < KP)[:, None] & (n < TOTAL)[None, :]
    if packed is not None:
        at = k[:, None] * TOTAL + n[None, :]
        tl.store(packed + at, w.to(packed.dtype.element_ty), mask=mask)
    if transposed is not None:
        at = n[None, :] * KP + k[:, None]
        tl.store(transposed + at, w.to(transposed.dtype.element_ty), mask=mask)
    if biases is not None:  # noqa: SIM102 (decided when compiling)
        if tl.program_id(0) == 0:
            b = tl.zeros([BLOCK_N], tl.float32)
            if bias is not None:
                b = tl.load(bias + source_row, mask=valid_n, other=0.0)
            tl.store(biases + n, b, mask=n < TOTAL)


@triton.jit
def pack_gru_bias_kernel(
    bias_ih,  # [3D] float32, rows r, z, n
    bias_hh,
    biases,  # [4 · DP]: r and z of both, n's input part, n's recurrent part
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate, column = at // DP, at % DP
    valid = (gate < 4) & (column < D)
    source = tl.minimum(gate, 2) * D + column
    i = tl.load(bias_ih + source, mask=valid & (gate < 3), other=0.0)
    h = tl.load(bias_hh + source, mask=valid & (gate != 2), other=0.0)
    tl.store(biases + at, i + h, mask=gate < 4)


@triton.jit
def pack_norm_kernel(
    weight,  # [GROUPS · N] float32, or None
    bias,
    packed,  # [2 · W + 16], see device.moments; W is GROUPS · NP
    eps,
    centred,  # 1 where the mean is taken off, else 0
    normed,  # 1; 0 where there is no norm at all
    N: tl.constexpr,
    NP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    W: tl.constexpr = GROUPS * NP
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = at % W
    valid = (at < 2 * W) & (column % NP < N)
    source = column // NP * N + column % NP
    gain = tl.where(valid, 1.0, 0.0)
    if weight is not None:
        gain = tl.load(weight + source, mask=valid & (at < W), other=0.0)
    shift = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        shift = tl.load(bias + source, mask=valid & (at >= W), other=0.0)
    value = tl.where(at < W, gain, shift)
    meta = at - 2 * W
    value = tl.where(meta == 0, N, value)
    value = tl.where(meta == 1, eps, value)
    each = 1.0 / (GROUPS * N)
    value = tl.where(meta == 2, each, value)
    value = tl.where(meta == 3, centred * each, value)
    value = tl.where(meta == 4, normed * each, value)
    tl.store(packed + at, value, mask=at < 2 * W + 16)


@triton.jit(do_not_specialize=["rows", "share"])
def norm_gradient_kernel(
    outer,  # [rows, GRADS], moved to the gradients behind the norm
    sums,  # [rows, TAPE], moved to what the norm was of
    stats,  # the same, moved to what it computed
    d_weight,  # [splits, GROUPS · N] float32, or None
    d_bias,
    rows,
    share,  # rows of a split, a multiple of BR
    GRADS: tl.constexpr,
    TAPE: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    GROUPS: tl.constexpr,
    BO: tl.constexpr,
    BR: tl.constexpr,
):
    """Σ over rows of grads · standardised sums, and of grads; each split sums its share."""
    n = tl.program_id(0) * BO + tl.arange(0, BO)
    inside = n < GROUPS * N
    column = n // N * NP + n % N
    split = tl.program_id(1)
    begin = split.to(tl.int64) * share
    left = (tl.minimum(begin + share, rows) - begin).to(tl.int32)
    outer += begin * GRADS
    sums += begin * TAPE
    stats += begin * TAPE
    row = tl.arange(0, BR)
    of_weight = tl.zeros([BR, BO], tl.float32)
    of_bias = tl.zeros([BR, BO], tl.float32)
    for start in range(0, left, BR):
        at = tl.cast(start, tl.int64)
        alive = start + row < left
        mask = alive[:, None] & inside[None, :]
        where = outer + at * GRADS + row[:, None] * GRADS + column[None, :]
        g = tl.load(where, mask=mask, other=0.0).to(tl.float32)
        mean, inverse = kept_moments(stats + at * TAPE, row, alive, TAPE)
        x = standardised(sums + at * TAPE, mean, inverse, row, alive, column, inside, TAPE)
        of_weight += g * x
        of_bias += g
    out = split.to(tl.int64) * (GROUPS * N) + n
    if d_weight is not None:
        tl.store(d_weight + out, tl.sum(of_weight, 0), mask=inside)
    if d_bias is not None:
        tl.store(d_bias + out, tl.sum(of_bias, 0), mask=inside)


@triton.jit
def add_rows(
    acc,  # [BO, BI]
    total,  # [BO], of the bias
    grads,
    x,
    first,
    d_bias,
    start,  # of the block of rows in its share
    left,
    row,
    columns,  # of grads, and which of them there are
    is_output,
    i,  # the same of x
    is_input,
    GRADS: tl.constexpr,
    XS: tl.constexpr,
):
    """A block of rows added to the gradients of a weight and of its bias."""
    at = tl.cast(start, tl.int64)  # a share's elements may be more than 2³¹, a block's are not
    alive = start + row < left
    g = tl.load(
        grads + at * GRADS + row[None, :] * GRADS + columns[:, None],
        mask=is_output[:, None] & alive[None, :],
        other=0.0,
    )
    kept = alive
    if first is not None:
        kept = alive & (tl.load(first + at + row, mask=alive, other=1) == 0)
    y = tl.load(
        x + at * XS + row[:, None] * XS + i[None, :],
        mask=kept[:, None] & is_input[None, :],
        other=0.0,
    )
    acc = tl.dot(g, y.to(g.dtype), acc, input_precision="ieee")
    if d_bias is not None:
        total += tl.sum(g.to(tl.float32), 1)
    return acc, total


@triton.jit(do_not_specialize=["rows", "share"])
def gradient_kernel(
    grads,  # [rows, GRADS], moved to the layer's first column
    x,  # [rows, XS], the layer's input
    first,  # [rows] bool: rows whose input was zeroed; or None
    d_weight,  # [splits, GROUPS · N, IN] float32, moved to the input's first column
    d_bias,  # [splits, GROUPS · N] float32, or None
    rows,
    share,  # rows of a split, a multiple of BR
    GRADS: tl.constexpr,
    XS: tl.constexpr,
    K: tl.constexpr,  # columns of x
    IN: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    GROUPS: tl.constexpr,
    LAST: tl.constexpr,  # columns skipped before the last group
    BO: tl.constexpr,
    BI: tl.constexpr,
    BR: tl.constexpr,
):
    """Σ over rows of grads · inputᵀ; each split sums its share of the rows."""
    tiles: tl.constexpr = (N + BO - 1) // BO
    group = tl.program_id(0) // tiles
    o = tl.program_id(0) % tiles * BO + tl.arange(0, BO)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    split = tl.program_id(2)
    begin = split.to(tl.int64) * share
    end = tl.minimum(begin + share, rows)
    columns = group * NP + tl.where(group == GROUPS - 1, LAST, 0) + o
    acc = tl.zeros([BO, BI], tl.float32)
    total = tl.zeros([BO], tl.float32)
    grads += begin * GRADS
    x += begin * XS
    if first is not None:
        first += begin
    left = (end - begin).to(tl.int32)
    row = tl.arange(0, BR)
    for start in range(0, left, BR):
        acc, total = add_rows(
            acc, total, grads, x, first, d_bias, start, left, row, columns, o < N, i, i < K,
            GRADS, XS,
        )  # fmt: skip
    out = split.to(tl.int64) * (GROUPS * N) + group * N + o
    tl.store(
        d_weight + out[:, None] * IN + i[None, :], acc, mask=(o < N)[:, None] & (i < K)[None, :]
    )
    if d_bias is not None:  # noqa: SIM102
        if tl.program_id(1) == 0:
            tl.store(d_bias + out, total, mask=o < N)


@triton.jit(do_not_specialize=["size"])
def sum_kernel(parts, total, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Σ over splits of parts [SPLITS, size], in order: the same in every run."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    acc = tl.zeros([BLOCK], tl.float32)
    for _ in range(SPLITS):
        acc += tl.load(parts + at, mask=inside, other=0.0)
        parts += size
    tl.store(total + at, acc, mask=inside)


@triton.jit(do_not_specialize=["size"])
def copy_kernel(
    source,  # [rows, WIDTH] float32, or None
    target,  # [rows · REPEAT, WIDTH]
    size,  # elements of the target
    value,  # what it becomes without a source
    WIDTH: tl.constexpr,
    REPEAT: tl.constexpr,  # each row of the source stands that often
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    new = tl.zeros([BLOCK], tl.float32) + value
    if source is not None:
        new = tl.load(source + at // (WIDTH * REPEAT) * WIDTH + at % WIDTH, mask=inside, other=0.0)
    if ADD:
        new += tl.load(target + at, mask=inside, other=0.0)
    tl.store(target + at, new, mask=inside)
