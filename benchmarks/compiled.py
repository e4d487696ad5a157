"""The recurrent loops under ``torch.compile``, as baselines.

The compiler unrolls a Python loop, so that compiling a whole one takes a minute for each shape,
precision and direction, and runs about a tenth faster than a loop around one compiled step. Inside
``unrolled()`` whole loops are compiled, outside it steps; ``observe`` and the iterations of
``cem``, with 50 and 300 steps, are never unrolled. Every function here has the arguments of the
eager body of its op and stands in for it; the gate of ``race.py`` holds them to the same limits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # triton's LLVM must be loaded before Mesa's: see conftest.py
from torch import Tensor

from benchmarks import subpixel
from fastdreamer.ops import cem as cem_module
from fastdreamer.ops.codec import DECODE, DECODE_ERROR, ENCODE
from fastdreamer.ops.decide import OP as DECIDE
from fastdreamer.ops.decide import Decision
from fastdreamer.ops.imagine import OP as IMAGINE
from fastdreamer.ops.lambda_return import OP as LAMBDA_RETURN
from fastdreamer.ops.layers import mlp
from fastdreamer.ops.observe import RESETS, Observation
from fastdreamer.ops.open_loop import OP as OPEN_LOOP
from fastdreamer.ops.params import (
    ActorParams,
    DecoderParams,
    EncoderParams,
    Latent,
    ReturnParams,
    RSSMParams,
    State,
    actor_dist,
    latent_dist,
    stack,
)
from fastdreamer.ops.rssm_step import deter_step
from fastdreamer.ops.rssm_step import eager as img_step

# A step that runs with gradients, without them and at several sizes is compiled for each; beyond
# the limit it would run eager without a word, under the name of the compiled one.
torch._dynamo.config.recompile_limit = 64
torch._dynamo.config.fail_on_recompile_limit_hit = True

_unroll = False
_mode: str | None = None
# The bodies themselves, whatever stands in for them.
_open_loop, _imagine, _lambda_return = OPEN_LOOP.eager, IMAGINE.eager, LAMBDA_RETURN.eager
_encode, _decode, _decode_error = ENCODE.eager, DECODE.eager, DECODE_ERROR.eager
_decide = DECIDE.eager


@contextlib.contextmanager
def unrolled() -> Iterator[None]:
    """Compile whole loops where the compiler can."""
    global _unroll
    before, _unroll = _unroll, True
    try:
        yield
    finally:
        _unroll = before


def unrolling() -> bool:
    """Whether whole loops are compiled here."""
    return _unroll


@contextlib.contextmanager
def mode(name: str | None) -> Iterator[None]:
    """Compile with a mode of ``torch.compile``; None is its default."""
    global _mode
    before, _mode = _mode, name
    try:
        yield
    finally:
        _mode = before


def compiled(body: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a function, once a process; shapes are constants of the code."""
    return _compiled(body, _mode)


@functools.cache
def _compiled(body: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    return torch.compile(body, dynamic=False, mode=mode)


def encode(params: EncoderParams, pixels: Tensor) -> Tensor:
    return compiled(_encode)(params, pixels)


def decode(params: DecoderParams, feat: Tensor) -> Tensor:
    body = subpixel.decode if feat.device.type == "cpu" else _decode
    return compiled(body)(params, feat)


def decode_error(params: DecoderParams, feat: Tensor, target: Tensor) -> Tensor:
    body = subpixel.decode_error if feat.device.type == "cpu" else _decode_error
    return compiled(body)(params, feat, target)


def decide(**arguments: Any) -> Decision:
    return Decision(*compiled(_decide)(**arguments))


def rssm_step(
    params: RSSMParams, state: State, action: Tensor, noise: Tensor
) -> tuple[State, Latent]:
    return compiled(img_step)(params, state, action, noise)


def open_loop(params: RSSMParams, start: State, action: Tensor, noise: Tensor) -> State:
    if _unroll:
        return compiled(_open_loop)(params, start, action, noise)
    states, state = [], start
    for action_t, noise_t in zip(action, noise, strict=True):
        state, _ = rssm_step(params, state, action_t, noise_t)
        states.append(state)
    return State(*(torch.stack(parts) for parts in zip(*states, strict=True)))


def imagine(
    params: RSSMParams,
    actor: ActorParams,
    start: State,
    state_noise: Tensor,
    action_noise: Tensor,
    returns: ReturnParams | None = None,
) -> tuple[Tensor, ...]:
    if _unroll:
        return compiled(_imagine)(params, actor, start, state_noise, action_noise, returns)
    steps, state = [], start
    for state_noise_t, action_noise_t in zip(state_noise, action_noise, strict=True):
        state, action = compiled(_act)(params, actor, state, state_noise_t, action_noise_t)
        steps.append((*state, action))
    deter, stoch, action = (torch.stack(parts) for parts in zip(*steps, strict=True))
    if returns is None:
        return deter, stoch, action
    return deter, stoch, action, *compiled(_heads)(returns, start, deter, stoch)


def _act(
    params: RSSMParams, actor: ActorParams, state: State, state_noise: Tensor, action_noise: Tensor
) -> tuple[State, Tensor]:
    action = torch.tanh(actor_dist(actor, state.feat.detach()).sample(action_noise))
    state, _ = img_step(params, state, action, state_noise)
    return state, action


def _heads(
    returns: ReturnParams, start: State, deter: Tensor, stoch: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    feat = torch.cat([deter, stoch], -1)
    before = torch.cat([start.feat[None], feat[:-1]]).detach()
    reward = mlp(returns.reward, feat)[..., 0].to(feat.dtype)
    next_value = mlp((returns.target or returns.critic).detach(), feat)[..., 0].to(feat.dtype)
    value = mlp(returns.critic, before)[..., 0].to(feat.dtype)
    discount = torch.full_like(reward, returns.gamma)
    return reward, value, _lambda_return(reward, next_value, discount, returns.lam)


def observe(
    params: RSSMParams,
    start: State,
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    noise: Tensor,
    resets: tuple[bool, bool, bool] = RESETS["all"],
) -> Observation:
    assert resets == RESETS["all"], "an episode's beginning zeroes all, as in training"
    states, posts, state = [], [], start
    for t in range(len(embed)):
        state, post = compiled(_filter)(params, state, embed[t], action[t], is_first[t], noise[t])
        states.append(state)
        posts.append(post)
    state = State(*(torch.stack(parts) for parts in zip(*states, strict=True)))
    prior = compiled(_prior)(params, state.deter, noise.dtype)
    return Observation(state, stack(posts), prior)


def _filter(
    params: RSSMParams, state: State, embed: Tensor, action: Tensor, first: Tensor, noise: Tensor
) -> tuple[State, Latent]:
    first = first.unsqueeze(-1)
    state = State(*(part.masked_fill(first, 0) for part in state))
    deter = deter_step(params, state, action.masked_fill(first, 0))
    raw = mlp(params.post, torch.cat([deter, embed.to(deter.dtype)], -1))
    post = latent_dist(raw, params.latent, noise.dtype)
    return State(deter, post.sample(noise)), post


def _prior(params: RSSMParams, deter: Tensor, dtype: torch.dtype) -> Latent:
    return latent_dist(mlp(params.prior, deter), params.latent, dtype)


def cem(*args: Any, **kwargs: Any) -> cem_module.Plan:
    with mock.patch.object(cem_module, "evaluate", compiled(cem_module.evaluate)):
        found = cem_module.OP.eager(
            *args, **{"proposals": None, "sample_std": False} | kwargs, roll=open_loop
        )
        return cem_module.Plan(*found)
