"""A training run that goes on one cycle at a time: the child process of `benchmarks.run`.

It imports nothing of this folder, so that the package of any checkout can be paced: the trainer and
its worker process are that checkout's own. A cycle is a submitted job, the updates beside it, and
the wait for its episode; between two cycles neither process has work, and there the run stands
until the parent says go.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any


def main(checkout: str, run_dir: str, *options: str) -> None:
    """Train by ``fastdreamer train``'s options; a cycle per line of stdin, JSON on stdout.

    Args:
        checkout: folder that the package has to come from.
        run_dir: the run directory to make.
        options: as for ``fastdreamer train``.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a run shows is for the log
    import fastdreamer

    if Path(fastdreamer.__file__).resolve().parent.parent != Path(checkout).resolve():
        raise SystemExit(f"{fastdreamer.__file__} was imported, not the package of {checkout}")
    import tyro

    from fastdreamer.cli.train import Train, train_defaults
    from fastdreamer.envs import canonical_task
    from fastdreamer.ops.backend import last_backend
    from fastdreamer.training import trainer

    command = tyro.cli(Train, args=options, default=train_defaults(["train", *options]))
    config = command.config
    if canonical_task(command.task) != config.env.task:
        raise SystemExit(f"--env.task {config.env.task} is not {command.task}")
    trainer.create_run(Path(run_dir), config.validate())
    ray = {"ray": command.ray} if getattr(command, "ray", None) else {}  # older checkouts have none
    run = trainer.Trainer(Path(run_dir), **ray)
    turns: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(turns,), daemon=True).start()
    losses: dict[str, float] = {}  # of the first update
    update = trainer.Dreamer.update

    def first(self: Any, *arguments: Any, **options: Any) -> dict[str, float]:
        metrics = update(self, *arguments, **options)
        if not losses:
            losses.update({k: v for k, v in metrics.items() if k.endswith("_loss")})
        return metrics

    class Paced(trainer.Collector):
        """Begins a cycle when told to, and tells how the last one went."""

        began: tuple[float, int, int] | None = None

        def submit(self, job: Any, weights: Any) -> None:
            if not job.random:
                self._pause()
            super().submit(job, weights)

        def _pause(self) -> None:
            now = time.perf_counter()
            if self.began is not None:
                start, frames, updates = self.began
                cycle = {
                    "seconds": now - start,
                    "waited": self.waited,
                    "env_frames": run.env_frames - frames,
                    "updates": run.update - updates,
                    "losses": losses,
                    "ran": {op: last_backend(op) for op in ("observe", "imagine")},
                }
                print(json.dumps(cycle), file=answers, flush=True)
            turns.get()
            self.waited = 0.0
            self.began = time.perf_counter(), run.env_frames, run.update

        def ready(self, timeout: float) -> bool:
            return self._timed(super().ready, timeout)

        def wait(self) -> Any:
            return self._timed(super().wait)

        def _timed(self, call: Any, *arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                if self.began is not None:
                    self.waited += time.perf_counter() - start

    trainer.Dreamer.update, trainer.Collector = first, Paced
    run.train()


def _listen(turns: queue.SimpleQueue[str]) -> None:
    """Take in what the parent says. When it has seen enough or is gone, the run just ends."""
    for line in sys.stdin:
        turns.put(line)
    os._exit(0)
