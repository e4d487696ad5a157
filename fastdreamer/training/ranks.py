"""A learner of several processes: ``torchrun --nproc-per-node N -m -- fastdreamer train …``.

The first rank has the run: replay, collector, logs, checkpoints. It leads, the others follow: they
touch no file, and get agent, optimisers and their sequences of every batch from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import signal
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastdreamer.acting.play import run_backend
from fastdreamer.config import Config, ConfigError, from_dict, to_dict
from fastdreamer.learning.dreamer import Dreamer, NonFiniteLoss
from fastdreamer.learning.ranks import ALONE, RankError, Ranks, together
from fastdreamer.machine.device import native_kernels
from fastdreamer.ops.backend import settle_kernels
from fastdreamer.training import checkpoint

_END, _START, _LAYOUT, _UPDATE, _TARGET = range(5)
"""What the first rank orders."""
_PATIENCE = datetime.timedelta(days=7)
"""That a rank waits for the others: while episodes are collected that plan every action, or the run
is stopped by Ctrl-Z. One that is gone is found out at once, by its closed connections."""
_joined: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)


def is_follower() -> bool:
    """Whether this process is one that torchrun started behind the first."""
    return _from_torchrun() and int(os.environ["RANK"]) > 0


def _from_torchrun() -> bool:
    return (
        dist.is_available()
        and dist.is_torchelastic_launched()
        and int(os.environ["WORLD_SIZE"]) > 1
    )


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started; alone without it. When the first leaves, the others end.

    The group is left to the end of the process: gloo's threads can abort one that closes its
    connections while a peer closes the other ends (seen with torch 2.13).
    """
    if not _from_torchrun():
        yield ALONE
        return
    backend = "gloo"
    if gpus := torch.cuda.device_count():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    with together():
        dist.init_process_group(backend, timeout=_PATIENCE)
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    told = _joined.set(ranks)
    try:
        yield ranks
    finally:
        _joined.reset(told)
        with contextlib.suppress(RankError):  # has been said
            if ranks.rank == 0 and not ranks.apart:
                _order(_END)


def current() -> Ranks:
    """Those of the :func:`joined` around."""
    return _joined.get()


def launcher() -> str:
    """What stands before a command to start as many ranks again on this machine; "" of one."""
    # Without -- torchrun takes --run for one of its own options.
    count = os.environ.get("LOCAL_WORLD_SIZE")
    return f"torchrun --nproc-per-node {count} -m -- " if current().size > 1 else ""


def check_ranks(config: Config) -> None:
    """Refuse what the current ranks cannot learn together.

    Raises:
        ConfigError: batches do not divide, GPUs do not suffice, or a loss is no mean over a batch.
    """
    ranks = current()
    if ranks.size == 1:
        return
    if config.replay.batch % ranks.size:
        raise ConfigError(
            f"replay.batch = {config.replay.batch} sequences cannot be split among "
            f"{ranks.size} ranks alike"
        )
    if config.device.startswith("cuda"):
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise ConfigError(f"{here} ranks on this machine need a GPU each, and it has {gpus}")
        if config.device not in ("cuda", "cuda:0"):
            raise ConfigError(f"ranks take the GPUs from the first on: leave out {config.device}")
    for name, used in (
        ("--explore", config.explore.method != "none"),
        ("--safety", config.safety.signal != "none"),
    ):
        if used:
            raise ConfigError(f"{name} learns in one process: start it without torchrun")


class Lead:
    """What the first rank does for the others; nothing where it is alone."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._layout: _Layout = {}  # that everybody knows

    def start(
        self,
        agent: Dreamer,
        optimizers: dict[str, torch.optim.Optimizer],
        generator: torch.Generator,
    ) -> None:
        """Give everybody what a run has learned so far."""
        if self.ranks.size == 1:
            return
        what = {
            "config": to_dict(agent.config),
            "kernels": native_kernels(agent.config),
            "obs_shapes": agent.obs_shapes,
            "action_dim": agent.action_dim,
            "agent": {name: value.cpu() for name, value in agent.state_dict().items()},
            "optimizers": {n: checkpoint.flatten_optimizer(o) for n, o in optimizers.items()},
            "generator": generator.get_state(),
        }
        _order(_START)
        with together():
            dist.broadcast_object_list([what], src=0)

    def deal(
        self, arrays: dict[str, np.ndarray], *, pace: float, health: bool
    ) -> dict[str, Tensor]:
        """Give every rank its sequences of a batch; this one's.

        Args:
            arrays: [T, B, ...] by name. pace: as ``Dreamer.set_pace`` takes it.
            health: as ``Dreamer.update`` takes it.
        """
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.ranks.size == 1:
            return batch
        layout = {name: (tuple(x.shape), x.dtype) for name, x in batch.items()}
        if layout != self._layout:
            _order(_LAYOUT)
            with together():
                dist.broadcast_object_list([layout], src=0)
            self._layout = layout
        _order(_UPDATE, pace, health)
        return {name: _scatter(x, *layout[name], self.ranks) for name, x in batch.items()}

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Around an update, from its batch on: where it fails here alone, the others still wait for
        their part of it and hear no order; they end when they find this rank gone."""
        try:
            yield
        except NonFiniteLoss:  # which all of them find
            raise
        except BaseException:
            self.ranks.apart = self.ranks.size > 1
            raise

    def update_target(self) -> None:
        """Let everybody copy the critic to its target."""
        if self.ranks.size > 1:
            _order(_TARGET)


_Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shapes [T, B, ...] and types of a batch by name."""


class _Learning(NamedTuple):
    agent: Dreamer
    optimizers: dict[str, torch.optim.Optimizer]
    generator: torch.Generator


def follow(ranks: Ranks) -> NoReturn:
    """Learn as the first rank orders, run after run, until it ends; then end this process at once.

    Raises:
        RankError: it is gone. BackendError: this CPU has not the kernels that it computes with.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_signals_once())
        backend = stack.enter_context(contextlib.ExitStack())
        learning: _Learning | None = None
        layout: _Layout = {}
        while (order := _order())[0] != _END:
            what, pace, health = order
            if what == _START:
                backend.close()
                learning = _begin(ranks, backend)
            elif what == _TARGET:
                learning.agent.update_target()
            elif what == _LAYOUT:
                layout = _hear()
            else:
                batch = {name: _scatter(None, *about, ranks) for name, about in layout.items()}
                _update(learning, batch, pace, bool(health))
    os._exit(0)  # nothing to clean up, and see joined()


@contextlib.contextmanager
def _signals_once() -> Iterator[None]:
    """Leave the first Ctrl-C or SIGTERM, which torchrun gives to all, to the first rank; it saves,
    and orders the end."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.getsignal(number) for number in numbers}

    def note(*_: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

    for number in numbers:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _begin(ranks: Ranks, backend: contextlib.ExitStack) -> _Learning:
    told = _hear()
    # Measured by each for itself, they may differ, and with them the run from one time to the next.
    settle_kernels(told["kernels"])
    config = from_dict(told["config"])
    if config.device.startswith("cuda"):  # torchrun's: one GPU a rank
        config = dataclasses.replace(config, device=f"cuda:{os.environ['LOCAL_RANK']}")
    torch.set_num_threads(config.threads)
    backend.enter_context(run_backend(config))
    agent = Dreamer(config, told["obs_shapes"], told["action_dim"], ranks=ranks)
    agent.load_state_dict(told["agent"])
    optimizers = agent.make_optimizers()
    for name, optimizer in optimizers.items():
        checkpoint.restore_optimizer(optimizer, told["optimizers"][name])
    generator = torch.Generator()
    generator.set_state(told["generator"])
    return _Learning(agent, optimizers, generator)


def _hear() -> Any:
    """What the first rank tells."""
    told: list[Any] = [None]
    with together():
        dist.broadcast_object_list(told, src=0)
    return told[0]


def _update(learning: _Learning, batch: dict[str, Tensor], pace: float, health: bool) -> None:
    batch = {name: x.to(learning.agent.device) for name, x in batch.items()}
    learning.agent.set_pace(learning.optimizers, pace)
    # The first rank finds the same and says it.
    with contextlib.suppress(NonFiniteLoss):
        learning.agent.update(batch, learning.optimizers, learning.generator, health=health)


def _order(what: int | None = None, pace: float = 1.0, health: bool = False) -> list[float]:
    """What the first rank orders, said by it and heard by the others."""
    order = torch.tensor([what or 0, pace, health], dtype=torch.float64)
    with together():
        dist.broadcast(order, src=0)
    return order.tolist()


def _scatter(
    whole: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, ranks: Ranks
) -> Tensor:
    """The sequences of a batch [T, B, ...] for each rank, [T, B/size, ...]; ``whole`` is there on
    the first."""
    T, B, *rest = shape
    own = torch.empty(T, B // ranks.size, *rest, dtype=dtype)
    parts = None if whole is None else [x.contiguous() for x in whole.chunk(ranks.size, 1)]
    raw = lambda x: x.view(torch.uint8)  # noqa: E731  # gloo knows no bool
    with together():
        dist.scatter(raw(own), parts and [raw(x) for x in parts], src=0)
    return own
