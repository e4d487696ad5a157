"""One decision of collection with random actions: rendering's qualities against the default."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from benchmarks.collection import VARIANTS, make_env
from benchmarks.timing import PhaseRecorder
from fastdreamer.collector import random_policy, rollout_episode
from fastdreamer.envs import Env
from fastdreamer.envs.gl import GLError, select_gl

REFERENCE = next(iter(VARIANTS))


def _decide(env: Env) -> Callable[[], None]:
    """A function that makes one decision, and a reset where an episode is over."""
    policy = random_policy(env.action_dim, 0)
    steps = rollout_episode(env, policy, 0)

    def decide() -> None:
        nonlocal steps
        if next(steps, None) is None:
            steps = rollout_episode(env, policy, 0)
            next(steps)

    return decide


@pytest.mark.parametrize("variant", VARIANTS)
def test_decision(versus, variant: str) -> None:
    try:
        select_gl()
    except GLError as error:
        pytest.skip(str(error))
    env, reference = make_env(variant, PhaseRecorder()), make_env(REFERENCE, PhaseRecorder())
    # The gate: the same scene but for the quality of its edges and shadows.
    first, expected = (e.reset(seed=0)["pixels"].astype(np.float64) for e in (env, reference))
    assert np.abs(first - expected).mean() < 5  # of 255
    versus(_decide(env), _decide(reference), rounds=100, warmup=5)
    env.close()
    reference.close()
