"""Workers of runs in the tests' own process: forks of one process that has imported torch."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any


class Forked(ForkServerContext):
    """In the place of ``spawn``; as there, a worker has the environment of who started it."""

    def Process(self, *, target: Callable, args: tuple, **how: Any) -> Any:
        return super().Process(target=_work, args=(dict(os.environ), target, args), **how)


def _work(environment: dict[str, str], target: Callable, args: tuple) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*args)


def forked(method: str | None = None, get: Callable = multiprocessing.get_context) -> Any:
    """``multiprocessing.get_context`` of a process whose workers are such forks."""
    if method != "spawn":
        return get(method)
    context = Forked()
    context.set_forkserver_preload(["fastdreamer.training.worker"])
    return context
