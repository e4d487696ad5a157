"""torch's CUDA graphs without a GPU, for tests of what is captured.

``install`` puts stand-ins for ``torch.cuda``'s graphs and streams in place, which record the
operations on CPU tensors one by one. As on a GPU, a capture leaves no trace: what it wrote is put
back, what it made is NaN. As on a GPU, a replay runs no Python: the recorded operations read and
write the recorded memory. What a capture forbids raises: numbers from the device to the host or
the other way, sizes that depend on values, generators that the graph does not know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastdreamer.ops.triton import run as run_module

_aten = torch.ops.aten
_READ = {_aten._local_scalar_dense, _aten.equal, _aten.nonzero, _aten.masked_select, _aten._unique2}
_BY_HOST = {
    *(Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.item, Tensor.__bool__, Tensor.__float__),
    *(torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor, Tensor.pin_memory),
}


class CUDAGraph:
    """As ``torch.cuda.CUDAGraph``."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.generators: list[torch.Generator] = []
        self.tape: list[Callable[[], object]] = []
        self.replays = 0

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def replay(self) -> None:
        assert self.tape, "nothing was captured"
        self.replays += 1
        with torch.no_grad():
            for step in self.tape:
                step()


class graph:
    """As ``torch.cuda.graph``."""

    active = False

    def __init__(
        self,
        cuda_graph: CUDAGraph,
        pool: Any = None,
        stream: Stream | None = None,
        capture_error_mode: str = "global",
    ) -> None:
        self._recorder = _Recorder(cuda_graph)
        self._modes = contextlib.ExitStack()

    def __enter__(self) -> None:
        graph.active = True
        self._modes.enter_context(NoHost())
        self._modes.enter_context(self._recorder)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._modes.close()
        graph.active = False
        self._recorder.forget()
        if error is not None:  # torch's raises its own when the broken capture ends
            raise RuntimeError("operation failed due to a previous error during capture")


class Stream:
    """As ``torch.cuda.Stream``: there is one queue, and it is always empty."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        pass

    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins in place."""

    @contextlib.contextmanager
    def stream(stream: Stream | None) -> Iterator[None]:
        assert isinstance(stream, Stream)
        yield

    put = {"CUDAGraph": CUDAGraph, "graph": graph, "Stream": Stream, "stream": stream}
    put["current_stream"] = lambda device=None: Stream()
    for name, value in put.items():
        monkeypatch.setattr(torch.cuda, name, value)
    from fastdreamer.learning import dreamer as agent

    for module in (run_module, agent):
        monkeypatch.setattr(module, "capturing", lambda device: graph.active)


class NoHost(TorchFunctionMode):
    """Refuses what takes numbers from the device to the host, or the other way."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func in _BY_HOST:
            raise RuntimeError(f"not permitted when a stream is capturing: {func.__name__}")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Runs operations, and writes down how to run them again on the same memory."""

    def __init__(self, graph: CUDAGraph) -> None:
        super().__init__()
        self._graph = graph
        self._before: dict[int, tuple[Any, Any]] = {}  # storages written to: themselves, as before
        self._made: dict[int, Any] = {}  # storages that are the graph's own

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if func.overloadpacket in _READ:
            raise RuntimeError(f"not permitted when a stream is capturing: {func}")
        for leaf in leaves:
            if isinstance(leaf, torch.Generator) and not self._knows(leaf):
                raise RuntimeError(f"{func} draws from a generator that the graph does not know")
        given = {_key(x): x.untyped_storage() for x in leaves if isinstance(x, Tensor)}
        written = {_key(x) for x in _written(func, args, kwargs)}
        for key in written - self._made.keys() - self._before.keys():
            self._before[key] = given[key], given[key].clone()
        out = func(*args, **kwargs)
        results = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        new = [x.detach() for x in results if _key(x) not in given]
        self._made |= {_key(x): x.untyped_storage() for x in new}
        if written or new:  # not a view
            plain = lambda x: x.detach() if isinstance(x, Tensor) else x  # noqa: E731
            args, kwargs = pytree.tree_map(plain, (args, kwargs))

            def again() -> None:
                found = pytree.tree_leaves(func(*args, **kwargs))
                fresh = [x for x in found if isinstance(x, Tensor) and _key(x) not in given]
                for target, value in zip(new, fresh, strict=True):
                    target.copy_(value)

            self._graph.tape.append(again)
        return out

    def _knows(self, generator: torch.Generator) -> bool:
        """By its state: an operation gets another Python object of the same generator."""
        states = (known.get_state() for known in self._graph.generators)
        return any(torch.equal(generator.get_state(), state) for state in states)

    def forget(self) -> None:
        """Leave memory as a capture does."""
        for storage, before in self._before.values():
            storage.copy_(before)
        for storage in self._made.values():
            storage.fill_(255)  # NaN, as bytes of any floating type


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation writes to, as its schema says."""
    schema = func._schema.arguments
    named = dict(zip((argument.name for argument in schema), args, strict=False)) | kwargs
    writes = [
        named[argument.name]
        for argument in schema
        if argument.alias_info is not None and argument.alias_info.is_write
        and argument.name in named
    ]  # fmt: skip
    return [x for x in pytree.tree_leaves(writes) if isinstance(x, Tensor)]
