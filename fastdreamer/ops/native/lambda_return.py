"""Native body of :mod:`fastdreamer.ops.lambda_return`."""

import torch

from fastdreamer import _native
from fastdreamer.ops.native.packs import arrays, first_order


class LambdaReturn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reward, next_value, discount, lam):
        returns = torch.empty_like(reward)
        _native.lambda_return_forward(
            *arrays(reward, next_value, discount), lam, *arrays(returns), torch.get_num_threads()
        )
        ctx.save_for_backward(next_value, discount, returns)
        ctx.lam = lam
        return returns

    @staticmethod
    @first_order
    def backward(ctx, grad):
        next_value, discount, returns = ctx.saved_tensors
        grads = [torch.empty_like(returns) for _ in range(3)]
        # autograd hands over expanded gradients, for example from sum()
        _native.lambda_return_backward(
            *arrays(grad.contiguous(), next_value, discount, returns),
            ctx.lam,
            *arrays(*grads),
            torch.get_num_threads(),
        )
        return *grads, None


lambda_return = LambdaReturn.apply
