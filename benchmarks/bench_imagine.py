"""``imagine``: the rollout, its heads and λ-return, and the updates of actor and critic."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks import compiled, flops
from benchmarks.race import Case
from benchmarks.variants import OURS
from fastdreamer import testing
from fastdreamer.learning import losses
from fastdreamer.ops.imagine import OP, imagine
from fastdreamer.ops.lambda_return import OP as LAMBDA_RETURN
from fastdreamer.ops.layers import MLPParams
from fastdreamer.ops.params import Readout, ReturnParams, State, scalar

H, B = 15, 400  # of preset report, from every state of a batch of 8 × 50
LEARNING_RATE = 8e-5


class Imagined(NamedTuple):
    """What a behaviour update needs of a rollout; None: not asked for."""

    deter: Tensor  # [H, B, D]
    stoch: Tensor  # [H, B, S]
    action: Tensor  # [H, B, A]
    reward: Tensor | None = None  # [H, B]
    returns: Tensor | None = None  # [H, B]
    value: Tensor | None = None  # [H, B], of the states 0..H-1


def inputs(H: int, B: int, sizes: testing.Sizes, *, heads: bool) -> dict[str, Any]:
    """Arguments of ``imagine``; the report has no target critic."""
    arguments = testing.imagine_inputs(sizes, H, B, heads=heads)
    if heads:
        arguments["returns"] = arguments["returns"]._replace(target=None)
    return arguments


def with_heads(
    *, returns: ReturnParams, backend: str, value: bool = False, **rollout: Any
) -> Imagined:
    """``imagine`` with its heads by a backend.

    The eager baseline does no more than it must: heads once for the states 1..H, and the critic
    again in the states 0..H-1 only where its loss is wanted.
    """
    if backend in OURS:
        out = imagine(**rollout, returns=returns, backend=backend)
        seen = out.deter, out.stoch, out.action, out.reward, out.returns
        return Imagined(*seen, out.value if value else None)
    plain = functools.partial(imagine, backend=backend)
    return _composed(plain, scalar, LAMBDA_RETURN.eager, value, returns, **rollout)


def _compiled(*, returns: ReturnParams, value: bool = False, **rollout: Any) -> Imagined:
    scan = compiled.compiled(LAMBDA_RETURN.eager)
    return _composed(compiled.imagine, compiled.compiled(scalar), scan, value, returns, **rollout)


def _composed(
    rollout: Callable[..., Any],
    number: Callable[[MLPParams, Readout, Tensor], Tensor],
    scan: Callable[..., Tensor],
    value: bool,
    returns: ReturnParams,
    *,
    start: State,
    **arguments: Any,
) -> Imagined:
    deter, stoch, action = rollout(start=start, **arguments)[:3]
    feat = torch.cat([deter, stoch], -1)  # [H, B, F], states 1..H
    reward = number(returns.reward, returns.reward_as, feat)
    bootstrap = number(returns.critic.detach(), returns.value_as, feat)
    result = scan(reward, bootstrap, torch.full_like(reward, returns.gamma), returns.lam)
    values = None
    if value:
        before = torch.cat([start.feat[None], feat[:-1].detach()])
        values = number(returns.critic, returns.value_as, before)
    return Imagined(deter, stoch, action, reward, result, values)


def _rollout(*, backend: str, **arguments: Any) -> Imagined:
    out = imagine(**arguments, backend=backend)
    return Imagined(out.deter, out.stoch, out.action)


def _tensors(*trees: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(trees) if isinstance(x, Tensor)]


def _actor_loss(out: Imagined) -> Tensor:
    return losses.actor_loss(out.returns, out.returns.new_ones(H, 1))


def _both_losses(out: Imagined) -> Tensor:
    weights = out.returns.new_ones(H, 1)
    value = out.value.unsqueeze(-1)
    return _actor_loss(out) + losses.critic_loss(value, Readout(), out.returns, weights)


def heads_case(H: int, B: int, sizes: testing.Sizes) -> Case:
    """The rollout and its heads, forward; ``curves`` varies the sizes."""
    arguments = functools.partial(inputs, H, B, sizes, heads=True)
    return _heads_case(arguments(), arguments)


def _heads_case(x: dict[str, Any], arguments: Callable[[], dict[str, Any]], of: str = "") -> Case:
    count = flops.imagine(x["params"], x["actor"], *x["action_noise"].shape[:2], x["returns"])
    return Case(f"imagine + heads{of}", OP, arguments, count, with_heads, _compiled)


def everything_case(B: int, sizes: testing.Sizes = testing.REPORT) -> Case:
    """The rollout and its heads with gradients of all outputs by all parameters.

    What a world model that belongs to somebody else asks for, whose loss nobody knows.
    """

    def leaves(x: dict[str, Any]) -> list[list[Tensor]]:
        params, returns = x["params"]._replace(post=None), x["returns"]
        return [_tensors(params, x["actor"], returns.reward, returns.critic)]

    return Case(
        f"imagine + heads, + backward by everything, B {B}",
        OP,
        functools.partial(inputs, H, B, sizes, heads=True),
        0,  # not counted
        functools.partial(with_heads, value=True),
        functools.partial(_compiled, value=True),
        leaves=leaves,
    )


def cases(x: dict[str, Any], make: Callable[..., dict[str, Any]], of: str = "") -> list[Case]:
    """Everything that an update imagines.

    Args:
        x: arguments, heads included, whose sizes count.
        make: ``make(heads=...)`` returns those that the op gets.
        of: the end of every name.
    """
    params, actor, returns = x["params"], x["actor"], x["returns"]
    H, B, _ = x["action_noise"].shape
    # Trained together, the two get their gradients from one pass: no term of the sum of the
    # losses reaches the other's parameters.
    both = functools.partial(with_heads, value=True)
    both_compiled = functools.partial(_compiled, value=True)
    update = functools.partial(
        Case,
        op=OP,
        inputs=functools.partial(make, heads=True),
        learning_rate=LEARNING_RATE,
    )
    return [
        Case(
            f"imagine{of}",
            OP,
            functools.partial(make, heads=False),
            flops.imagine(params, actor, H, B),
            _rollout,
            compiled.imagine,
        ),
        _heads_case(x, functools.partial(make, heads=True), of),
        update(
            name=f"actor update{of}",
            flops=flops.actor_update(params, actor, H, B, returns),
            call=with_heads,
            compiled=_compiled,
            leaves=lambda x: [_tensors(x["actor"])],
            loss=_actor_loss,
        ),
        update(
            name=f"actor + critic update{of}",
            flops=flops.actor_critic_update(params, actor, H, B, returns),
            call=both,
            compiled=both_compiled,
            leaves=lambda x: [_tensors(x["actor"]), _tensors(x["returns"].critic)],
            loss=_both_losses,
        ),
    ]


CASES = cases(
    inputs(H, B, testing.REPORT, heads=True), functools.partial(inputs, H, B, testing.REPORT)
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_imagine(contest, case: Case) -> None:
    contest(case)
