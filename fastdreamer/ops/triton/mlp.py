"""Multi-layer perceptrons over rows: heads, the actor, the prior of a filter; and their gradients.

Kernels for any number of hidden layers of one padded width. A program takes a block of rows
through all layers; what the last layer becomes is the ``HEAD``:

- "plain": the sums themselves, [rows, OUT]: as many columns as ``out`` has, padded ones too;
- "discount": scale · sigmoid of the sums;
- "hard", forward only: scale where a sum is positive, else 0;
- "normal": mean and std, [rows, N] each;
- "action": squash(mean + std · noise), the mean c·tanh(x / c) where BOUNDED;
- "ready", backward only: ``grads`` holds the output's gradient already.

Columns of the tape: the hidden layers, for the Normals the sums of mean and std, (with activations
of ``layout.OF_SUM`` or with norms) the hidden layers' sums, and what norms computed; of ``grads``:
the hidden layers, the output, and with norms the gradients behind them.
"""

import triton
import triton.language as tl

from fastdreamer.ops.triton.device import (
    at_least_1,
    hidden_backward,
    hidden_layers,
    input_gradient,
    output_block,
    sigmoid,
    squash,
    std_of,
    std_slope,
    tanh,
)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    weights,
    biases,
    norms,  # of the hidden layers, or None
    x1,  # [rows, K1]
    x2,  # [rows, K2], or None with K2 = 0
    extra,  # [rows, first layer] float32 added to the first layer's sum, or None
    noise,  # [rows, N], of an action
    out,  # [rows, OUT] float32; an action's, or a Normal's mean
    std,  # [rows, N], of a Normal
    tape,
    rows,
    bound,  # c
    scale,  # of std, see std_of
    slope,
    offset,
    least,
    floor,
    K1: tl.constexpr,
    K1P: tl.constexpr,
    K2: tl.constexpr,
    K2P: tl.constexpr,
    W: tl.constexpr,
    LAYERS: tl.constexpr,
    NP: tl.constexpr,
    TOTAL: tl.constexpr,
    OUT: tl.constexpr,
    TAPE: tl.constexpr,
    PRE: tl.constexpr,
    STATS: tl.constexpr,
    ACT: tl.constexpr,
    HEAD: tl.constexpr,
    BOUNDED: tl.constexpr,
    SQUASH: tl.constexpr,
    STD: tl.constexpr,
    SAVE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BO: tl.constexpr,  # columns of a block of outputs
):
    block = tl.program_id(0).to(tl.int64) * BM
    row = tl.arange(0, BM)
    real = block + row < rows
    x1 += block * K1
    if K2 > 0:
        x2 += block * K2
    if extra is not None:
        extra += block * (W if LAYERS > 0 else TOTAL)
    tape += block * TAPE
    out += block * OUT
    hidden_layers(
        x1, x2, extra, weights, biases, norms, tape, row, real, real, real,
        K1, K1P, K2, K2P, W, LAYERS, TAPE, PRE, STATS, ACT, BM, BN, BK,
    )  # fmt: skip
    for start in range(0, NP if HEAD == "action" or HEAD == "normal" else TOTAL, BO):
        column = start + tl.arange(0, BO)
        inside = column < (NP if HEAD == "action" or HEAD == "normal" else TOTAL)
        at = row[:, None] * OUT + column[None, :]
        mask = real[:, None] & (column < OUT)[None, :]
        x = output_block(
            x1, x2, extra, weights, biases, tape, row, real, column, inside,
            K1, K1P, K2, K2P, W, LAYERS, TAPE, TOTAL, BM, BO, BK,
        )  # fmt: skip
        if HEAD == "plain" or HEAD == "discount" or HEAD == "hard":
            if HEAD == "discount":
                x = scale * sigmoid(x)
            elif HEAD == "hard":
                x = tl.where(x > 0, scale, 0.0)
            tl.store(out + at, x, mask=mask)
        else:
            y = output_block(
                x1, x2, extra, weights, biases, tape, row, real, NP + column, inside,
                K1, K1P, K2, K2P, W, LAYERS, TAPE, TOTAL, BM, BO, BK,
            )  # fmt: skip
            s = std_of(y, scale, slope, offset, least, floor, STD)
            m = x
            if BOUNDED:
                m = bound * tanh(x / bound)
            if HEAD == "normal":
                tl.store(out + at, m, mask=mask)
                tl.store(std + block * OUT + at, s, mask=mask)
            else:
                eps = tl.load(noise + block * OUT + at, mask=mask, other=0.0)
                tl.store(out + at, squash(m + s * eps, SQUASH), mask=mask)
            if SAVE:
                on = row[:, None] * TAPE + LAYERS * W + column[None, :]
                real_columns = real[:, None] & inside[None, :]
                tl.store(tape + on, x.to(tape.dtype.element_ty), mask=real_columns)
                tl.store(tape + on + NP, y.to(tape.dtype.element_ty), mask=real_columns)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    weights,  # transposed
    norms,
    noise,
    action,  # [rows, N], what the forward kernel returned, an action or a discount
    d_out,  # [rows, N] float32, by what the forward kernel calls out and std; None: HEAD "ready"
    d_std,
    tape,
    grads,  # [rows, GRADS], written
    d_x1,  # [rows, K1]: the gradient is added; None where nothing asks for it
    d_x2,
    rows,
    bound,
    scale,
    slope,
    offset,
    least,
    floor,
    K1: tl.constexpr,
    K1P: tl.constexpr,
    K2: tl.constexpr,
    K2P: tl.constexpr,
    W: tl.constexpr,
    LAYERS: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    TOTAL: tl.constexpr,
    TAPE: tl.constexpr,
    GRADS: tl.constexpr,
    PRE: tl.constexpr,
    STATS: tl.constexpr,
    OUTER: tl.constexpr,
    ACT: tl.constexpr,
    HEAD: tl.constexpr,
    BOUNDED: tl.constexpr,
    SQUASH: tl.constexpr,
    STD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BO: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BM
    row = tl.arange(0, BM)
    real = block + row < rows
    tape += block * TAPE
    grads += block * GRADS
    if HEAD != "ready":
        d_out += block * N
    g_out = grads + LAYERS * W
    KP: tl.constexpr = K1P + K2P
    if HEAD != "ready":  # also for the compiler, which would read the body of an empty loop
        for start in range(0, NP, BO):
            column = start + tl.arange(0, BO)
            inside = real[:, None] & (column < NP)[None, :]
            at = row[:, None] * N + column[None, :]
            mask = real[:, None] & (column < N)[None, :]
            to = row[:, None] * GRADS + column[None, :]
            d = tl.load(d_out + at, mask=mask, other=0.0)
            if HEAD == "plain" or HEAD == "discount":
                if HEAD == "discount":
                    y = tl.load(action + block * N + at, mask=mask, other=0.0)
                    d *= y * (1.0 - tl.where(scale == 0.0, 0.0, y / scale))
                tl.store(g_out + to, d.to(grads.dtype.element_ty), mask=inside)
            else:
                if HEAD == "action":
                    if SQUASH == "tanh":
                        a = tl.load(action + block * N + at, mask=mask, other=0.0)
                        d *= 1.0 - a * a
                    eps = tl.load(noise + block * N + at, mask=mask, other=0.0)
                    if SQUASH == "bound":  # none and clip have a slope of 1
                        on = row[:, None] * TAPE + LAYERS * W + column[None, :]
                        m = tl.load(tape + on, mask=inside, other=0.0).to(tl.float32)
                        if BOUNDED:
                            m = bound * tanh(m / bound)
                        y = tl.load(tape + on + NP, mask=inside, other=0.0).to(tl.float32)
                        s = std_of(y, scale, slope, offset, least, floor, STD)
                        d /= at_least_1(m + s * eps)
                    d_s = d * eps
                else:
                    d_s = tl.load(d_std + block * N + at, mask=mask, other=0.0)
                on = row[:, None] * TAPE + LAYERS * W + column[None, :]
                if BOUNDED:
                    t = tanh(tl.load(tape + on, mask=inside, other=0.0).to(tl.float32) / bound)
                    d *= 1.0 - t * t
                y = tl.load(tape + on + NP, mask=inside, other=0.0).to(tl.float32)
                d_s *= std_slope(y, scale, slope, offset, least, floor, STD)
                tl.store(g_out + to, d.to(grads.dtype.element_ty), mask=inside)
                tl.store(g_out + to + NP, d_s.to(grads.dtype.element_ty), mask=inside)
    if HEAD != "ready":
        tl.debug_barrier()
    hidden_backward(
        weights, norms, tape, grads, row, real,
        KP, W, LAYERS, TOTAL, TAPE, GRADS, PRE, STATS, OUTER, ACT, BM, BN, BK,
    )  # fmt: skip
    if d_x1 is not None:
        for start in range(0, K1P, BN):
            column = start + tl.arange(0, BN)
            acc = input_gradient(
                weights, grads, row, real, column, column < K1P,
                KP, W, LAYERS, TOTAL, GRADS, BM, BN, BK,
            )  # fmt: skip
            at = block * K1 + row[:, None] * K1 + column[None, :]
            mask = real[:, None] & (column < K1)[None, :]
            acc += tl.load(d_x1 + at, mask=mask, other=0.0)
            tl.store(d_x1 + at, acc, mask=mask)
        if K2 > 0:
            for start in range(0, K2P, BO):
                column = start + tl.arange(0, BO)
                acc = input_gradient(
                    weights, grads, row, real, K1P + column, column < K2P,
                    KP, W, LAYERS, TOTAL, GRADS, BM, BO, BK,
                )  # fmt: skip
                at = block * K2 + row[:, None] * K2 + column[None, :]
                mask = real[:, None] & (column < K2)[None, :]
                acc += tl.load(d_x2 + at, mask=mask, other=0.0)
                tl.store(d_x2 + at, acc, mask=mask)
