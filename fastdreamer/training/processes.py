"""Workers of the pool as processes of this machine, each at the other end of a pipe."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import signal
import threading
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from fastdreamer.config import Config, to_dict
from fastdreamer.machine.device import CORES
from fastdreamer.ops.backend import kernel_choice
from fastdreamer.training.worker import Lost, Share, work

_GRACE = 2.0  # seconds that a killed process and who writes to it may take to be gone


class Processes:
    """This machine as the place of a pool; see :class:`fastdreamer.training.collector.Place`."""

    patience = 1

    @property
    def cores(self) -> int:
        return CORES

    def start(
        self, name: str, config: Config, episodes: Path, lanes: int, *, instead: bool
    ) -> Process:
        return Process(name, config, episodes, lanes)

    def pack(self, weights: bytes) -> bytes:
        return weights

    def wait(self, carriers: Sequence[Process], timeout: float) -> list[Process]:
        connections = [carrier.connection for carrier in carriers]
        heard = multiprocessing.connection.wait(connections, timeout)
        return [carrier for carrier in carriers if carrier.connection in heard]


class Process:
    """A worker process; see :class:`fastdreamer.training.collector.Carrier`."""

    def __init__(self, name: str, config: Config, episodes: Path, lanes: int) -> None:
        # spawn: a forked child would inherit OpenMP's and the GPU driver's threads half-dead.
        context = multiprocessing.get_context("spawn")
        self.connection, child = context.Pipe()
        settings = json.dumps(to_dict(config))
        self.process = context.Process(
            target=work,
            args=(child, settings, str(episodes), kernel_choice(), lanes),
            daemon=True,
            name=f"fastdreamer-{name.replace(' ', '-')}",
        )
        # Ctrl-C reaches the whole process group, and only the trainer may answer it: the worker
        # inherits this mask. The tracker comes first because starting it undoes the mask.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        child.close()
        self._sender: threading.Thread | None = None

    @property
    def where(self) -> str:
        return f"process {self.process.pid}"

    def send(self, share: Share, weights: bytes) -> None:
        # Beside, as a worker that is stopped takes nothing in and the trainer must hear a signal.
        messages = json.dumps(asdict(share)).encode(), weights
        self._sender = threading.Thread(
            target=_send_all, args=(self.connection, messages), daemon=True
        )
        self._sender.start()

    def hear(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):  # behind all that it has said, or in the midst of it
            self.process.join(_GRACE)
            raise Lost(f"exit code {self.process.exitcode}") from None

    def is_to_blame(self) -> bool:
        return True

    def kill(self) -> None:
        # Not terminate(): a stopped process does not get to that signal. All it leaves half-done
        # are temporary files, which the collector removes.
        self.process.kill()

    def end(self) -> None:
        self.kill()
        self.process.join(_GRACE)
        if self._sender is not None:
            self._sender.join(_GRACE)
        self.connection.close()


def _send_all(connection: Any, messages: Sequence[bytes]) -> None:
    with contextlib.suppress(OSError):  # the worker is dead: the pool finds out
        for message in messages:
            connection.send_bytes(message)
