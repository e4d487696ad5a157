"""An environment with gymnasium's interface, for algorithms of other libraries.

Importing this registers every task of the suite: ``gymnasium.make("fastdreamer/walker-walk-v0")``.
Needs gymnasium, which the extras ``gym`` and ``compare`` install.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from fastdreamer.envs import list_tasks, make_env
from fastdreamer.envs.wrappers import Env


def make(
    task: str, render_mode: str | None = None, seed: int | None = None, **options: Any
) -> GymnasiumEnv:
    """What ``gymnasium.make("fastdreamer/TASK-v0", …)`` makes; options are those of `make_env`.

    Without a seed it starts from the system's entropy, as gymnasium's own do: several that are
    reset without one play different episodes.
    """
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
    return GymnasiumEnv(make_env(task, seed=seed, **options), render_mode)


class GymnasiumEnv(gymnasium.Env):
    """The same decisions as `env`, seen through gymnasium.

    env: what `make_env` returns. Its only kind of observation is given as an array; pixels and
    state together as a dict. Actions are float32 [A] in [-1, 1]. `step` adds `env_frames`, the
    control steps really made, to its info.
    """

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, env: Env, render_mode: str | None = "rgb_array") -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be rgb_array or None, got {render_mode!r}")
        self.render_mode = render_mode
        self._env = env
        self.metadata = {**self.metadata, "render_fps": 1 / env.decision_seconds}
        by_kind = {kind: _space(kind, shape) for kind, shape in env.obs_shapes.items()}
        self._kind = next(iter(by_kind)) if len(by_kind) == 1 else None
        self.observation_space = by_kind[self._kind] if self._kind else spaces.Dict(by_kind)
        self.action_space = spaces.Box(-1.0, 1.0, (env.action_dim,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Start an episode; with a seed it is a function of the seed and the actions alone."""
        super().reset(seed=seed)
        return self._seen(self._env.reset(seed=seed)), {}

    def step(self, action: np.ndarray):
        """Apply one action; see `Env.step`."""
        obs, reward, terminated, truncated, env_frames = self._env.step(action)
        return self._seen(obs), reward, terminated, truncated, {"env_frames": env_frames}

    def render(self) -> np.ndarray | None:
        """The scene as it is now: uint8 [240, 320, 3]; None without a render mode."""
        return self._env.render() if self.render_mode else None

    def close(self) -> None:
        """Free the simulation."""
        self._env.close()

    def _seen(self, obs: dict[str, np.ndarray]) -> Any:
        return obs[self._kind] if self._kind else obs


def _space(kind: str, shape: tuple[int, ...]) -> spaces.Box:
    if kind == "pixels":
        return spaces.Box(0, 255, shape, np.uint8)
    return spaces.Box(-np.inf, np.inf, shape, np.float32)


def _register() -> None:
    for task in list_tasks():
        gymnasium.register(
            id=f"fastdreamer/{task}-v0",
            entry_point=f"{__name__}:make",
            kwargs={"task": task},
            disable_env_checker=True,  # it would look at every step
        )


_register()
