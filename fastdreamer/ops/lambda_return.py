"""λ-return of imagined or planned trajectories."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdreamer.ops.backend import Op
from fastdreamer.ops.checks import check_tensor


def lambda_return(
    reward: Tensor,
    next_value: Tensor,
    discount: Tensor,
    lam: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """Return the λ-return of every step of B trajectories of H steps.

    ``G[t] = reward[t] + discount[t] * ((1 - lam) * next_value[t] + lam * G[t+1])``, where
    ``G[H] = next_value[H-1]``, so that the last step bootstraps fully from the critic
    (report, section 3 and its reference 12: Sutton & Barto, Reinforcement Learning, chapter 12).
    Differentiable with respect to the three tensors on every backend.

    Args:
        reward: [H, B] floating; ``reward[t]`` belongs to the transition from state t to t+1.
        next_value: [H, B], dtype and device of ``reward``; ``next_value[t]`` is the critic's value
            of state t+1.
        discount: [H, B], likewise; the factor in [0, 1] on everything after transition t, 0 where
            the trajectory ends with it.
        lam: λ in [0, 1]; 0 is the one-step target, 1 the discounted sum with a final bootstrap.
        backend: ``"eager"``, ``"native"``, ``"triton"``, ``"auto"``, or None for the current one;
            see :mod:`fastdreamer.ops.backend`.

    Returns:
        [H, B] returns, dtype and device of ``reward``.

    Raises:
        TypeError, ValueError: a wrong argument.
        BackendError: an explicitly chosen backend cannot run.
    """
    dims: dict[str, int] = {}
    check_tensor("lambda_return", "reward", reward, ("H", "B"), dims)
    check_tensor("lambda_return", "next_value", next_value, ("H", "B"), dims, like=reward)
    check_tensor("lambda_return", "discount", discount, ("H", "B"), dims, like=reward)
    if reward.numel() == 0:
        raise ValueError(f"lambda_return: reward is empty, {list(reward.shape)}")
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lambda_return: lam must be in [0, 1], got {lam}")
    body = OP.select(backend, reward, next_value, discount)
    return body(reward, next_value, discount, float(lam))


def _eager(reward: Tensor, next_value: Tensor, discount: Tensor, lam: float) -> Tensor:
    following = next_value[-1]
    returns = []
    for t in reversed(range(len(reward))):
        following = reward[t] + discount[t] * ((1 - lam) * next_value[t] + lam * following)
        returns.append(following)
    return torch.stack(returns[::-1])


def _load_native() -> Callable:
    from fastdreamer.ops.native.lambda_return import lambda_return

    return lambda_return


def _load_triton() -> Callable:
    from fastdreamer.ops.triton.lambda_return import lambda_return

    return lambda_return


OP = Op("lambda_return", eager=_eager, native=_load_native, triton=_load_triton)
