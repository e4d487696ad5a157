"""Dataclasses from tables and the types of their fields; knows no single setting."""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastdreamer.errors import FastdreamerError


class ConfigError(FastdreamerError, ValueError):
    """A setting that cannot run; the message names the field and the values it accepts."""


def build(cls: type, values: dict[str, Any], prefix: str = "", base: Any = None) -> Any:
    """Make a dataclass of a table of its fields, nested ones too; lists become tuples.

    Args:
        values: by the names of fields; those of ``base`` where it has not all of them, or else the
            defaults.

    Raises:
        ConfigError: a field that the class does not have; the message names the nearest.
    """
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    if not isinstance(values, dict):
        name = prefix.rstrip(".") or "config"
        raise ConfigError(f"{name} must be a table of fields, got {values!r}")
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" (did you mean {prefix}{near[0]}?)" if near else ""
            raise ConfigError(
                f"unknown field {prefix}{name}{hint}; valid fields: {', '.join(names)}"
            )
    made = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = build(hints[name], value, f"{prefix}{name}.", base and getattr(base, name))
        elif isinstance(value, list):
            value = tuple(value)
        made[name] = value
    return cls(**made) if base is None else dataclasses.replace(base, **made)


_TYPES = {
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("text", (str,)),
}


def check_types(section: Any, prefix: str = "") -> None:
    """Raise ConfigError for the first field whose value is not of its annotated type."""
    hints = get_type_hints(type(section))
    for f in dataclasses.fields(section):
        value, hint, name = getattr(section, f.name), hints[f.name], f"{prefix}{f.name}"
        options = get_args(hint)
        if dataclasses.is_dataclass(hint):
            check_types(value, f"{name}.")
        elif get_origin(hint) is Literal:
            require(value in options, name, " | ".join(map(repr, options)), value)
        elif get_origin(hint) is tuple:
            ok = isinstance(value, tuple) and len(value) == len(options)
            ok = ok and all(type(v) is int and v > 0 for v in value)
            require(ok, name, f"{len(options)} positive whole numbers", value)
        elif value is not None or type(None) not in options:
            accepts, types = _TYPES[options[0] if options else hint]
            accepts += " or none" if options else ""
            require(type(value) in types, name, accepts, value)
            require(not isinstance(value, float) or math.isfinite(value), name, "finite", value)


def require(ok: bool, name: str, accepts: str, value: Any) -> None:
    """Raise ConfigError saying what the field accepts and what it got, unless ok."""
    if not ok:
        raise ConfigError(f"{name} must be {accepts}, got {value!r}")
