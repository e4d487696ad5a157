"""What decides which parameters a run has, their shapes, and what is fed to them."""

from __future__ import annotations

from typing import Any

from fastdreamer.config.config import Config, to_dict

_BEFORE = {
    "env.render": "opengl",
    "model.classes": None,
    "model.unimix": 0.0,
    "model.cell": "gru",
    "model.norm": "none",
    "model.readout": "plain",
    "model.bins": 255,
}
"""What was built in before it could be chosen: an architecture from then does not name it."""


def architecture(config: Config) -> dict[str, Any]:
    """The settings under which weights mean what they were learned to mean, as plain JSON.

    The task and how it is seen, the world model, the depth of the heads, and of an explorer or a
    barrier, where there is one, its own. Everything else of a configuration may change along a run.

    Returns:
        Values by option, ``{"model.deter": 200, ...}``. An agent of more parts has more of them.
    """
    told, behavior, explore = to_dict(config), config.behavior, config.explore
    values = {"agent": config.agent}
    values |= {
        f"{room}.{name}": told[room][name] for room in ("env", "model") for name in told[room]
    }
    values["model.input_hidden"] = config.model.input_hidden or config.model.hidden
    values["model.discount"] = bool(config.model.discount)
    if config.agent == "dreamer":
        values["behavior.actor_layers"] = behavior.actor_layers
        values["behavior.critic_layers"] = behavior.critic_layers
        values["behavior.target_every > 0"] = behavior.target_every > 0
    if explore.method != "none":
        values |= {f"explore.{n}": told["explore"][n] for n in ("method", "at", "heads", "critics")}
        values["explore.units"] = explore.units or config.model.units
    if config.safety.signal != "none":
        values["safety.layers"] = config.safety.layers
    return values


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What keeps weights learned under one :func:`architecture` from another, a text an option.

    Parts that ``before`` had not are no difference: an agent may be given an explorer or a barrier.
    """
    before = {name: value for name, value in _BEFORE.items() if name in now} | before
    return [
        f"{name}, {value!r} here, {now[name]!r} asked for"
        if name in now
        else f"{name}, {value!r} here, without it asked for"
        for name, value in before.items()
        if name not in now or now[name] != value
    ]
