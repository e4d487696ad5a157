"""One step of the dynamics and its gradient, each as one kernel of a program per block of rows.

The latent distribution is the prior of a rollout or the posterior of a filter: they differ in
what is added to the first layer's sum (``extra``, the embedding's part) and in the reset
(``first``), so the same two kernels serve :func:`fastdreamer.ops.imagine` and
:func:`fastdreamer.ops.observe`.

Columns of the tape: the input layers, the GRU's r, z, n and the recurrent part of n's sum, the
latent's hidden layers, the sum that becomes std, and behind them (with activations of
``layout.OF_SUM`` or with norms) the input and latent layers' sums, then what norms computed.
Columns of ``grads``, gradients by sums: the input layers, r, z, n, n's recurrent part, the latent's
hidden layers, mean and std, and the gradients behind norms. Where the GRU's reset is inside its
candidate (``LATE``) its columns are the three sums in the order of its rows, and their gradients.
Both are described by :class:`fastdreamer.ops.triton.layout.StepShape`.
"""

import triton
import triton.language as tl

from fastdreamer.ops.triton.device import (
    accumulate,
    accumulate_gates,
    before_norm,
    behind_norm,
    bias_block,
    hidden_backward,
    hidden_layers,
    input_gradient,
    keep_moments,
    kept_moments,
    layer_gradient,
    moments,
    output_block,
    scaled,
    sigmoid,
    standardised,
    std_of,
    std_slope,
    tanh,
)


@triton.jit
def late_gru(
    x,  # [*, TAPE], IW columns
    deter,
    wih,
    whh,
    bias,  # of the three sums
    norm,
    sums,  # receives them
    stats,
    new_deter,
    row,
    real,
    kept,  # rows of deter that are read
    D: tl.constexpr,
    DP: tl.constexpr,
    IW: tl.constexpr,
    TAPE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    U: tl.constexpr,
    UPDATE_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BG: tl.constexpr,
    BK: tl.constexpr,
):
    """u · tanh(r · c) + (1 - u) · h of r, c, u = norm(W [x, h] + b), the update's bias added."""
    for start in range(0, DP, BG):
        column = start + tl.arange(0, BG)
        inside = column < DP
        first = bias_block(bias, column, inside, BM, BG)
        second = bias_block(bias + DP, column, inside, BM, BG)
        third = bias_block(bias + 2 * DP, column, inside, BM, BG)
        first, second, third = accumulate_gates(
            first, second, third, x, wih, row, real, column, inside, IW, TAPE, DP, BK
        )
        first, second, third = accumulate_gates(
            first, second, third, deter, whh, row, kept, column, inside, D, D, DP, BK
        )
        at = row[:, None] * TAPE + column[None, :]
        mask = real[:, None] & inside[None, :]
        tl.store(sums + at, first.to(sums.dtype.element_ty), mask=mask)
        tl.store(sums + at + DP, second.to(sums.dtype.element_ty), mask=mask)
        tl.store(sums + at + 2 * DP, third.to(sums.dtype.element_ty), mask=mask)
    tl.debug_barrier()
    mean, inverse = moments(sums, norm, row, real, 3 * DP, DP, TAPE, BM, BG)
    keep_moments(stats, mean, inverse, row, real, TAPE)
    for start in range(0, DP, BG):
        column = start + tl.arange(0, BG)
        inside = column < DP
        _, r = late_gate(sums, norm, mean, inverse, row, real, column, inside, R, DP, TAPE)
        _, c = late_gate(sums, norm, mean, inverse, row, real, column, inside, C, DP, TAPE)
        _, u = late_gate(sums, norm, mean, inverse, row, real, column, inside, U, DP, TAPE)
        u = sigmoid(u + UPDATE_BIAS)
        n = tanh(sigmoid(r) * c)
        at = row[:, None] * D + column[None, :]
        valid = (column < D)[None, :]
        h = tl.load(deter + at, mask=kept[:, None] & valid, other=0.0)
        tl.store(new_deter + at, u * n + (1.0 - u) * h, mask=real[:, None] & valid)


