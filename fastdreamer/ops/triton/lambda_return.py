"""Triton body of :mod:`fastdreamer.ops.lambda_return`: one program per block of columns.

The recurrence is kept in registers; each element of an input is read once and each of an output
written once. Contract and equation are those of the eager body.
"""

import torch
import triton
import triton.language as tl

BLOCK = 128
NUM_WARPS = 4  # one column per thread
# said outright, because Triton 3.10 changes the default of enable_fp_fusion
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}


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


class LambdaReturn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reward, next_value, discount, lam):
        H, B = reward.shape
        returns = torch.empty_like(reward)
        with torch.cuda.device_of(reward):  # does nothing for CPU tensors (interpreter)
            forward_kernel[_grid(B)](
                *(reward, next_value, discount, returns),
                *(H, B, lam, 1.0 - lam),
                BLOCK=BLOCK,
                **OPTIONS,
            )
        ctx.save_for_backward(next_value, discount, returns)
        ctx.lam = lam
        return returns

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        next_value, discount, returns = ctx.saved_tensors
        H, B = returns.shape
        grads = [torch.empty_like(returns) for _ in range(3)]
        with torch.cuda.device_of(grad):
            backward_kernel[_grid(B)](
                grad.contiguous(),  # autograd hands over expanded gradients, e.g. from sum()
                *(next_value, discount, returns, *grads),
                *(H, B, ctx.lam, 1.0 - ctx.lam),
                BLOCK=BLOCK,
                **OPTIONS,
            )
        return *grads, None


def _grid(columns: int) -> tuple[int]:
    return (triton.cdiv(columns, BLOCK),)


lambda_return = LambdaReturn.apply
