"""Device functions that the kernels of the recurrent ops share.

A program handles a block of rows through all layers of a step, one layer after the other. Layers
hand over through global memory (the *tape*: one row of columns per row of the batch), which stays
in cache; a barrier between them makes a layer's columns visible to all threads of the program.
Pointers come already moved to the program's first row; ``row`` counts from there.

Weights are packed ``[K][N]`` in the dtype of the products' operands (bfloat16 or float32), K and N
padded with zeros to multiples of 16 (:mod:`fastdreamer.ops.triton.layout`). So a padded column of
a layer is act(0) = 0, and everything but the states and means over a layer needs no mask finer than
16 columns.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """±(1 - 2u / (1 + u)), u = exp(-2|x|): exact near ±1, where slopes 1 - y² cancel."""
    u = tl.exp(-2.0 * tl.abs(x))
    y = 1.0 - 2.0 * (u / (1.0 + u))
    return tl.where(x < 0, -y, y)


@triton.jit
def softplus(x):
    """max(x, 0) + log1p(exp(-|x|)); the quotient makes up for the rounding of 1 + u (Kahan).

    A NaN, which the maximum drops, is in the logarithm.
    """
    u = tl.exp(-tl.abs(x))
    w = 1.0 + u
    log1p = tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def activate(x, ACT: tl.constexpr):
    """A NaN stays one: no minimum or maximum, which in PTX return the other number."""
    if ACT == "elu":
        y = tl.where(x > 0, x, tl.exp(tl.where(x > 0, 0.0, x)) - 1.0)
    elif ACT == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif ACT == "silu":
        y = x * sigmoid(x)
    elif ACT == "gelu":
        y = x * normal_cdf(x)
    elif ACT == "gelu_tanh":
        y = 0.5 * x * (1.0 + tanh(gelu_inner(x)))
    elif ACT == "mish":
        y = x * tanh(softplus(x))
    else:
        tl.static_assert(ACT == "tanh", "no such activation")
        y = tanh(x)
    return y


@triton.jit
def normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_inner(x):
    """√(2/π) · (x + 0.044715 · x³)."""
    return 0.7978845608028654 * (x + 0.044715 * x * x * x)


@triton.jit
def activation_slope(at, ACT: tl.constexpr):
    """The derivative by the layer's sum, from its value or, see layout.OF_SUM, the sum itself."""
    if ACT == "elu":
        slope = tl.where(at > 0, 1.0, at + 1.0)
    elif ACT == "relu":
        slope = tl.where(at <= 0, 0.0, 1.0)
    elif ACT == "silu":
        s = sigmoid(at)
        slope = s * (1.0 + at * (1.0 - s))
    elif ACT == "gelu":
        slope = normal_cdf(at) + at * 0.3989422804014327 * tl.exp(-0.5 * at * at)
    elif ACT == "gelu_tanh":
        t = tanh(gelu_inner(at))
        inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * at * at)
        slope = 0.5 * (1.0 + t + at * (1.0 - t * t) * inner)
    elif ACT == "mish":
        t = tanh(softplus(at))
        slope = t + at * (1.0 - t * t) * sigmoid(at)
    else:
        slope = 1.0 - at * at
    return slope


@triton.jit
def slope_at(x, ACT: tl.constexpr):
    """The derivative at x."""
    OF_VALUE: tl.constexpr = ACT == "elu" or ACT == "relu" or ACT == "tanh"
    return activation_slope(activate(x, ACT) if OF_VALUE else x, ACT)


@triton.jit
def at_least_1(x):
    """max(|x|, 1); a NaN stays one."""
    return tl.where(tl.abs(x) <= 1.0, 1.0, tl.abs(x))


@triton.jit
def squash(x, KIND: tl.constexpr):
    """An action of a Normal's sample, see ``fastdreamer.ops.params.SQUASHES``."""
    if KIND == "tanh":
        y = tanh(x)
    elif KIND == "bound":
        y = x / at_least_1(x)
    elif KIND == "clip":
        y = tl.where(x > 1.0 - 1e-6, 1.0 - 1e-6, tl.where(x < -1.0 + 1e-6, -1.0 + 1e-6, x))
    else:
        tl.static_assert(KIND == "none", "squash must be tanh, none, bound or clip")
        y = x
    return y


