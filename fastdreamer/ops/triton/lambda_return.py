"""Triton body of :mod:`fastdreamer.ops.lambda_return`: one program per block of columns.

The recurrence is kept in registers; each element of an input is read once and each of an output
written once. Contract and equation are those of the eager body. ``rollout.py`` has the same kernels
in its programs.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from fastdreamer.ops.triton.program import Kernel, Launch, Program, Slot
from fastdreamer.ops.triton.run import run

BLOCK = 128
NUM_WARPS = 4  # one column per thread


# sizes are not specialised: one compiled kernel serves every H and B
@triton.jit(do_not_specialize=["H", "B"])
def forward_kernel(
    reward,  # [H, B] float32, contiguous, as all the others
    next_value,
    discount,
    returns,
    H,
    B,
    lam,
    mix,  # 1 - lam, rounded once from float64
    BLOCK: tl.constexpr,
):
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = column < B
    at = column + tl.cast(H - 1, tl.int64) * B
    following = tl.load(next_value + at, mask=inside, other=0.0)
    for _ in range(H):
        r = tl.load(reward + at, mask=inside, other=0.0)
        v = tl.load(next_value + at, mask=inside, other=0.0)
        d = tl.load(discount + at, mask=inside, other=0.0)
        following = r + d * (mix * v + lam * following)
        tl.store(returns + at, following, mask=inside)
        at -= B


@triton.jit(do_not_specialize=["H", "B"])
def backward_kernel(
    grad,  # [H, B] float32, contiguous, as all the others; gradient that reaches `returns`
    next_value,
    discount,
    returns,
    grad_reward,
    grad_next_value,
    grad_discount,
    H,
    B,
    lam,
    mix,
    BLOCK: tl.constexpr,
):
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = column < B
    at = column
    carried = tl.zeros([BLOCK], tl.float32)  # what reaches G[t] through G[t-1]
    for t in range(H):
        last = t == H - 1
        v = tl.load(next_value + at, mask=inside, other=0.0)
        d = tl.load(discount + at, mask=inside, other=0.0)
        following = tl.load(returns + at + B, mask=inside & (not last), other=0.0)
        following = tl.where(last, v, following)
        total = tl.load(grad + at, mask=inside, other=0.0) + carried
        tl.store(grad_reward + at, total, mask=inside)
        tl.store(grad_discount + at, total * (mix * v + lam * following), mask=inside)
        carried = lam * (total * d)
        onward = tl.where(last, carried, 0.0)
        tl.store(grad_next_value + at, mix * (total * d) + onward, mask=inside)
        at += B


def launch(fn: Any, H: int, B: int, lam: float, **slots: Slot) -> Launch:
    """Of one of the kernels, with its tensors [H, B] by its names of them."""
    kernel = Kernel(fn, {"BLOCK": BLOCK}, num_warps=NUM_WARPS)
    numbers = {"H": H, "B": B, "lam": lam, "mix": 1.0 - lam}
    return Launch(kernel, (-(-B // BLOCK),), {**slots, **numbers})


@functools.lru_cache(maxsize=64)
def forward_program(H: int, B: int, lam: float) -> Program:
    slots = _slots(H, B, "input", "reward", "next_value", "discount")
    slots |= _slots(H, B, "output", "returns")
    body = [launch(forward_kernel, H, B, lam, **slots)]
    return Program("lambda_return", list(slots.values()), body)


@functools.lru_cache(maxsize=64)
def backward_program(H: int, B: int, lam: float) -> Program:
    slots = _slots(H, B, "input", "grad", "next_value", "discount", "returns")
    slots |= _slots(H, B, "output", "grad_reward", "grad_next_value", "grad_discount")
    body = [launch(backward_kernel, H, B, lam, **slots)]
    return Program("lambda_return backward", list(slots.values()), body)


def _slots(H: int, B: int, kind: str, *names: str) -> dict[str, Slot]:
    return {name: Slot(name, (H, B), torch.float32, kind) for name in names}


class LambdaReturn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reward, next_value, discount, lam):
        inputs = {"reward": reward, "next_value": next_value, "discount": discount}
        returns = run(forward_program(*reward.shape, lam), inputs)["returns"]
        ctx.save_for_backward(next_value, discount, returns)
        ctx.lam = lam
        return returns

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        next_value, discount, returns = ctx.saved_tensors
        inputs = {
            "grad": grad.contiguous(),  # autograd hands over expanded gradients, e.g. from sum()
            "next_value": next_value, "discount": discount, "returns": returns,
        }  # fmt: skip
        found = run(backward_program(*returns.shape, ctx.lam), inputs)
        return *(found[f"grad_{name}"] for name in ("reward", "next_value", "discount")), None


lambda_return = LambdaReturn.apply
