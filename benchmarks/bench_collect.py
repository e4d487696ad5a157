"""One decision of collection with random actions: rendering's qualities against the default."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from benchmarks.collection import VARIANTS, make_env
from benchmarks.timing import PhaseRecorder
from fastdreamer.acting.play import episode_steps, random_policy
from fastdreamer.envs import Env
from fastdreamer.envs.gl import GLError, select_gl


def _decide(env: Env) -> Callable[[], None]:
    """A function that makes one decision, and a reset where an episode is over."""
    policy = random_policy(env.action_dim, 0)
    steps = episode_steps(env, policy, 0)

    def decide() -> None:
        nonlocal steps
        if next(steps, None) is None:
            steps = episode_steps(env, policy, 0)
            next(steps)

    return decide


def test_decision(race) -> None:
    try:
        select_gl()
    except GLError as error:
        pytest.skip(str(error))
    envs = {name: make_env(name, PhaseRecorder()) for name in VARIANTS}
    # The gate: the same scene but for the quality of its edges and shadows.
    images = [env.reset(seed=0)["pixels"].astype(np.float64) for env in envs.values()]
    assert all(np.abs(image - images[0]).mean() < 5 for image in images)  # of 255
    race({name: _decide(env) for name, env in envs.items()}, rounds=100, warmup=5)
    for env in envs.values():
        env.close()