@triton.jit
def std_of(y, scale, slope, offset, least, floor, KIND: tl.constexpr):
    """max(scale · f(slope · y + offset) + least, floor), all of them at least 0."""
    x = slope * y + offset
    if KIND == "softplus":
        std = softplus(x)
    elif KIND == "sigmoid":
        std = sigmoid(x)
    else:
        tl.static_assert(KIND == "exp", "std must be softplus, sigmoid or exp")
        std = tl.exp(x)
    std = scale * std + least
    return tl.where(std < floor, floor, std)  # a NaN stays one


@triton.jit
def std_slope(y, scale, slope, offset, least, floor, KIND: tl.constexpr):
    """Its derivative by y, 0 below the floor."""
    x = slope * y + offset
    if KIND == "softplus":
        d = sigmoid(x)
    elif KIND == "sigmoid":
        s = sigmoid(x)
        d = s * (1.0 - s)
    else:
        d = tl.exp(x)
    std = std_of(y, scale, slope, offset, least, 0.0, KIND)
    return tl.where(std < floor, 0.0, scale * slope * d)


@triton.jit
def accumulate(
    acc,  # [BM, BN] float32
    x,  # [*, XS], the first K columns of it
    w,  # [K][WS]
    row,
    alive,  # rows of x that are read; the others count as zeros
    column,
    inside,
    K: tl.constexpr,
    XS: tl.constexpr,
    WS: tl.constexpr,
    BK: tl.constexpr,
):
    """acc + x @ w[:, column]."""
    k = tl.arange(0, BK)
    for start in range(0, K, BK):
        at = start + k
        xk = tl.load(
            x + row[:, None] * XS + at[None, :],
            mask=alive[:, None] & (at < K)[None, :],
            other=0.0,
        )
        wk = tl.load(
            w + at[:, None] * WS + column[None, :],
            mask=(at < K)[:, None] & inside[None, :],
            other=0.0,
        )
        acc = tl.dot(xk.to(wk.dtype), wk, acc, input_precision="ieee")
    return acc


@triton.jit
def accumulate_gates(
    a,
    b,
    c,
    x,
    w,  # [K][3 · GAP]
    row,
    alive,
    column,
    inside,
    K: tl.constexpr,
    XS: tl.constexpr,
    GAP: tl.constexpr,
    BK: tl.constexpr,
):
    """The same for the three gates of a GRU, reading x once."""
    k = tl.arange(0, BK)
    for start in range(0, K, BK):
        at = start + k
        xk = tl.load(
            x + row[:, None] * XS + at[None, :],
            mask=alive[:, None] & (at < K)[None, :],
            other=0.0,
        )
        where = w + at[:, None] * (3 * GAP) + column[None, :]
        mask = (at < K)[:, None] & inside[None, :]
        wa = tl.load(where, mask=mask, other=0.0)
        wb = tl.load(where + GAP, mask=mask, other=0.0)
        wc = tl.load(where + 2 * GAP, mask=mask, other=0.0)
        xk = xk.to(wa.dtype)
        a = tl.dot(xk, wa, a, input_precision="ieee")
        b = tl.dot(xk, wb, b, input_precision="ieee")
        c = tl.dot(xk, wc, c, input_precision="ieee")
    return a, b, c


@triton.jit
def accumulate_inputs(
    acc,
    x1,
    x2,
    w,  # [K1P + K2P][WS]
    row,
    alive1,  # rows of x1 and of x2 that are read
    alive2,
    column,
    inside,
    K1: tl.constexpr,
    K1P: tl.constexpr,
    K2: tl.constexpr,  # 0: there is no x2
    WS: tl.constexpr,
    BK: tl.constexpr,
):
    """acc + [x1, x2] @ w[:, column]; both lie contiguous, K1 and K2 columns each."""
    acc = accumulate(acc, x1, w, row, alive1, column, inside, K1, K1, WS, BK)
    if K2 > 0:
        acc = accumulate(acc, x2, w + K1P * WS, row, alive2, column, inside, K2, K2, WS, BK)
    return acc


