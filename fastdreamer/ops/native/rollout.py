"""What the native bodies of imagine and, with given actions, open_loop and rssm_step share.

One autograd node stands for the whole rollout. The critic's values hang on a second one over the
same tape, so that actor and critic can be differentiated together or one after the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdreamer import _native
from fastdreamer.ops.native.packs import (
    arrays,
    autocast_bf16,
    first_order,
    flat,
    flat_gru,
    given_readouts,
    like,
    new_latent,
    pack_actor,
    pack_mlp,
    pack_rssm,
    split,
)
from fastdreamer.ops.params import ActorParams, ReturnParams, RSSMParams


class _Wants(NamedTuple):
    """Which gradients a rollout's tape is for; as ImagineWants in csrc/cpu/imagine.h."""

    through: bool = False
    actor: bool = False
    rssm: bool = False
    reward: bool = False
    critic: bool = False
    discount: bool = False


class Call:
    """One rollout: what it was asked, and the tape that its backward passes share."""

    def __init__(
        self,
        op: str,
        params: RSSMParams,
        actor: ActorParams | None = None,
        returns: ReturnParams | None = None,
        *,
        prior: bool = False,
    ) -> None:
        self.op, self.params, self.actor = op, params, actor
        self.returns, self.prior = returns, prior
        self.bf16 = autocast_bf16()
        self.tape: Any = None
        critic = () if returns is None else flat(returns.critic)
        self.wants_critic = torch.is_grad_enabled() and any(
            [getattr(t, "requires_grad", False) for t in critic]
        )

    def parameters(self) -> list[tuple[Tensor | None, ...]]:
        """The differentiable parameters: actor, input layer, GRU, prior, reward, discount."""
        params, actor, returns = self.params, self.actor, self.returns
        return [
            () if actor is None else flat(actor.mlp),
            flat(params.inp),
            flat_gru(params.gru),
            flat(params.prior),
            () if returns is None else flat(returns.reward),
            () if returns is None or not returns.soft_discount else flat(returns.discount),
        ]

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run on start.deter, start.stoch, state_noise, action_noise and given action."""
        if not torch.is_grad_enabled():  # without the node, which takes as long as a small step
            return self.run(*inputs, wants=_Wants())
        parameters = [tensor for group in self.parameters() for tensor in group]
        outputs = _Rollout.apply(self, *inputs, *parameters)
        # the nodes keep what they need; a tape is to live as long as they
        self.params = self.actor = None
        return outputs

    def run(
        self,
        start_deter: Tensor,
        start_stoch: Tensor,
        state_noise: Tensor,
        action_noise: Tensor | None,
        action: Tensor | None,
        *,
        wants: _Wants,
    ) -> tuple[Tensor | None, ...]:
        """deter, stoch, action, prior (mean and std, or logits and None), reward, next_value,
        returns, value, discount."""
        keep = wants.through or wants.critic
        pack = {"bf16": self.bf16, "gradients": keep}
        model = pack_rssm(self.params, **pack)
        actor = heads = None
        if self.actor is not None:
            rotate = start_stoch.shape[1] if self.actor.stoch_first else 0
            actor = pack_actor(self.actor, rotate, **pack)
            actor = (*actor, self.actor.through_feat, self.params.bound_action)
        if (returns := self.returns) is not None:
            rotate = start_stoch.shape[1] if returns.stoch_first else 0
            four = (returns.reward, returns.critic, returns.target, returns.discount)
            heads = [head and pack_mlp(head, rotate=rotate, **pack) for head in four]
            heads = (*heads, returns.gamma, returns.lam, returns.departure)
            heads += given_readouts(returns)
        H, B, _ = state_noise.shape
        new = state_noise.new_empty  # torch.empty would ask torch's default dtype and device
        if action is None:
            action = new(H, B, self.params.dims()["A"])
        deter, stoch = new(H, B, start_deter.shape[1]), new(H, B, start_stoch.shape[1])
        mean = std = reward = next_value = total = value = discount = None
        if self.prior:
            mean, std = new_latent(self.params, stoch)
        if heads is not None:
            reward, next_value, total, value = new(H, B), new(H, B), new(H, B), new(H, B)
            if returns.discount is not None:
                discount = new(H, B)
        self.tape = _native.imagine_forward(
            self.op,
            model,
            actor,
            heads,
            *arrays(start_deter, start_stoch, state_noise, action_noise, action),
            tuple(arrays(deter, stoch, mean, std, reward, next_value, total, value, discount)),
            wants if keep else None,
            torch.get_num_threads(),
        )
        return deter, stoch, action, mean, std, reward, next_value, total, value, discount


class _Rollout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, *tensors):
        inputs, parameters = tensors[:5], tensors[5:]
        start_deter, start_stoch, state_noise, action_noise, given = inputs
        ctx.sizes = [len(group) for group in call.parameters()]
        actor, *rssm, reward, discount = split(ctx.needs_input_grad[6:], ctx.sizes)
        ctx.wants = _Wants(
            through=any(ctx.needs_input_grad),
            actor=any(actor),
            rssm=any(map(any, rssm)),
            reward=any(reward),
            critic=call.wants_critic,
            discount=any(discount),
        )
        outputs = call.run(*inputs, wants=ctx.wants)
        deter, stoch, action, mean, std, reward, next_value, total, value, discount = outputs
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.given = call.tape, given is not None
        # the tape points into these; saved, so that autograd refuses if they are changed
        rolled = (start_deter, start_stoch, state_noise, action_noise, action)
        used = (*rolled, next_value, total, discount)
        ctx.save_for_backward(*used, *parameters)
        constant = [next_value, value]
        if call.returns is not None and not call.returns.soft_discount:
            constant.append(discount)
        ctx.mark_non_differentiable(*[t for t in constant if t is not None])
        drawn = None if ctx.given else action
        return deter, stoch, drawn, mean, std, reward, next_value, total, value, discount

    @staticmethod
    @first_order
    def backward(
        ctx, deter, stoch, action, mean, std, reward, _next_value, total, _value, discount
    ):
        start_deter, start_stoch, _, _, given, _, _, _, *parameters = ctx.saved_tensors
        _, needs_deter, needs_stoch, _, _, needs_action, *_ = ctx.needs_input_grad
        d_deter = torch.empty_like(start_deter) if needs_deter else None
        d_stoch = torch.empty_like(start_stoch) if needs_stoch else None
        d_action = torch.empty_like(given) if needs_action else None
        wants = ctx.wants
        wanted = (wants.actor, *[wants.rssm] * 3, wants.reward, wants.discount)
        grads = [
            like(group) if want else None
            for group, want in zip(split(parameters, ctx.sizes), wanted, strict=True)
        ]
        _native.imagine_backward(
            ctx.tape,
            tuple(
                None if g is None else g.contiguous().numpy()
                for g in (deter, stoch, action, mean, std, reward, total, discount)
            ),
            tuple(arrays(d_deter, d_stoch, d_action)),
            *(None if group is None else arrays(*group) for group in grads),
            torch.get_num_threads(),
        )
        if total is None:  # what nothing reaches
            grads[4] = None if reward is None else grads[4]
            grads[5] = None if discount is None else grads[5]
        return (
            *(None, d_deter, d_stoch, None, None, d_action),
            *(t for group, n in zip(grads, ctx.sizes, strict=True) for t in group or [None] * n),
        )


class Value(torch.autograd.Function):
    """The critic's values of a rollout, differentiable by the critic's parameters."""

    @staticmethod
    def forward(ctx, value, tape, *critic):
        ctx.tape = tape
        ctx.save_for_backward(*critic)
        return value.view_as(value)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        grads = like(ctx.saved_tensors)
        _native.critic_backward(
            ctx.tape, grad.contiguous().numpy(), arrays(*grads), torch.get_num_threads()
        )
        return None, None, *grads
