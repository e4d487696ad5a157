"""A function of the user's by its name, ``module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

GYM = "gym:"
"""What a registered environment of gymnasium's is named by."""


def names_code(name: str) -> bool:
    """Whether a task's or a safety signal's name is "module:function", code that using it imports.

    Nothing that a file alone names so is imported: the user has to name it again.
    """
    return ":" in name and not name.startswith(GYM)


def named(name: str) -> Any:
    """What "module:attribute" names, looked up on Python's path and in the current directory.

    The module is imported: whoever calls this has been asked to by the user, not by a file.

    Raises:
        ImportError: no such module, or its own imports fail. AttributeError: it has no such name.
    """
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or f"{module}.".startswith(f"{error.name}."):  # it, not what it needs
            raise ModuleNotFoundError(
                f"{error}, neither on Python's path nor in {here}", name=error.name
            ) from error
        raise
    finally:
        sys.path.remove(here)
