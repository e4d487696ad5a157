"""Environments: DeepMind Control suite tasks from pixels, state or both."""

from __future__ import annotations

from fastdreamer.envs.dmc import SuiteTask, canonical_task, list_tasks
from fastdreamer.envs.wrappers import Env

__all__ = ["Env", "canonical_task", "list_tasks", "make_env"]


def make_env(
    task: str,
    *,
    obs: str = "pixels",
    action_repeat: int = 2,
    seed: int = 0,
    time_limit: float | None = None,
    image_size: int = 64,
    render_quality: str = "full",
) -> Env:
    """Make an environment of decisions from a suite task.

    task: a name that `canonical_task` understands ("walker", "cheetah-run").
    obs: "pixels" (uint8 [image_size, image_size, 3]), "state" (float32 [S]) or "both".
    action_repeat: control steps (env frames) for which each action is applied.
    seed: starts the task's random generator, until `reset` is given a seed.
    time_limit: seconds of simulated time; None is the task's own.
    render_quality: "full", or "fast" without multisampling (about twice as fast, jagged edges).

    Raises ValueError for an unknown task, kind or quality. State needs no OpenGL; pixels find a
    backend at the first observation and raise `envs.gl.GLError` if there is none.
    """
    suite_task = SuiteTask(task, seed=seed, time_limit=time_limit, render_quality=render_quality)
    return Env(suite_task, obs=obs, action_repeat=action_repeat, image_size=image_size)
