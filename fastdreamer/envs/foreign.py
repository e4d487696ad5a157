"""Tasks from elsewhere: any gymnasium environment, registered or made by a function of the user's.

Nothing here is imported before such a task is named.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import numpy as np

from fastdreamer.envs.dmc import MAX_STEPS, steps_in
from fastdreamer.errors import ArgumentError
from fastdreamer.named import GYM, named

_FUNCTION = re.compile(r"[\w.]+:\w+")
_STEP = 0.05  # seconds of a control step where the environment does not say
_ENDLESS = 1e9  # bounds beyond are none, as ±3.4e38, float32's own
_CHANNELS = (1, 3)  # of an image, its last axis


def is_foreign(name: str) -> bool:
    """Whether a task is none of the suite's: "gym:ID" or "module:function"."""
    return ":" in name


def canonical_foreign(name: str) -> str:
    """The name as it is, if there is such a task.

    Raises ValueError: gymnasium is not installed, has no such environment, or there is no such
    function.
    """
    if name.startswith(GYM):
        _spec(name)
    else:
        _function(name)
    return name


class GymTask:
    """A gymnasium environment, stepped in its own steps, with actions in its own units.

    Has what `envs.dmc.SuiteTask` has; `state_size` is None where observations are images, which
    then are what `render` returns.

    name: "gym:ID" of a registered environment, or "module:function" of a function that returns
    one (looked up on Python's path and in the current directory). time_limit: seconds, no longer
    than the environment's own number of steps, or None for that (1000 where it has none).

    Raises ValueError for an environment that cannot be played: its actions are not a Box of floats
    with finite bounds, or its observations neither a Box of numbers nor images.
    """

    def __init__(self, name: str, *, seed: int = 0, time_limit: float | None = None):
        self.name = name
        self._env = _make(name)
        self._seed: int | None = seed
        gymnasium = importlib.import_module("gymnasium")
        space = self._env.action_space
        box = isinstance(space, gymnasium.spaces.Box)
        if not box or not np.issubdtype(space.dtype, np.floating):  # integers would be cut off
            raise ArgumentError(
                f"{name}: actions are {space}; only continuous ones (a Box of floats) can be "
                "learned here: the actor is a tanh-Normal and its gradient goes through the action"
            )
        if not (np.abs([space.low, space.high]) < _ENDLESS).all():
            raise ArgumentError(
                f"{name}: the range of an action is unbounded ({space}); wrap the environment so "
                "that its action_space has bounds, in a function given as module:function"
            )
        self._action_shape, self._action_dtype = space.shape, space.dtype
        self.action_min = np.asarray(space.low, np.float64).ravel()
        self.action_max = np.asarray(space.high, np.float64).ravel()
        self.state_size = _state_size(name, self._env.observation_space, gymnasium)
        self.control_step = _control_step(self._env)
        limits = [_own_limit(self._env, gymnasium)]
        if time_limit is not None:
            limits.append(steps_in(time_limit, self.control_step, name))
        self.max_steps = min((steps for steps in limits if steps is not None), default=MAX_STEPS)
        self._steps = 0
        self._seen: Any = None

    def reset(self, seed: int | None = None) -> None:
        """Start an episode; with a seed it depends on nothing that happened before."""
        seed, self._seed = (self._seed if seed is None else seed), None
        self._seen, _ = self._env.reset(seed=seed)
        self._steps = 0

    def step(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """One step: reward, terminated (a true end), truncated (a limit)."""
        control = np.clip(action, self.action_min, self.action_max)  # what rounding put beyond
        control = control.reshape(self._action_shape).astype(self._action_dtype)
        self._seen, reward, terminated, truncated, _ = self._env.step(control)
        self._steps += 1
        over = truncated or self._steps >= self.max_steps
        return float(reward), bool(terminated), bool(over and not terminated)

    def state(self) -> np.ndarray:
        """The observation, flattened: float32 [state_size], a fresh array."""
        # A copy: the environment may write its next observation into the same array.
        return np.array(self._seen, np.float32).ravel()

    def render(self, height: int, width: int) -> np.ndarray:
        """The observation where it is an image, else the scene, resized: uint8 [height, width, 3].

        Raises ValueError where there is neither, or a size is below 1.
        """
        from PIL import Image

        if min(height, width) < 1:
            raise ValueError(f"image size must be at least 1 × 1, got {height} × {width}")
        image = self._seen if self.state_size is None else self._rendered()
        image = np.asarray(image)
        if image.shape[-1] == 1:
            image = image.repeat(3, -1)
        if image.shape[:2] == (height, width):
            return image.copy()
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BOX)
        return np.array(resized)

    def _rendered(self) -> np.ndarray:
        try:
            image = self._env.render()
        except ImportError as error:  # gymnasium says what to install; it derives from this
            raise ArgumentError(f"{self.name} cannot draw: {error}") from error
        if not isinstance(image, np.ndarray) or image.ndim != 3 or image.dtype != np.uint8:
            raise ArgumentError(
                f"{self.name} draws no images (render() returned {type(image).__name__}); it must "
                'be made with render_mode="rgb_array", or be learned from state'
            )
        if image.shape[-1] not in _CHANNELS:
            raise ArgumentError(
                f"{self.name} draws images of {image.shape[-1]} channels; render() must return "
                "[h, w, 3] or grey [h, w, 1]"
            )
        return image

    def keep_only(self, height: int, width: int) -> None:
        """Nothing: images are resized from one size."""

    def close(self) -> None:
        """Close the environment."""
        self._env.close()


