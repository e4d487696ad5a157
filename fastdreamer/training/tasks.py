"""Whole runs as tasks of a cluster, side by side: each saves and ends when it is asked to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from fastdreamer.learning.dreamer import NonFiniteLoss
from fastdreamer.training.cluster import Call, Cluster
from fastdreamer.training.trainer import RunError, Stopped


def run_tasks(
    cluster: Cluster,
    calls: Mapping[str, Call],
    *,
    gpu: bool,
    look: Callable[[], None],
    ended: Callable[[str], None] = lambda name: None,
) -> None:
    """Bring all runs to their ends.

    Args:
        calls: of functions that return what :func:`carry_out` does, by what they are called.
        gpu: whether each needs one.
        look: called once a second, and when a run has ended.
        ended: told the name of each that has.

    Raises:
        Stopped: one was stopped; all of them are then.
        ClusterError, FastdreamerError: see ``Cluster.run``.
    """
    with contextlib.closing(cluster.run(calls, gpu=gpu, look=look)) as results:
        for name, done in results:
            look()
            if not done:
                raise Stopped
            ended(name)


def carry_out(work: Callable[[], None]) -> bool:
    """What a task does: the work; whether it came to its end and was not stopped.

    Raises:
        RunError: a loss became NaN or infinite.
    """
    try:
        work()
    except (Stopped, KeyboardInterrupt):
        return False
    except NonFiniteLoss as error:
        raise RunError(f"the {error}") from error
    return True
