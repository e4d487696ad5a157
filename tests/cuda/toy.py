"""Small kernels with the shapes of the real loops, quick under the interpreter.

A recurrent cell h' = tanh(W h) · scale + ε: rolled out, swept backward, and inside nested loops
that move a mean towards what scores high.
"""

import torch
import triton
import triton.language as tl

from fastdreamer.ops.triton.program import Kernel, Launch, Loop, Program, Slot, index


@triton.jit(do_not_specialize=["B"])
def step_kernel(state, weight, noise, after, out, B, scale, first_row, BLOCK: tl.constexpr,
                D: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, D)
    at = row[:, None] * D + column[None, :]
    inside = (row < B)[:, None]
    h = tl.load(state + at, mask=inside, other=0.0)
    w = tl.load(weight + column[:, None] * D + column[None, :])  # [out, in]
    total = tl.sum(h[:, None, :] * w[None, :, :], 2)
    y = 2.0 / (1.0 + tl.exp(-2.0 * total)) - 1.0
    eps = tl.load(noise + at, mask=inside, other=0.0)
    eps = tl.where((first_row != 0) & (row == 0)[:, None], 0.0, eps)
    tl.store(after + at, y * scale + eps, mask=inside)
    tl.store(out + at, y, mask=inside)


@triton.jit(do_not_specialize=["B", "t"])
def back_kernel(grad, y, weight, carried, carry, delta, B, t, scale, BLOCK: tl.constexpr,
                D: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, D)
    at = row[:, None] * D + column[None, :]
    inside = (row < B)[:, None]
    total = tl.load(grad + at, mask=inside, other=0.0)
    if t > 0:
        total += tl.load(carried + at, mask=inside, other=0.0)
    value = tl.load(y + at, mask=inside, other=0.0)
    d = total * scale * (1.0 - value * value)
    tl.store(delta + at, d, mask=inside)
    w = tl.load(weight + column[:, None] * D + column[None, :])
    tl.store(carry + at, tl.sum(d[:, :, None] * w[None, :, :], 1), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def outer_kernel(delta, state, total, rows, D: tl.constexpr):
    """total[i, j] = Σ over rows of delta[:, i] · state[:, j]."""
    column = tl.arange(0, D)
    acc = tl.zeros([D, D], tl.float32)
    for row in range(rows):
        d = tl.load(delta + row * D + column)
        h = tl.load(state + row * D + column)
        acc += d[:, None] * h[None, :]
    tl.store(total + column[:, None] * D + column[None, :], acc)


@triton.jit
def spread_kernel(mean, noise, state, N, D: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, D)
    m = tl.load(mean + row // N * D + column)
    tl.store(state + row * D + column, m + tl.load(noise + row * D + column))


@triton.jit
def refit_kernel(state, start, mean, score, N, D: tl.constexpr):
    """The mean becomes the start with the highest sum; that sum is the score."""
    row = tl.program_id(0)
    column = tl.arange(0, D)
    best = -float("inf")
    chosen = tl.zeros([D], tl.float32)
    for n in range(N):
        at = (row * N + n) * D + column
        total = tl.sum(tl.load(state + at))
        chosen = tl.where(total > best, tl.load(start + at), chosen)
        best = tl.maximum(best, total)
    tl.store(mean + row * D + column, chosen)
    tl.store(score + row, best)


BLOCK, D, SCALE = 4, 8, 0.75
F32 = torch.float32
STEP = Kernel(step_kernel, {"BLOCK": BLOCK, "D": D}, num_warps=2)
BACK = Kernel(back_kernel, {"BLOCK": BLOCK, "D": D}, num_warps=2)
OUTER = Kernel(outer_kernel, {"D": D}, num_warps=1)
SPREAD = Kernel(spread_kernel, {"D": D}, num_warps=1)
REFIT = Kernel(refit_kernel, {"D": D}, num_warps=1)


def forward(H, B):
    """y [H, B, D] of states in a double buffer; the first row of the first step has no noise."""
    start, weight = Slot("start", (B, D), F32), Slot("weight", (D, D), F32)
    noise, y = Slot("noise", (H, B, D), F32), Slot("y", (H, B, D), F32, "output")
    buffers = Slot("buffers", (2, B, D), F32, "scratch")
    t, size = index("t"), B * D

    def step(state, at, after, first):
        return Launch(STEP, (-(-B // BLOCK),), {
            "state": state, "weight": weight, "noise": noise.at(at), "after": after,
            "out": y.at(at), "B": B, "scale": SCALE, "first_row": first,
        })  # fmt: skip

    later = step(buffers.at(t % 2 * size), (t + 1) * size, buffers.at((t + 1) % 2 * size), False)
    body = [step(start, 0, buffers, True), Loop("t", H - 1, [later])]
    return Program("toy forward", [start, weight, noise, y, buffers], body)


def eager_forward(start, weight, noise):
    """The same, and the states [H, B, D] that went into each step."""
    states, ys, state = [], [], start
    for t, eps in enumerate(noise):
        states.append(state)
        y = torch.tanh(state @ weight.T)
        if t == 0:
            eps = torch.cat([torch.zeros_like(eps[:1]), eps[1:]])
        state = y * SCALE + eps
        ys.append(y)
    return torch.stack(ys), torch.stack(states)


def backward(H, B):
    """Gradients of start and weight from those [H, B, D] of the states behind each step."""
    grad, y = Slot("grad", (H, B, D), F32), Slot("y", (H, B, D), F32)
    weight, states = Slot("weight", (D, D), F32), Slot("states", (H, B, D), F32)
    delta, carry = (
        Slot("delta", (H, B, D), F32, "scratch"),
        Slot("carry", (2, B, D), F32, "scratch"),
    )
    grad_start = Slot("grad_start", (B, D), F32, "output")
    grad_weight = Slot("grad_weight", (D, D), F32, "output")
    t, size = index("t"), B * D
    at = (H - 1 - t) * size

    def back(carried, carry, at, t):
        return Launch(BACK, (-(-B // BLOCK),), {
            "grad": grad.at(at), "y": y.at(at), "weight": weight, "carried": carried,
            "carry": carry, "delta": delta.at(at), "B": B, "t": t, "scale": SCALE,
        })  # fmt: skip

    inner = back(carry.at(t % 2 * size), carry.at((t + 1) % 2 * size), at, t)
    final = back(carry.at((H - 1) % 2 * size), grad_start, 0, H - 1)
    outer = Launch(
        OUTER, (1,), {"delta": delta, "state": states, "total": grad_weight, "rows": H * B}
    )
    slots = [grad, y, weight, states, delta, carry, grad_start, grad_weight]
    return Program("toy backward", slots, [Loop("t", H - 1, [inner]), final, outer])


def search(iterations, H, B, N):
    """Iterations of: N starts around the mean, rolled out; the best start is the next mean."""
    mean = Slot("mean", (B, D), F32)
    weight = Slot("weight", (D, D), F32)
    spread, noise = Slot("spread", (iterations, B * N, D), F32), Slot("noise", (B * N, D), F32)
    means = Slot("means", (iterations, B, D), F32, "output")
    score = Slot("score", (iterations, B), F32, "output")
    starts, y = Slot("starts", (B * N, D), F32, "scratch"), Slot("y", (B * N, D), F32, "scratch")
    buffers = Slot("buffers", (2, B * N, D), F32, "scratch")
    i, t, size = index("i"), index("t"), B * N * D

    def iteration(i, mean):
        def step(state, after):
            return Launch(STEP, (-(-B * N // BLOCK),), {
                "state": state, "weight": weight, "noise": noise, "after": after, "out": y,
                "B": B * N, "scale": SCALE, "first_row": False,
            })  # fmt: skip

        rolled = step(buffers.at(t % 2 * size), buffers.at((t + 1) % 2 * size))
        return [
            Launch(SPREAD, (B * N,), {"mean": mean, "noise": spread.at(i * size), "state": starts,
                                      "N": N}),
            step(starts, buffers),
            Loop("t", H - 1, [rolled]),
            Launch(REFIT, (B,), {"state": buffers.at((H - 1) % 2 * size), "start": starts,
                                 "mean": means.at(i * (B * D)), "score": score.at(i * B), "N": N}),
        ]  # fmt: skip

    later = iteration(i + 1, means.at(i * (B * D)))
    body = [*iteration(0, mean), Loop("i", iterations - 1, later)]
    slots = [mean, weight, spread, noise, means, score, starts, y, buffers]
    return Program("toy search", slots, body)


def eager_search(mean, weight, spread, noise, H):
    means, scores = [], []
    for eps in spread:
        starts = mean.repeat_interleave(len(eps) // len(mean), 0) + eps
        state = starts
        for _ in range(H):
            state = torch.tanh(state @ weight.T) * SCALE + noise
        score, best = state.sum(1).view(len(mean), -1).max(1)
        mean = starts.view(len(mean), -1, D)[torch.arange(len(mean)), best]
        means.append(mean)
        scores.append(score)
    return torch.stack(means), torch.stack(scores)


# ---------------------------------------------------------------- inputs and comparisons

LIMIT = {"rtol": 1e-5, "atol": 1e-6}


def _draw(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def forward_inputs(seed=0, H=4, B=6):
    draw = _draw(seed)
    return {"start": draw(B, D), "weight": draw(D, D), "noise": draw(H, B, D)}


def check_forward(outputs, inputs):
    torch.testing.assert_close(outputs["y"], eager_forward(**inputs)[0], **LIMIT)


def run_forward(bench, program, seed=0):
    inputs = bench.inputs(forward_inputs(seed))
    check_forward(bench.run(program, inputs), inputs)


def search_inputs(iterations=3, H=3, B=2, N=5):
    draw = _draw(4)
    return {"mean": draw(B, D), "weight": draw(D, D), "spread": draw(iterations, B * N, D),
            "noise": draw(B * N, D)}  # fmt: skip


def check_search(outputs, inputs):
    means, scores = eager_search(**inputs, H=3)
    torch.testing.assert_close(outputs["means"], means, **LIMIT)
    torch.testing.assert_close(outputs["score"], scores, **LIMIT)
