"""Safety signals: what judges an observation, positive where safe; and counts of violations."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from fastdreamer.config import Config, ConfigError, SafetyConfig
from fastdreamer.named import named

Signal = Callable[[np.ndarray], np.ndarray]
"""State observations [..., n] -> margins [...], positive where safe."""

_WALKER_STATE = 24  # 14 orientations, the torso's height, 9 velocities (3 of the root, 6 joints)


def walker_signal(min_height: float, max_joint_speed: float) -> Signal:
    """The built-in signal of Walker: the torso is high enough and no joint turns too fast.

    margin = min((height − min_height) / min_height, (max − fastest joint) / max), so that both
    count in parts of their limit; height in metres, speeds in rad/s.
    """

    def signal(state: np.ndarray) -> np.ndarray:
        height, speed = state[..., 14], np.abs(state[..., 18:24]).max(-1)
        return np.minimum(
            (height - min_height) / min_height, (max_joint_speed - speed) / max_joint_speed
        )

    return signal


def refuse_signal(safety: SafetyConfig, how: str) -> NoReturn:
    """Raise ConfigError: a file names a module, and files import nothing by themselves."""
    raise ConfigError(
        f"safety.signal {safety.signal!r} is named by a file alone, which imports nothing: "
        f"name it again by {how} if you trust it"
    )


def load_signal(config: Config, state_size: int) -> Signal:
    """The safety signal that a configuration names.

    Args:
        config: ``safety.signal`` is "walker", of the suite's Walker alone, or "module:function";
            the module is looked up on Python's path and in the current directory.
        state_size: n of the state observations.

    Raises:
        ConfigError: there is no such function, or it does not map [..., n] to finite [...]; or
            the task is not Walker's.
    """
    safety = config.safety
    if safety.signal == "none":
        raise ConfigError("there is no safety.signal; name one, walker or module:function")
    if safety.signal == "walker":
        # fish-swim has as many, and so has gymnasium's BipedalWalker
        walks = re.split("[-_]", config.env.task)[0] == "walker"
        if state_size != _WALKER_STATE or not walks:
            theirs = "others" if state_size == _WALKER_STATE else state_size
            raise ConfigError(
                f"safety.signal 'walker' reads Walker's {_WALKER_STATE} numbers of state, "
                f"{config.env.task} has {theirs}; name your own as module:function"
            )
        return walker_signal(safety.min_height, safety.max_joint_speed)
    try:
        function = named(safety.signal)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"safety.signal {safety.signal!r} cannot be loaded: {error}") from error
    if not callable(function):
        raise ConfigError(f"safety.signal {safety.signal!r} is not a function, but {function!r}")
    for lead in ((), (2, 3)):
        _checked(function, safety.signal, np.zeros((*lead, state_size), np.float32))
    return lambda state: _checked(function, safety.signal, state)


def _checked(function: Signal, name: str, state: np.ndarray) -> np.ndarray:
    """The margins, refused where they are not one finite number a state."""
    try:
        margin = np.asarray(function(state), np.float32)
    except Exception as error:
        raise ConfigError(
            f"safety.signal {name!r} failed on a state of shape {state.shape}: {error!r}"
        ) from error
    if margin.shape != state.shape[:-1] or not np.isfinite(margin).all():
        got = f"shape {margin.shape}" if margin.shape != state.shape[:-1] else "values not finite"
        raise ConfigError(
            f"safety.signal {name!r} must map states [..., {state.shape[-1]}] to one finite margin "
            f"each, of {state.shape} made {got}"
        )
    return margin


class Violations:
    """Counts the decisions whose observation the safety signal calls unsafe.

    Args:
        signal: of ``load_signal``.

    Attributes:
        decisions: observations seen, the first of an episode left out: nobody decided on it.
        count: of them, those of margin 0 or less.
    """

    def __init__(self, signal: Signal) -> None:
        self.signal = signal
        self.decisions = self.count = 0

    def __call__(
        self, t: int, obs: dict[str, np.ndarray], action: np.ndarray, reward: float
    ) -> None:
        """See one step of an episode, t = 0 its first observation."""
        if t:
            self.decisions += 1
            self.count += int(self.signal(obs["state"]) <= 0)
