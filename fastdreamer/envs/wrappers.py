"""The agent's view of a task: normalised actions, repeated; one observation a decision."""

from __future__ import annotations

import numpy as np

from fastdreamer.envs.dmc import EnvError, SuiteTask
from fastdreamer.envs.foreign import GymTask
from fastdreamer.errors import ArgumentError

OBSERVATIONS = {"pixels": ("pixels",), "state": ("state",), "both": ("pixels", "state")}


class Env:
    """An environment of decisions; see `make_env` for the arguments and `step` for the units.

    Attributes: `task` (full name), `action_dim` (A), `action_repeat`, `obs_shapes` (kind →
    shape), `max_decisions` (decisions until the time limit), `decision_seconds` (simulated time
    of one decision).
    """

    def __init__(self, task: SuiteTask | GymTask, *, obs: str, action_repeat: int, image_size: int):
        if obs not in OBSERVATIONS:
            raise ValueError(f"obs must be one of {', '.join(OBSERVATIONS)}, got {obs!r}")
        if action_repeat < 1:
            raise ValueError(f"action_repeat must be at least 1, got {action_repeat}")
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        if task.state_size is None and obs != "pixels":
            raise ArgumentError(
                f"{task.name}: observations are images; obs must be pixels, not {obs}"
            )
        self._task = task
        self.task = task.name
        self.action_dim = len(task.action_min)
        self.action_repeat = action_repeat
        self._image_size = image_size
        shapes = {"pixels": (image_size, image_size, 3), "state": (task.state_size,)}
        self.obs_shapes = {kind: shapes[kind] for kind in OBSERVATIONS[obs]}
        self.max_decisions = -(-task.max_steps // action_repeat)
        self.decision_seconds = task.control_step * action_repeat
        self._scale = (task.action_max - task.action_min) / 2
        self._centre = (task.action_max + task.action_min) / 2
        self._running = self._closed = False

    def reset(self, seed: int | None = None) -> dict[str, np.ndarray]:
        """Start an episode and return its first observation.

        With a seed, the episode is a function of the seed and the actions alone; without one,
        it goes on with the generator that `make_env` or the last seed started.
        """
        self._refuse_closed("reset")
        self._task.reset(seed)
        self._running = True
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, int]:
        """Apply one action for `action_repeat` control steps, or fewer if the episode ends.

        action: [A] in [-1, 1], mapped linearly to the range of each actuator.
        Returns the observation after the last control step ("pixels" uint8 [size, size, 3],
        "state" float32 [S]), the sum of the rewards, terminated (a true end: no value beyond
        it), truncated (the time limit), and the control steps really made (env frames).
        Raises ValueError for a wrong shape, values that are not finite or outside [-1, 1];
        RuntimeError if the episode is over or was never started; EnvError, one too, after `close`.
        """
        self._refuse_closed("step")
        if not self._running:
            raise RuntimeError(f"{self.task}: call reset() before step(): no episode is running")
        control = self._centre + self._scale * self._checked(action)
        total, env_frames, terminated, truncated = 0.0, 0, False, False
        while env_frames < self.action_repeat and not (terminated or truncated):
            reward, terminated, truncated = self._task.step(control)
            total += reward
            env_frames += 1
        self._running = not (terminated or truncated)
        return self._observe(), total, terminated, truncated, env_frames

    def render(self, height: int = 240, width: int = 320) -> np.ndarray:
        """The scene as it is now, for videos: uint8 [height, width, 3].

        Call `end_video` after the last: until then observations are drawn in the larger
        framebuffer, too, which takes longer.
        """
        self._refuse_closed("render")
        return self._task.render(height, width)

    def end_video(self) -> None:
        """Draw no images of other sizes than observations any more: give back their memory."""
        self._refuse_closed("end_video")
        self._task.keep_only(self._image_size, self._image_size)

    def close(self) -> None:
        """Free the simulation and its GL context; what is called afterwards, but this, raises."""
        if not self._closed:
            self._running, self._closed = False, True
            self._task.close()

    def _refuse_closed(self, name: str) -> None:
        if self._closed:
            raise EnvError(f"{self.task}: {name}() after close(): make another environment")

    def _observe(self) -> dict[str, np.ndarray]:
        make = {
            "pixels": lambda: self._task.render(self._image_size, self._image_size),
            "state": self._task.state,
        }
        return {kind: make[kind]() for kind in self.obs_shapes}

    def _checked(self, action: np.ndarray) -> np.ndarray:
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (self.action_dim,):
            raise ValueError(
                f"{self.task}: action must have shape ({self.action_dim},), got {action.shape}"
            )
        if not np.isfinite(action).all():
            raise ValueError(f"{self.task}: action has values that are not finite: {action}")
        if np.abs(action).max() > 1.0 + 1e-6:
            raise ValueError(f"{self.task}: action must lie in [-1, 1], got {action}")
        return action
