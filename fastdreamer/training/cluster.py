"""Workers of the pool as Ray actors, and whole runs as Ray tasks, on whatever a cluster has.

The only file that imports Ray, and only when it is asked for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import queue
import re
import shutil
import signal
import socket
import tempfile
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from fastdreamer._version import __version__
from fastdreamer.config import Config, to_dict
from fastdreamer.errors import FastdreamerError, how_to_install
from fastdreamer.files import is_stale, replacing
from fastdreamer.machine.device import CORES
from fastdreamer.ops.backend import kernel_choice
from fastdreamer.training.worker import Lost, Share, converse

_log = logging.getLogger("fastdreamer")

_PATIENCE = 5.0  # seconds that a cluster may take to answer at its address
_SAVING = 60.0  # seconds that runs may take to finish an update and save
_FORWARDED = ("FASTDREAMER_BACKEND", "FASTDREAMER_ISA", "FASTDREAMER_ARITHMETIC")
"""Variables that a worker computes by, wherever it is. What draws is each machine's own affair."""
_FOLDER = re.compile(r"fastdreamer-(\d+)-[0-9a-f]{32}")


class ClusterError(FastdreamerError, RuntimeError):
    """Ray cannot start, or a cluster cannot be joined; says why in one line."""


@contextlib.contextmanager
def connected(address: str, workers: int = 0) -> Iterator[Cluster]:
    """The cluster of this process: the one that it is connected to already, or for so long another.

    Args:
        address: ``local`` starts one of this machine; ``auto`` joins the one that runs here, or
            that ``RAY_ADDRESS`` names; HOST:PORT joins another, which this machine is a node of.
        workers: that one of this machine has room for, however many cores it has.

    Raises:
        ClusterError: there is none, it does not start, or Ray is not installed.
    """
    ray = _ray()
    if address not in ("auto", "local"):
        _look_for(address)
    if ray.is_initialized():
        yield Cluster(ray)
        return
    local = {"num_cpus": max(CORES, workers), "include_dashboard": False}
    how = local if address == "local" else {}
    own = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", **how)
    except Exception as error:  # of any kind, by what is amiss
        why = " ".join(str(error).split()) or type(error).__name__
        if address == "auto":
            why += " (`ray start --head` starts one here, and so does --ray local by itself)"
        raise ClusterError(f"--ray {address}: {why}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, own)  # Ray has put its own there
    try:
        yield Cluster(ray)
    finally:
        ray.shutdown()


def _ray() -> Any:
    # What raylets report of lost workers would go to standard output, whatever init() is told.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ClusterError(how_to_install(error) or str(error)) from error
    return ray


def _look_for(address: str) -> None:
    """Refuse an address where nobody listens: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ClusterError(
            f"--ray takes auto, local or the HOST:PORT that `ray start` names, got {address!r}"
        )
    try:
        socket.create_connection((host, int(port)), _PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"--ray {address}: nothing answers there ({error})") from error


class Cluster:
    """A Ray cluster as the place of a pool; see :class:`fastdreamer.training.collector.Place`."""

    patience = 2

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    @property
    def cores(self) -> int:
        return max(1, int(self._ray.cluster_resources().get("CPU", 0)))

    def describe(self) -> str:
        nodes, cores = sum(node["Alive"] for node in self._ray.nodes()), self.cores
        return f"Ray: {nodes} node{'s' * (nodes > 1)}, {cores} core{'s' * (cores > 1)}"

    def start(
        self, name: str, config: Config, episodes: Path, lanes: int, *, instead: bool
    ) -> Actor:
        # A lost node's cores are lost: then whoever is left takes one more.
        return Actor(self._ray, config, episodes, lanes, cores=0 if instead else 1)

    def pack(self, weights: bytes) -> Any:
        return self._ray.put(weights)

    def wait(self, carriers: Sequence[Actor], timeout: float) -> list[Actor]:
        streams = {carrier.stream: carrier for carrier in carriers}
        for count, seconds in ((1, timeout), (len(streams), 0.0)):
            heard, _ = self._ray.wait(list(streams), num_returns=count, timeout=seconds)
            if not heard:
                break
        return [streams[stream] for stream in heard]

    def share(self, count: int) -> int:
        """Cores that each of so many runs can have, on one node; at least 1."""
        return max(1, min(self.cores // count, self._largest()))

    def _largest(self) -> int:
        nodes = [node["Resources"].get("CPU", 0) for node in self._ray.nodes() if node["Alive"]]
        return int(max(nodes, default=0))

    def run(
        self, calls: Mapping[str, Call], *, gpu: bool, look: Callable[[], None]
    ) -> Iterator[tuple[str, Any]]:
        """Run calls as tasks; each that was lost, with its node perhaps, is made again.

        Args:
            calls: by what they are called in messages. They go on with what they find done, and
                take an interrupt (as from Ctrl-C) for the wish that they save and end.
            gpu: whether each needs one.
            look: called once a second.

        Yields:
            Names and results, in the order in which the calls end. Whoever stops to listen stops
            them.

        Raises:
            ClusterError: a call was lost too often, or no node has a GPU.
            FastdreamerError: what a call raised of them, by its message.
        """
        ray, lost = self._ray, Counter[str]()
        if gpu and not ray.cluster_resources().get("GPU"):
            raise ClusterError("--ray: no node of the cluster has a GPU")
        environ = _forwarded()
        going: dict[Any, str] = {}

        def start(name: str) -> None:
            cores = max(1, min(calls[name].cores, self._largest()))
            how = {"num_cpus": cores, "num_gpus": int(gpu), "max_retries": 0, "max_calls": 1}
            task = ray.remote(scheduling_strategy="SPREAD", **how)(_call)
            going[task.remote(environ, calls[name].function, calls[name].arguments)] = name

        try:
            for name in calls:
                start(name)
            while going:
                ended, _ = ray.wait(list(going), timeout=1.0)
                look()
                for task in ended:
                    name = going.pop(task)
                    try:
                        answer = ray.get(task)
                    except ray.exceptions.RayTaskError:
                        raise  # a fault of ours
                    except ray.exceptions.RayError as error:
                        lost[name] += 1
                        why = str(error).strip().partition(". ")[0].splitlines()[0]
                        if lost[name] > self.patience:
                            raise ClusterError(f"{name} was lost too often ({why})") from error
                        _log.warning("%s was lost (%s); it goes on where it had saved", name, why)
                        start(name)
                        continue
                    if "error" in answer:
                        raise FastdreamerError(f"{name}: {answer['error']}")
                    yield name, answer["result"]
        finally:
            for task in going:
                ray.cancel(task)
            if going:
                ray.wait(list(going), num_returns=len(going), timeout=_SAVING)


class Call(NamedTuple):
    """What a task does: a function of a module, on so many cores."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    cores: int


def _call(
    environ: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> dict[str, Any]:
    """The task."""
    os.environ.update(environ)
    try:
        return {"result": function(*arguments)}
    except FastdreamerError as error:
        return {"error": str(error)}


def _forwarded() -> dict[str, str]:
    return {name: os.environ[name] for name in _FORWARDED if name in os.environ}


class Actor:
    """A worker as Ray actor; see :class:`fastdreamer.training.collector.Carrier`.

    What it says comes as a stream: who it is, then the bytes that a worker process would send, and
    before them the files that it has written.
    """

    def __init__(self, ray: Any, config: Config, episodes: Path, lanes: int, cores: int) -> None:
        self._ray, self._episodes = ray, episodes
        self._video: Path | None = None
        self.where: str | None = None
        self._node = ""
        environ = _forwarded()
        settings = json.dumps(to_dict(config))
        # One thread takes what is sent, one says what is said.
        how = {"num_cpus": cores, "max_concurrency": 2, "scheduling_strategy": "SPREAD"}
        actor = ray.remote(**how)(_Worker)
        self._actor = actor.remote(environ, settings, kernel_choice(), lanes)
        self.stream = self._actor.said.options(num_returns="streaming").remote()

    def send(self, share: Share, weights: Any) -> None:
        self._video = share.video and Path(share.video)
        self._actor.take.remote(json.dumps(asdict(share)).encode(), weights)

    def hear(self) -> dict[str, Any] | None:
        try:
            said = self._ray.get(next(self.stream))
        except (self._ray.exceptions.RayError, StopIteration) as error:
            if getattr(error, "actor_init_failed", False):  # as it will anywhere else
                raise ClusterError(f"a node cannot run a collector: {self._fate(error)}") from error
            raise Lost(self._fate(error)) from error
        if isinstance(said, bytes):
            return json.loads(said)
        if isinstance(said, dict):
            self._greet(**said)
        else:
            self._keep(*said)
        return None

    def _greet(self, pid: int, host: str, node: str, version: str) -> None:
        if version != __version__:
            raise ClusterError(
                f"{host} has fastdreamer {version}, and here is {__version__}: install the same"
            )
        self.where, self._node = f"process {pid} on {host}", node

    def _keep(self, name: str, content: bytes) -> None:
        """Write a file as the worker has written it."""
        own = self._video if self._video and name == self._video.name else self._episodes / name
        own.parent.mkdir(parents=True, exist_ok=True)
        with replacing(own) as temporary:
            temporary.write_bytes(content)

    def _fate(self, error: Exception) -> str:
        """Which it was and what became of it, in a line: Ray's messages are pages."""
        if isinstance(error, self._ray.exceptions.ActorUnavailableError):
            why = "it cannot be reached any more"
        else:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            why = lines[-1].partition(". ")[0] if lines else type(error).__name__
        return why if self.where is None else f"{self.where}: {why}"

    def is_to_blame(self) -> bool:
        """Not where its node is lost as well, which a cluster finds out after some seconds."""
        alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        return self._node in alive

    def kill(self) -> None:
        self._ray.kill(self._actor)

    end = kill


def _own_folder() -> Path:
    """Where an actor's files are until they are said. What others were killed over is removed."""
    place = Path(tempfile.gettempdir())
    for path in place.glob("fastdreamer-*"):
        if match := _FOLDER.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):
                if is_stale(path, match[1]):
                    shutil.rmtree(path, ignore_errors=True)  # as another user's
    return place / f"fastdreamer-{os.getpid()}-{uuid.uuid4().hex}"


class _Worker:
    """The actor: a worker that talks through two queues, in a thread of its own."""

    def __init__(self, environ: dict[str, str], *settings: Any) -> None:
        os.environ.update(environ)
        self._taken: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._folder = _own_folder()  # made by the first file in it
        threading.Thread(target=self._work, args=settings, daemon=True).start()

    def _work(self, config_json: str, kernels: dict[str, str] | None, lanes: int) -> None:
        converse(self, config_json, str(self._folder), kernels, lanes)

    def take(self, share: bytes, weights: bytes) -> None:
        """A share, and its weights."""
        told = json.loads(share)
        if told["video"] is not None:
            told["video"] = str(self._folder / Path(told["video"]).name)
        self._taken.put(json.dumps(told).encode())
        self._taken.put(weights)

    def said(self) -> Iterator[Any]:
        """Who this is, and all that it says."""
        node = _ray().get_runtime_context().get_node_id()
        yield {"pid": os.getpid(), "host": platform.node(), "node": node, "version": __version__}
        while True:
            yield self._said.get()

    # ------------------------------------------- the connection that converse() talks through

    def recv_bytes(self) -> bytes:
        return self._taken.get()

    def send_bytes(self, message: bytes) -> None:
        """Say it, behind the files that have been written since."""
        if self._folder.exists():
            for path in sorted(self._folder.iterdir()):
                self._said.put((path.name, path.read_bytes()))
                path.unlink()
            self._folder.rmdir()
        self._said.put(message)