@triton.jit
def late_gate(
    sums, norm, mean, inverse, row, real, column, inside,
    AT: tl.constexpr,
    DP: tl.constexpr,
    TAPE: tl.constexpr,
):  # fmt: skip
    """A block of a gate's sums, standardised, and what the norm makes of it."""
    x = standardised(sums + AT * DP, mean, inverse, row, real, column, inside, TAPE)
    return x, scaled(x, norm + AT * DP, column, inside, 3 * DP)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    weights,  # packed, the input layers first, then W_ih, W_hh, then the latent's
    biases,  # float32
    i_norms,  # of the input layers, or None
    g_norm,  # of a late GRU's gates, which has one in any case
    l_norms,  # of the latent's hidden layers, or None
    deter,  # [rows, D] float32, as all the states and noise
    stoch,
    action,
    noise,  # None, as new_stoch, where STD is "logits": then mean is those, drawn from afterwards
    first,  # [rows] bool: where to zero what RESET_ says before the step; or None
    extra,  # [rows, first layer of the latent] float32, or None
    new_deter,
    new_stoch,
    mean,  # [rows, S] or None
    std,
    tape,  # [rows, TAPE], dtype of the weights
    rows,
    scale,  # of std, see std_of
    slope,
    offset,
    least,
    floor,
    A: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    AP: tl.constexpr,  # padded sizes
    DP: tl.constexpr,
    SP: tl.constexpr,
    IW: tl.constexpr,  # width and number of the input layers
    IL: tl.constexpr,
    LW: tl.constexpr,  # of the latent's hidden layers
    LL: tl.constexpr,
    I_ACT: tl.constexpr,
    L_ACT: tl.constexpr,
    I_PRE: tl.constexpr,
    L_PRE: tl.constexpr,
    I_STATS: tl.constexpr,
    G_STATS: tl.constexpr,
    L_STATS: tl.constexpr,
    LATE: tl.constexpr,
    R: tl.constexpr,  # where reset, candidate and update are in the rows of a late GRU
    C: tl.constexpr,
    U: tl.constexpr,
    UPDATE_BIAS: tl.constexpr,
    STD: tl.constexpr,
    RESET_D: tl.constexpr,
    RESET_S: tl.constexpr,
    RESET_A: tl.constexpr,
    SAVE: tl.constexpr,  # whether the tape is for a backward pass
    TAPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BG: tl.constexpr,  # columns of a block of gates
    BS: tl.constexpr,  # and of the outputs
):
    OUT: tl.constexpr = SP if STD == "logits" else 2 * SP
    block = tl.program_id(0).to(tl.int64) * BM
    row = tl.arange(0, BM)
    real = block + row < rows
    deter += block * D
    stoch += block * S
    action += block * A
    if STD != "logits":
        noise += block * S
    new_deter += block * D
    if STD != "logits":
        new_stoch += block * S
    tape += block * TAPE
    kept_d, kept_s, kept_a = real, real, real
    if first is not None:
        goes_on = real & (tl.load(first + block + row, mask=real, other=0) == 0)
        kept_d = goes_on if RESET_D else real
        kept_s = goes_on if RESET_S else real
        kept_a = goes_on if RESET_A else real
    if extra is not None:
        extra += block * (LW if LL > 0 else OUT)

    hidden_layers(
        stoch, action, None, weights, biases, i_norms, tape, row, real, kept_s, kept_a,
        S, SP, A, AP, IW, IL, TAPE, I_PRE, I_STATS, I_ACT, BM, BN, BK,
    )  # fmt: skip

    wih = weights + (SP + AP + (IL - 1) * IW) * IW
    whh = wih + IW * 3 * DP
    bias = biases + IL * IW
    gates = tape + IL * IW
    if LATE:
        late_gru(
            gates - IW, deter, wih, whh, bias, g_norm, gates, gates + G_STATS, new_deter,
            row, real, kept_d, D, DP, IW, TAPE, R, C, U, UPDATE_BIAS, BM, BG, BK,
        )  # fmt: skip
    else:
        for start in range(0, DP, BG):
            column = start + tl.arange(0, BG)
            inside = column < DP
            r = bias_block(bias, column, inside, BM, BG)
            z = bias_block(bias + DP, column, inside, BM, BG)
            nx = bias_block(bias + 2 * DP, column, inside, BM, BG)
            nh = bias_block(bias + 3 * DP, column, inside, BM, BG)
            r, z, nx = accumulate_gates(
                r, z, nx, gates - IW, wih, row, real, column, inside, IW, TAPE, DP, BK
            )
            r, z, nh = accumulate_gates(
                r, z, nh, deter, whh, row, kept_d, column, inside, D, D, DP, BK
            )
            r, z = sigmoid(r), sigmoid(z)
            n = tanh(nx + r * nh)
            at = row[:, None] * D + column[None, :]
            valid = (column < D)[None, :]
            h = tl.load(deter + at, mask=kept_d[:, None] & valid, other=0.0)
            tl.store(new_deter + at, (1.0 - z) * n + z * h, mask=real[:, None] & valid)
            if SAVE:
                at = row[:, None] * TAPE + column[None, :]
                mask = real[:, None] & inside[None, :]
                tl.store(gates + at, r.to(tape.dtype.element_ty), mask=mask)
                tl.store(gates + at + DP, z.to(tape.dtype.element_ty), mask=mask)
                tl.store(gates + at + 2 * DP, n.to(tape.dtype.element_ty), mask=mask)
                tl.store(gates + at + 3 * DP, nh.to(tape.dtype.element_ty), mask=mask)
    tl.debug_barrier()

    lw = whh + DP * 3 * DP
    GATES: tl.constexpr = 3 if LATE else 4
    lb = bias + GATES * DP
    latent = gates + GATES * DP
    hidden_layers(
        new_deter, None, extra, lw, lb, l_norms, latent, row, real, real, real,
        D, DP, 0, 0, LW, LL, TAPE, L_PRE, L_STATS, L_ACT, BM, BN, BK,
    )  # fmt: skip
    for start in range(0, SP, BS):
        column = start + tl.arange(0, BS)
        inside = column < SP
        m = output_block(
            new_deter, None, extra, lw, lb, latent, row, real, column, inside,
            D, DP, 0, 0, LW, LL, TAPE, OUT, BM, BS, BK,
        )  # fmt: skip
        if STD == "logits":
            at = row[:, None] * S + column[None, :]
            tl.store(mean + block * S + at, m, mask=real[:, None] & (column < S)[None, :])
        else:
            y = output_block(
                new_deter, None, extra, lw, lb, latent, row, real, SP + column, inside,
                D, DP, 0, 0, LW, LL, TAPE, OUT, BM, BS, BK,
            )  # fmt: skip
            s = std_of(y, scale, slope, offset, least, floor, STD)
            at = row[:, None] * S + column[None, :]
            mask = real[:, None] & (column < S)[None, :]
            eps = tl.load(noise + at, mask=mask, other=0.0)
            tl.store(new_stoch + at, m + s * eps, mask=mask)
            if mean is not None:
                tl.store(mean + block * S + at, m, mask=mask)
                tl.store(std + block * S + at, s, mask=mask)
            if SAVE:
                at = row[:, None] * TAPE + LL * LW + column[None, :]
                mask = real[:, None] & inside[None, :]
                tl.store(latent + at, y.to(tape.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    weights,  # packed, transposed, in the order of the forward kernel's
    i_norms,
    g_norm,
    l_norms,
    deter,  # [rows, D], the state before the step
    noise,  # None, as d_new_stoch, where d_mean is all that reaches the logits
    first,
    tape,
    d_new_deter,  # [rows, D], all that reaches the state behind the step
    d_new_stoch,
    d_mean,  # [rows, S] beside what reaches the sample, or None
    d_std,
    d_deter,  # [rows, D]; the step's part is added, as to the next two
    d_stoch,
    d_action,
    grads,  # [rows, GRADS], dtype of the tape, written
    rows,
    scale,
    slope,
    offset,
    least,
    floor,
    A: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    AP: tl.constexpr,
    DP: tl.constexpr,
    SP: tl.constexpr,
    IW: tl.constexpr,
    IL: tl.constexpr,
    LW: tl.constexpr,
    LL: tl.constexpr,
    I_ACT: tl.constexpr,
    L_ACT: tl.constexpr,
    I_PRE: tl.constexpr,
    L_PRE: tl.constexpr,
    I_STATS: tl.constexpr,
    G_STATS: tl.constexpr,
    L_STATS: tl.constexpr,
    I_OUTER: tl.constexpr,
    G_OUTER: tl.constexpr,
    L_OUTER: tl.constexpr,
    LATE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    U: tl.constexpr,
    UPDATE_BIAS: tl.constexpr,
    STD: tl.constexpr,
    RESET_D: tl.constexpr,
    RESET_S: tl.constexpr,
    RESET_A: tl.constexpr,
    TAPE: tl.constexpr,
    GRADS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
):
    OUT: tl.constexpr = SP if STD == "logits" else 2 * SP
    block = tl.program_id(0).to(tl.int64) * BM
    row = tl.arange(0, BM)
    real = block + row < rows
    kept_d, kept_s, kept_a = real, real, real
    if first is not None:
        goes_on = real & (tl.load(first + block + row, mask=real, other=0) == 0)
        kept_d = goes_on if RESET_D else real
        kept_s = goes_on if RESET_S else real
        kept_a = goes_on if RESET_A else real
    deter += block * D
    if STD != "logits":
        noise += block * S
    tape += block * TAPE
    d_new_deter += block * D
    if STD != "logits":
        d_new_stoch += block * S
    d_deter += block * D
    d_stoch += block * S
    d_action += block * A
    grads += block * GRADS

    wih = weights + (SP + AP + (IL - 1) * IW) * IW
    whh = wih + IW * 3 * DP
    lw = whh + DP * 3 * DP
    GATES: tl.constexpr = 3 if LATE else 4
    t_gates = tape + IL * IW
    t_latent = t_gates + GATES * DP
    g_gates = grads + IL * IW
    g_latent = g_gates + GATES * DP
    g_out = g_latent + LL * LW

    for start in range(0, SP, BS):
        column = start + tl.arange(0, BS)
        inside = real[:, None] & (column < SP)[None, :]
        at = row[:, None] * S + column[None, :]
        mask = real[:, None] & (column < S)[None, :]
        if STD == "logits":
            d_m = tl.load(d_mean + block * S + at, mask=mask, other=0.0)
        else:
            eps = tl.load(noise + at, mask=mask, other=0.0)
            d_m = tl.load(d_new_stoch + at, mask=mask, other=0.0)
            d_s = d_m * eps
            if d_mean is not None:
                d_m += tl.load(d_mean + block * S + at, mask=mask, other=0.0)
                d_s += tl.load(d_std + block * S + at, mask=mask, other=0.0)
            y = tl.load(
                t_latent + row[:, None] * TAPE + LL * LW + column[None, :], mask=inside, other=0.0
            )
            d_y = d_s * std_slope(y.to(tl.float32), scale, slope, offset, least, floor, STD)
        at = row[:, None] * GRADS + column[None, :]
        tl.store(g_out + at, d_m.to(grads.dtype.element_ty), mask=inside)
        if STD != "logits":
            tl.store(g_out + at + SP, d_y.to(grads.dtype.element_ty), mask=inside)
    tl.debug_barrier()

    hidden_backward(
        lw, l_norms, t_latent, g_latent, row, real,
        DP, LW, LL, OUT, TAPE, GRADS, L_PRE, L_STATS, L_OUTER, L_ACT, BM, BN, BK,
    )  # fmt: skip
    if LATE:
        mean, inverse = kept_moments(t_gates + G_STATS, row, real, TAPE)
        total = tl.zeros([BM], tl.float32)
        along = tl.zeros([BM], tl.float32)
    for start in range(0, DP, BN):
        column = start + tl.arange(0, BN)
        inside = column < DP
        mask = real[:, None] & inside[None, :]
        at = row[:, None] * D + column[None, :]
        valid = (column < D)[None, :]
        dh = input_gradient(
            lw, g_latent, row, real, column, inside, DP, LW, LL, OUT, GRADS, BM, BN, BK
        )
        dh += tl.load(d_new_deter + at, mask=real[:, None] & valid, other=0.0)
        h = tl.load(deter + at, mask=kept_d[:, None] & valid, other=0.0)
        if LATE:
            xr, r = late_gate(
                t_gates, g_norm, mean, inverse, row, real, column, inside, R, DP, TAPE
            )
            xc, c = late_gate(
                t_gates, g_norm, mean, inverse, row, real, column, inside, C, DP, TAPE
            )
            xu, u = late_gate(
                t_gates, g_norm, mean, inverse, row, real, column, inside, U, DP, TAPE
            )
            r, u = sigmoid(r), sigmoid(u + UPDATE_BIAS)
            n = tanh(r * c)
            dn = dh * u * (1.0 - n * n)
            du = dh * (n - h) * u * (1.0 - u)
            outer = g_gates + G_OUTER
            total, along = behind_norm(
                dn * c * r * (1.0 - r), xr, g_norm + R * DP, outer + R * DP,
                total, along, row, real, column, inside, GRADS,
            )  # fmt: skip
            total, along = behind_norm(
                dn * r, xc, g_norm + C * DP, outer + C * DP,
                total, along, row, real, column, inside, GRADS,
            )  # fmt: skip
            total, along = behind_norm(
                du, xu, g_norm + U * DP, outer + U * DP,
                total, along, row, real, column, inside, GRADS,
            )  # fmt: skip
            z = 1.0 - u
        else:
            on = row[:, None] * TAPE + column[None, :]
            r = tl.load(t_gates + on, mask=mask, other=0.0).to(tl.float32)
            z = tl.load(t_gates + on + DP, mask=mask, other=0.0).to(tl.float32)
            n = tl.load(t_gates + on + 2 * DP, mask=mask, other=0.0).to(tl.float32)
            nh = tl.load(t_gates + on + 3 * DP, mask=mask, other=0.0).to(tl.float32)
            dn = dh * (1.0 - z) * (1.0 - n * n)
            dz = dh * (h - n) * z * (1.0 - z)
            dr = dn * nh * r * (1.0 - r)
            to = row[:, None] * GRADS + column[None, :]
            tl.store(g_gates + to, dr.to(grads.dtype.element_ty), mask=mask)
            tl.store(g_gates + to + DP, dz.to(grads.dtype.element_ty), mask=mask)
            tl.store(g_gates + to + 2 * DP, dn.to(grads.dtype.element_ty), mask=mask)
            tl.store(g_gates + to + 3 * DP, (dn * r).to(grads.dtype.element_ty), mask=mask)
        direct = tl.load(d_deter + at, mask=kept_d[:, None] & valid, other=0.0)
        tl.store(d_deter + at, direct + dh * z, mask=kept_d[:, None] & valid)
    tl.debug_barrier()

    if LATE:
        before_norm(
            g_gates, g_gates + G_OUTER, t_gates, g_norm, mean, inverse, total, along, row, real,
            3 * DP, DP, TAPE, GRADS, BM, BN,
        )  # fmt: skip
        tl.debug_barrier()

    for start in range(0, DP, BN):  # through the recurrent weights
        column = start + tl.arange(0, BN)
        inside = column < DP
        acc = tl.zeros([BM, BN], tl.float32)
        OF_H: tl.constexpr = 3 if LATE else 2  # the gates whose sums are one of x and h
        acc = accumulate(acc, g_gates, whh, row, real, column, inside, OF_H * DP, GRADS, DP, BK)
        if not LATE:
            acc = accumulate(
                acc, g_gates + 3 * DP, whh + 2 * DP * DP, row, real, column, inside,
                DP, GRADS, DP, BK,
            )  # fmt: skip
        at = row[:, None] * D + column[None, :]
        mask = kept_d[:, None] & (column < D)[None, :]
        acc += tl.load(d_deter + at, mask=mask, other=0.0)
        tl.store(d_deter + at, acc, mask=mask)
    layer_gradient(  # to the last input layer
        wih, i_norms, tape, grads, IL - 1, row, real,
        3 * DP, IW, TAPE, GRADS, I_PRE, I_STATS, I_OUTER, I_ACT, BM, BN, BK,
    )  # fmt: skip

    # the last input layer stands for the output of the ones below it
    hidden_backward(
        weights, i_norms, tape, grads, row, real,
        SP + AP, IW, IL - 1, IW, TAPE, GRADS, I_PRE, I_STATS, I_OUTER, I_ACT, BM, BN, BK,
    )  # fmt: skip
    for start in range(0, SP, BS):
        column = start + tl.arange(0, BS)
        acc = input_gradient(
            weights, grads, row, real, column, column < SP,
            SP + AP, IW, IL - 1, IW, GRADS, BM, BS, BK,
        )  # fmt: skip
        at = row[:, None] * S + column[None, :]
        mask = kept_s[:, None] & (column < S)[None, :]
        acc += tl.load(d_stoch + at, mask=mask, other=0.0)
        tl.store(d_stoch + at, acc, mask=mask)
    for start in range(0, AP, BS):
        column = start + tl.arange(0, BS)
        acc = input_gradient(
            weights, grads, row, real, SP + column, column < AP,
            SP + AP, IW, IL - 1, IW, GRADS, BM, BS, BK,
        )  # fmt: skip
        at = row[:, None] * A + column[None, :]
        mask = kept_a[:, None] & (column < A)[None, :]
        acc += tl.load(d_action + at, mask=mask, other=0.0)
        tl.store(d_action + at, acc, mask=mask)
