"""Environments: tasks of the DeepMind Control suite and of gymnasium, by pixels, state or both."""

from __future__ import annotations

from fastdreamer.envs.dmc import (
    EnvError,
    SuiteTask,
    canonical_suite_task,
    check_drawing,
    list_tasks,
)
from fastdreamer.envs.foreign import GymTask, canonical_foreign, is_foreign
from fastdreamer.envs.wrappers import Env
from fastdreamer.errors import ArgumentError

__all__ = [
    "Env",
    "EnvError",
    "canonical_task",
    "is_foreign",
    "list_tasks",
    "make_env",
]


def canonical_task(name: str) -> str:
    """The full name of a task.

    name: of the suite ("walker" and "walker_walk" both mean "walker-walk"), "gym:ID" of a
    registered gymnasium environment, or "module:function" of a function that returns one.

    Raises ValueError where there is none; for the suite with the valid tasks, the nearest first.
    """
    return canonical_foreign(name) if is_foreign(name) else canonical_suite_task(name)


def make_env(
    task: str,
    *,
    obs: str = "pixels",
    action_repeat: int = 2,
    seed: int = 0,
    time_limit: float | None = None,
    image_size: int = 64,
    render: str = "opengl",
    render_quality: str = "full",
) -> Env:
    """Make an environment of decisions.

    task: a name that `canonical_task` understands ("walker", "cheetah-run", "gym:Pendulum-v1").
    obs: "pixels" (uint8 [image_size, image_size, 3]), "state" (float32 [S]) or "both".
    action_repeat: control steps (env frames) for which each action is applied.
    seed: starts the task's random generator, until `reset` is given a seed.
    time_limit: seconds of simulated time; None is the task's own.
    render: who draws the suite's images, "opengl" or "rays", which need no OpenGL and draw a
        slightly other picture (docs/rendering.md).
    render_quality: of the suite's images, each leaving out one thing more: "full", "fast" (no
        multisampling: jagged edges), "matte" (no mirror image), "unshadowed", "bare" (no sky).

    Raises ValueError for an unknown task, kind, renderer or quality, or a task that rays cannot
    draw. State needs no OpenGL; pixels by OpenGL find a backend at the first observation and raise
    `envs.gl.GLError` if there is none.
    """
    if is_foreign(task):
        check_drawing(render, render_quality)
        if render != "opengl":
            raise ArgumentError(f"{task} draws its own images: render={render} is for the suite's")
        made = GymTask(task, seed=seed, time_limit=time_limit)
    else:
        made = SuiteTask(
            task, seed=seed, time_limit=time_limit, render=render, render_quality=render_quality
        )
    return Env(made, obs=obs, action_repeat=action_repeat, image_size=image_size)