def _gymnasium(name: str) -> Any:
    try:
        return importlib.import_module("gymnasium")
    except ImportError as error:
        raise ArgumentError(f"{name} needs gymnasium: pip install 'fastdreamer[gym]'") from error


def _spec(name: str) -> Any:
    gymnasium, env_id = _gymnasium(name), name.removeprefix(GYM)
    if ":" in env_id:
        raise ArgumentError(
            f"{name}: gymnasium would import a module for it; name a function of yours that "
            "returns the environment, module:function"
        )
    try:
        return gymnasium.spec(env_id)
    except gymnasium.error.Error as error:
        raise ArgumentError(f"{name}: {error}") from error


def _function(name: str) -> Any:
    if not _FUNCTION.fullmatch(name):
        raise ArgumentError(f"a task is domain-task, gym:ID or module:function, got {name!r}")
    try:
        function = named(name)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(f"task {name!r} cannot be loaded: {error}") from error
    if not callable(function):
        raise ArgumentError(f"task {name!r} is not a function, but {function!r}")
    return function


def _make(name: str) -> Any:
    gymnasium = _gymnasium(name)
    if not name.startswith(GYM):
        env = _function(name)()
        if not isinstance(env, gymnasium.Env):
            raise ArgumentError(f"{name}() must return a gymnasium environment, got {env!r}")
        return env
    spec = _spec(name)
    # What it asks of arguments and returns is its own business; it would be checked at every step.
    options: dict[str, Any] = {"disable_env_checker": True}
    try:
        return gymnasium.make(spec, render_mode="rgb_array", **options)
    except (gymnasium.error.Error, ImportError) as error:
        raise ArgumentError(f"{name}: {error}") from error
    except TypeError:  # it draws nothing and takes no such argument
        return gymnasium.make(spec, **options)


def _control_step(env: Any) -> float:
    """Seconds of a step."""
    # shimmy 2.0.1 says milliseconds a step where frames a second belong, and one number for all
    # tasks; dm_control's own environment, in it, knows.
    inner = getattr(env.unwrapped, "_env", None)
    if hasattr(inner, "control_timestep"):
        return float(inner.control_timestep())
    fps = env.metadata.get("render_fps")
    return 1 / fps if fps else _STEP


def _own_limit(env: Any, gymnasium: Any) -> int | None:
    """After how many steps it ends an episode, as far as it is told."""
    if told := getattr(env.spec, "max_episode_steps", None):
        return told
    while isinstance(env, gymnasium.Wrapper):  # made without a specification
        if isinstance(env, gymnasium.wrappers.TimeLimit):
            return env._max_episode_steps
        env = env.env
    return None


def _state_size(name: str, space: Any, gymnasium: Any) -> int | None:
    """How many numbers an observation has; None where it is an image."""
    if isinstance(space, gymnasium.spaces.Box):
        if space.dtype != np.uint8 or len(space.shape) < 2:
            return int(np.prod(space.shape))
        if len(space.shape) == 3 and space.shape[-1] in _CHANNELS:
            return None
        raise ArgumentError(
            f"{name}: observations are {space}, bytes of several axes, but no images (uint8 "
            "[h, w, 1 or 3]). Wrap the environment, in a function given as module:function: "
            "gymnasium.wrappers.TransformObservation moves channels to the end, "
            "FlattenObservation makes numbers of them"
        )
    raise ArgumentError(
        f"{name}: observations are {space}; a Box is asked for, of numbers or of images (uint8 "
        "[h, w, 1 or 3]). Wrap the environment, for instance in "
        "gymnasium.wrappers.FlattenObservation, in a function given as module:function"
    )