@triton.jit
def bias_block(biases, column, inside, BM: tl.constexpr, BN: tl.constexpr):
    """The bias as the first value of an accumulator [BM, BN]."""
    bias = tl.load(biases + column, mask=inside, other=0.0)
    return tl.zeros([BM, BN], tl.float32) + bias[None, :]


@triton.jit
def hidden_layers(
    x1,
    x2,
    extra,  # [*, W] float32 added to the first layer's sum, or None
    weights,
    biases,
    norms,  # packed, one a layer, or None
    tape,  # receives LAYERS · W columns; with PRE > 0 the sums, too, PRE columns behind
    row,
    real,  # rows of the batch
    alive1,  # rows of x1 and of x2 that are read
    alive2,
    K1: tl.constexpr,
    K1P: tl.constexpr,
    K2: tl.constexpr,
    K2P: tl.constexpr,
    W: tl.constexpr,
    LAYERS: tl.constexpr,
    TAPE: tl.constexpr,
    PRE: tl.constexpr,
    STATS: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Layers of W columns, each followed by its norm, the activation and a barrier."""
    if LAYERS > 0:
        for start in range(0, W, BN):
            column = start + tl.arange(0, BN)
            inside = column < W
            mask = real[:, None] & inside[None, :]
            acc = bias_block(biases, column, inside, BM, BN)
            if extra is not None:
                acc += tl.load(extra + row[:, None] * W + column[None, :], mask=mask, other=0.0)
            acc = accumulate_inputs(
                acc, x1, x2, weights, row, alive1, alive2, column, inside, K1, K1P, K2, W, BK
            )
            at = row[:, None] * TAPE + column[None, :]
            store_hidden(tape, at, acc, mask, norms, PRE, ACT)
        tl.debug_barrier()
        if norms is not None:
            normalise_hidden(tape, norms, tape + STATS, row, real, W, TAPE, PRE, ACT, BM, BN)
    # A loop at run time, which keeps the code small whatever the depth. It must never be pipelined:
    # a layer's loads belong behind the barrier of the layer below.
    for layer in tl.range(1, LAYERS, num_stages=1):
        w = weights + (K1P + K2P + (layer - 1) * W) * W
        below = tape + (layer - 1) * W
        for start in range(0, W, BN):
            column = start + tl.arange(0, BN)
            inside = column < W
            acc = bias_block(biases + layer * W, column, inside, BM, BN)
            acc = accumulate(acc, below, w, row, real, column, inside, W, TAPE, W, BK)
            at = row[:, None] * TAPE + column[None, :]
            mask = real[:, None] & inside[None, :]
            store_hidden(below + W, at, acc, mask, norms, PRE, ACT)
        tl.debug_barrier()
        if norms is not None:
            norm = norms + layer * (2 * W + 16)
            stats = tape + STATS + 4 * layer
            normalise_hidden(below + W, norm, stats, row, real, W, TAPE, PRE, ACT, BM, BN)


@triton.jit
def store_hidden(tape, at, acc, mask, norms, PRE: tl.constexpr, ACT: tl.constexpr):
    if PRE > 0:
        tl.store(tape + at + PRE, acc.to(tape.dtype.element_ty), mask=mask)
    if norms is None:
        tl.store(tape + at, activate(acc, ACT).to(tape.dtype.element_ty), mask=mask)


@triton.jit
def normalise_hidden(
    tape,  # of one layer; its sums are PRE columns behind
    norm,
    stats,
    row,
    real,
    W: tl.constexpr,
    TAPE: tl.constexpr,
    PRE: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The layer's values from its sums, and a barrier."""
    mean, inverse = moments(tape + PRE, norm, row, real, W, W, TAPE, BM, BN)
    keep_moments(stats, mean, inverse, row, real, TAPE)
    for start in range(0, W, BN):
        column = start + tl.arange(0, BN)
        inside = column < W
        x = standardised(tape + PRE, mean, inverse, row, real, column, inside, TAPE)
        y = activate(scaled(x, norm, column, inside, W), ACT)
        at = row[:, None] * TAPE + column[None, :]
        mask = real[:, None] & inside[None, :]
        tl.store(tape + at, y.to(tape.dtype.element_ty), mask=mask)
    tl.debug_barrier()


@triton.jit
def moments(
    x,  # [*, XS], W columns of it: groups of GROUP columns, the last of each perhaps padded
    norm,  # gains [W], shifts [W], then: columns of a group, eps, 1 / all columns, and the same
    # where the mean is taken off and where a norm is
    row,
    real,
    W: tl.constexpr,
    GROUP: tl.constexpr,
    XS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The mean that a norm takes off rows, and the factor of the rest: 0 and 1 without a norm."""
    meta = norm + 2 * W
    count = tl.load(meta).to(tl.int32)
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, W, BN):
        column = start + tl.arange(0, BN)
        mask = real[:, None] & ((column < W) & (column % GROUP < count))[None, :]
        at = row[:, None] * XS + column[None, :]
        total += tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, 1) * tl.load(meta + 3)
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, W, BN):
        column = start + tl.arange(0, BN)
        mask = real[:, None] & ((column < W) & (column % GROUP < count))[None, :]
        at = row[:, None] * XS + column[None, :]
        off = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean[:, None]
        total += tl.where(mask, off * off, 0.0)
    variance = tl.sum(total, 1) * tl.load(meta + 2)
    inverse = 1.0 / tl.sqrt(variance + tl.load(meta + 1))
    return mean, tl.where(tl.load(meta + 4) > 0.0, inverse, 1.0)


@triton.jit
def keep_moments(stats, mean, inverse, row, real, TAPE: tl.constexpr):
    """Into four columns of a tape: each number, and what rounding left of it."""
    at = row * TAPE
    for i in tl.static_range(2):
        value = mean if i == 0 else inverse
        rounded = value.to(stats.dtype.element_ty)
        tl.store(stats + at + 2 * i, rounded, mask=real)
        rest = value - rounded.to(tl.float32)
        tl.store(stats + at + 2 * i + 1, rest.to(stats.dtype.element_ty), mask=real)


@triton.jit
def kept_moments(stats, row, real, TAPE: tl.constexpr):
    """The same read."""
    at = row * TAPE
    mean = tl.load(stats + at, mask=real, other=0.0).to(tl.float32)
    mean += tl.load(stats + at + 1, mask=real, other=0.0).to(tl.float32)
    inverse = tl.load(stats + at + 2, mask=real, other=0.0).to(tl.float32)
    inverse += tl.load(stats + at + 3, mask=real, other=0.0).to(tl.float32)
    return mean, inverse


@triton.jit
def standardised(sums, mean, inverse, row, real, column, inside, XS: tl.constexpr):
    """A block of (x - mean) · inverse."""
    at = row[:, None] * XS + column[None, :]
    x = tl.load(sums + at, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return (x - mean[:, None]) * inverse[:, None]


@triton.jit
def scaled(x, norm, column, inside, W: tl.constexpr):
    """gain · x + shift; both are 0 in padded columns."""
    gain = tl.load(norm + column, mask=inside, other=0.0)
    shift = tl.load(norm + W + column, mask=inside, other=0.0)
    return x * gain[None, :] + shift[None, :]


@triton.jit
def output_block(
    x1,
    x2,
    extra,  # [*, OUT] float32, or None; only without hidden layers
    weights,
    biases,
    tape,
    row,
    real,
    column,
    inside,
    K1: tl.constexpr,
    K1P: tl.constexpr,
    K2: tl.constexpr,
    K2P: tl.constexpr,
    W: tl.constexpr,
    LAYERS: tl.constexpr,
    TAPE: tl.constexpr,
    OUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Columns of the last layer, behind ``hidden_layers``; no activation."""
    acc = bias_block(biases + LAYERS * W, column, inside, BM, BN)
    if LAYERS == 0:
        if extra is not None:
            mask = real[:, None] & inside[None, :]
            acc += tl.load(extra + row[:, None] * OUT + column[None, :], mask=mask, other=0.0)
        acc = accumulate_inputs(
            acc, x1, x2, weights, row, real, real, column, inside, K1, K1P, K2, OUT, BK
        )
    else:
        w = weights + (K1P + K2P + (LAYERS - 1) * W) * W
        x = tape + (LAYERS - 1) * W
        acc = accumulate(acc, x, w, row, real, column, inside, W, TAPE, OUT, BK)
    return acc


@triton.jit
def hidden_backward(
    weights,  # transposed: layer 0 [W][K1P + K2P], then [W][W], the last [OUT][W]
    norms,
    tape,
    grads,  # LAYERS · W columns of gradients by sums are written, OUT columns behind are read;
    # with norms gradients behind them are written OUTER columns behind the first
    row,
    real,
    KP: tl.constexpr,
    W: tl.constexpr,
    LAYERS: tl.constexpr,
    OUT: tl.constexpr,
    TAPE: tl.constexpr,
    GRADS: tl.constexpr,
    PRE: tl.constexpr,
    STATS: tl.constexpr,
    OUTER: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The hidden layers' gradients, last to first, a barrier behind each."""
    if LAYERS > 0:
        w = weights + (KP + (LAYERS - 1) * W) * W
        layer_gradient(
            w, norms, tape, grads, LAYERS - 1, row, real,
            OUT, W, TAPE, GRADS, PRE, STATS, OUTER, ACT, BM, BN, BK,
        )  # fmt: skip
    for done in tl.range(1, LAYERS, num_stages=1):  # never pipelined, see hidden_layers
        layer = LAYERS - done - 1
        w = weights + (KP + layer * W) * W
        layer_gradient(
            w, norms, tape, grads, layer, row, real,
            W, W, TAPE, GRADS, PRE, STATS, OUTER, ACT, BM, BN, BK,
        )  # fmt: skip


@triton.jit
def layer_gradient(
    w,  # [OUT][W], of the layer above
    norms,
    tape,
    grads,
    layer,
    row,
    real,
    OUT: tl.constexpr,
    W: tl.constexpr,
    TAPE: tl.constexpr,
    GRADS: tl.constexpr,
    PRE: tl.constexpr,
    STATS: tl.constexpr,
    OUTER: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The gradient by a hidden layer's sums, through its norm where there is one, and a barrier."""
    above = grads + (layer + 1) * W
    at = tape + layer * W + PRE
    if norms is None:
        hidden_gradient(
            above, w, at, row, real, OUT, W, TAPE, GRADS, ACT, BM, BN, BK,
        )  # fmt: skip
    else:
        norm = norms + layer * (2 * W + 16)
        stats = tape + STATS + 4 * layer
        outer = grads + OUTER + layer * W
        normed_gradient(
            above, w, at, norm, stats, outer, row, real,
            OUT, W, TAPE, GRADS, ACT, BM, BN, BK,
        )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def hidden_gradient(
    above,  # gradients by the sums of the layer above, OUT columns
    w,  # [OUT][W]
    value,  # the layer's value, or its sum
    row,
    real,
    OUT: tl.constexpr,
    W: tl.constexpr,
    TAPE: tl.constexpr,
    GRADS: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The gradient by one layer's sums, written W columns before ``above``."""
    for start in range(0, W, BN):
        column = start + tl.arange(0, BN)
        inside = column < W
        mask = real[:, None] & inside[None, :]
        acc = tl.zeros([BM, BN], tl.float32)
        acc = accumulate(acc, above, w, row, real, column, inside, OUT, GRADS, W, BK)
        y = tl.load(value + row[:, None] * TAPE + column[None, :], mask=mask, other=0.0)
        acc *= activation_slope(y.to(tl.float32), ACT)
        at = row[:, None] * GRADS + column[None, :]
        tl.store(above - W + at, acc.to(above.dtype.element_ty), mask=mask)


@triton.jit
def normed_gradient(
    above,
    w,
    sums,
    norm,
    stats,
    outer,  # where the gradient behind the norm is written
    row,
    real,
    OUT: tl.constexpr,
    W: tl.constexpr,
    TAPE: tl.constexpr,
    GRADS: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The same of a layer with a norm, with a barrier between what is behind and before it."""
    mean, inverse = kept_moments(stats, row, real, TAPE)
    total = tl.zeros([BM], tl.float32)
    along = tl.zeros([BM], tl.float32)
    for start in range(0, W, BN):
        column = start + tl.arange(0, BN)
        inside = column < W
        acc = tl.zeros([BM, BN], tl.float32)
        acc = accumulate(acc, above, w, row, real, column, inside, OUT, GRADS, W, BK)
        x = standardised(sums, mean, inverse, row, real, column, inside, TAPE)
        acc *= slope_at(scaled(x, norm, column, inside, W), ACT)
        total, along = behind_norm(
            acc, x, norm, outer, total, along, row, real, column, inside, GRADS
        )
    tl.debug_barrier()
    before_norm(
        above - W, outer, sums, norm, mean, inverse, total, along, row, real,
        W, W, TAPE, GRADS, BM, BN,
    )  # fmt: skip


@triton.jit
def behind_norm(
    grad,  # [BM, BN], by what the norm returned
    x,  # its input, standardised
    norm,
    outer,
    total,
    along,
    row,
    real,
    column,
    inside,
    GRADS: tl.constexpr,
):
    """Store a block; return Σ g and Σ g · x so far, g = gain · grad."""
    at = row[:, None] * GRADS + column[None, :]
    mask = real[:, None] & inside[None, :]
    tl.store(outer + at, grad.to(outer.dtype.element_ty), mask=mask)
    g = grad * tl.load(norm + column, mask=inside, other=0.0)[None, :]
    return total + tl.sum(g, 1), along + tl.sum(g * x, 1)


@triton.jit
def before_norm(
    inner,  # W columns of gradients by the norm's input are written
    outer,
    sums,
    norm,
    mean,
    inverse,
    total,
    along,
    row,
    real,
    W: tl.constexpr,
    GROUP: tl.constexpr,
    TAPE: tl.constexpr,
    GRADS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """inverse · (g - mean of g - x · mean of g · x), behind a barrier behind ``behind_norm``."""
    meta = norm + 2 * W
    count = tl.load(meta).to(tl.int32)
    total *= tl.load(meta + 3)
    along *= tl.load(meta + 4)
    for start in range(0, W, BN):
        column = start + tl.arange(0, BN)
        inside = (column < W) & (column % GROUP < count)
        at = row[:, None] * GRADS + column[None, :]
        mask = real[:, None] & inside[None, :]
        g = tl.load(outer + at, mask=mask, other=0.0).to(tl.float32)
        g *= tl.load(norm + column, mask=inside, other=0.0)[None, :]
        x = standardised(sums, mean, inverse, row, real, column, inside, TAPE)
        g = inverse[:, None] * (g - total[:, None] - x * along[:, None])
        g = tl.where(inside[None, :], g, 0.0)
        mask = real[:, None] & (column < W)[None, :]
        tl.store(inner + at, g.to(inner.dtype.element_ty), mask=mask)


@triton.jit
def input_gradient(
    weights,
    grads,
    row,
    real,
    column,  # of the packed input, K1P + K2P
    inside,
    KP: tl.constexpr,
    W: tl.constexpr,
    LAYERS: tl.constexpr,
    OUT: tl.constexpr,
    GRADS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Columns of the gradient by the first layer's input, behind ``hidden_backward``."""
    acc = tl.zeros([BM, BN], tl.float32)
    if LAYERS == 0:
        acc = accumulate(acc, grads, weights, row, real, column, inside, OUT, GRADS, KP, BK)
    else:
        acc = accumulate(acc, grads, weights, row, real, column, inside, W, GRADS, KP, BK)
    return acc
