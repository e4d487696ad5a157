"""Native bodies of the rollouts: imagine, and with given actions open_loop and rssm_step.

One autograd node stands for the whole rollout. The critic's values hang on a second one over the
same tape, so that actor and critic can be differentiated together or one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdreamer import _native
from fastdreamer.ops.native.packs import (
    arrays,
    autocast_bf16,
    flat,
    layers,
    pack_gru,
    pack_mlp,
    split,
)
from fastdreamer.ops.params import (
    ActorParams,
    Normal,
    ReturnParams,
    RSSMParams,
    State,
)


class _Call:
    """One rollout: what it was asked, and the tape that its backward passes share."""

    def __init__(
        self,
        op: str,
        params: RSSMParams,
        actor: ActorParams | None,
        returns: ReturnParams | None,
        *,
        prior: bool,
    ) -> None:
        self.op, self.params, self.actor, self.returns, self.prior = (
            op,
            params,
            actor,
            returns,
            prior,
        )
        self.bf16 = autocast_bf16()
        self.recording = torch.is_grad_enabled()  # off inside of forward, and not in its ctx
        self.tape: Any = None
        critic = returns.critic if returns is not None else None
        self.wants_critic = (
            critic is not None
            and self.recording
            and any(getattr(t, "requires_grad", False) for t in (*critic.weights, *critic.biases))
        )

    def parameters(self) -> list[tuple[Tensor, ...]]:
        """The differentiable parameters: actor, input layer, GRU, prior, reward head."""
        params, actor, returns = self.params, self.actor, self.returns
        return [
            () if actor is None else flat(actor.mlp),
            flat(params.inp),
            tuple(params.gru),
            flat(params.prior),
            () if returns is None else flat(returns.reward),
        ]


def imagine(
    params: RSSMParams,
    actor: ActorParams,
    start: State,
    state_noise: Tensor,
    action_noise: Tensor,
    returns: ReturnParams | None,
) -> tuple[Tensor, ...]:
    """See ``fastdreamer.ops.imagine``: deter, stoch, action, reward, value and returns."""
    call = _Call("imagine", params, actor, returns, prior=False)
    deter, stoch, action, _, _, reward, _, total, value = _Rollout.apply(
        call, *start, state_noise, action_noise, None, *_all(call)
    )
    if call.wants_critic:
        value = _Value.apply(value, call, *flat(returns.critic))
    call.params = call.actor = call.returns = None  # the nodes keep what they need
    return deter, stoch, action, reward, value, total


def open_loop(params: RSSMParams, start: State, action: Tensor, noise: Tensor) -> State:
    """See ``fastdreamer.ops.open_loop``."""
    call = _Call("open_loop", params, None, None, prior=False)
    deter, stoch, *_ = _Rollout.apply(call, *start, noise, None, action, *_all(call))
    return State(deter, stoch)


def rssm_step(
    params: RSSMParams, state: State, action: Tensor, noise: Tensor
) -> tuple[State, Normal]:
    """See ``fastdreamer.ops.rssm_step``: a rollout of one step."""
    call = _Call("rssm_step", params, None, None, prior=True)
    deter, stoch, _, mean, std, *_ = _Rollout.apply(
        call, *state, noise[None], None, action[None], *_all(call)
    )
    return State(deter[0], stoch[0]), Normal(mean[0], std[0])


class _Rollout(torch.autograd.Function):
    """deter, stoch, action, prior mean and std, reward, next_value, returns, value."""

    @staticmethod
    def forward(
        ctx, call, start_deter, start_stoch, state_noise, action_noise, action, *parameters
    ):
        sizes = [len(group) for group in call.parameters()]
        needs = [call.recording and need for need in ctx.needs_input_grad]
        asked = [any(group) for group in split(needs[6:], sizes)]
        actor, rssm, reward = asked[0], any(asked[1:4]), asked[4]
        through = any(needs)
        wants = (through, actor, rssm, reward, call.wants_critic)

        pack = dict(bf16=call.bf16, gradients=through)
        params, policy, returns = call.params, call.actor, call.returns
        model = (
            pack_mlp(params.inp, act_last=True, **pack),
            pack_gru(params.gru, **pack),
            pack_mlp(params.prior, **pack),
            params.min_std,
        )
        policy = policy and (pack_mlp(policy.mlp, **pack), *policy[1:])
        heads = None
        if returns is not None:
            pack["gradients"] = through or call.wants_critic
            heads = (
                pack_mlp(returns.reward, **pack),
                pack_mlp(returns.critic, **pack),
                returns.target and pack_mlp(returns.target, **pack),
                returns.gamma,
                returns.lam,
            )

        H, B, S = state_noise.shape
        new = state_noise.new_empty
        given = action is not None
        if not given:
            action = new(action_noise.shape)
        deter, stoch = new(H, B, start_deter.shape[1]), new(H, B, S)
        mean, std = (new(H, B, S), new(H, B, S)) if call.prior else (None, None)
        reward_out = next_value = total = value = None
        if heads is not None:
            reward_out, next_value, total, value = (new(H, B) for _ in range(4))
        outputs = (deter, stoch, mean, std, reward_out, next_value, total, value)
        call.tape = _native.imagine_forward(
            call.op,
            model,
            policy,
            heads,
            *arrays(start_deter, start_stoch, state_noise, action_noise, action),
            tuple(arrays(*outputs)),
            wants if through or call.wants_critic else None,
            torch.get_num_threads(),
        )
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.sizes, ctx.wants, ctx.given = call.tape, sizes, wants, given
        # the tape points into these; saved, so that autograd refuses if they are changed
        ctx.save_for_backward(
            state_noise, action_noise, action, next_value, total, start_deter, *parameters
        )
        ctx.mark_non_differentiable(*(t for t in (next_value, value) if t is not None))
        if given:
            return deter, stoch, None, mean, std, reward_out, next_value, total, value
        return deter, stoch, action, mean, std, reward_out, next_value, total, value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, deter, stoch, action, mean, std, reward, _, total, __):
        saved = ctx.saved_tensors
        parameters = saved[6:]
        start_deter, S = saved[5], saved[0].shape[2]
        _, wants_actor, wants_rssm, wants_reward, _ = ctx.wants
        needs = ctx.needs_input_grad
        new = start_deter.new_empty
        starts = (
            new(start_deter.shape) if needs[1] else None,
            new(len(start_deter), S) if needs[2] else None,
            torch.empty_like(saved[2]) if ctx.given and needs[5] else None,
        )
        wanted = (wants_actor, wants_rssm, wants_rssm, wants_rssm, wants_reward)
        grads = [
            [torch.empty_like(t, memory_format=torch.contiguous_format) for t in group] if want
            else None
            for group, want in zip(split(parameters, ctx.sizes), wanted, strict=True)
        ]  # fmt: skip
        actor, inp, gru, prior, head = grads
        _native.imagine_backward(
            ctx.tape,
            tuple(
                None if g is None else g.contiguous().numpy()
                for g in (deter, stoch, action, mean, std, reward, total)
            ),
            tuple(arrays(*starts)),
            *(layers(actor), layers(inp), gru and arrays(*gru), layers(prior), layers(head)),
            torch.get_num_threads(),
        )
        return (
            *(None, starts[0], starts[1], None, None, starts[2]),
            *(t for group, n in zip(grads, ctx.sizes, strict=True) for t in group or [None] * n),
        )


class _Value(torch.autograd.Function):
    """The critic's values of a rollout, differentiable by the critic's parameters."""

    @staticmethod
    def forward(ctx, value, call, *critic):
        ctx.tape = call.tape
        ctx.save_for_backward(*critic)
        return value.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        critic = ctx.saved_tensors
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in critic]
        _native.critic_backward(
            ctx.tape, grad.contiguous().numpy(), layers(grads), torch.get_num_threads()
        )
        return None, None, *grads


def _all(call: _Call) -> list[Tensor]:
    return [tensor for group in call.parameters() for tensor in group]
