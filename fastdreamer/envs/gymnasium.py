"""An environment with gymnasium's interface, for algorithms of other libraries.

Needs gymnasium, which the extra ``compare`` installs; nothing else here imports it.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from fastdreamer.envs.wrappers import Env


class GymnasiumEnv(gymnasium.Env):
    """The same decisions as `env`, seen through gymnasium.

    env: what `make_env` returns. Its only kind of observation is given as an array; pixels and
    state together as a dict. Actions are float32 [A] in [-1, 1]. `step` adds `env_frames`, the
    control steps really made, to its info.
    """

    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(self, env: Env) -> None:
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

    def render(self) -> np.ndarray:
        """The scene as it is now: uint8 [240, 320, 3]."""
        return self._env.render()

    def close(self) -> None:
        """Free the simulation."""
        self._env.close()

    def _seen(self, obs: dict[str, np.ndarray]) -> Any:
        return obs[self._kind] if self._kind else obs


def _space(kind: str, shape: tuple[int, ...]) -> spaces.Box:
    if kind == "pixels":
        return spaces.Box(0, 255, shape, np.uint8)
    return spaces.Box(-np.inf, np.inf, shape, np.float32)
