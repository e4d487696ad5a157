"""Programs replayed from CUDA graphs: compiled, captured once, launched with one call.

The C++ side (csrc/cuda/) unrolls a program's loops, captures them and writes a slot's new address
into the nodes that use it. Here is what it is captured from, and for how long it is kept.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdreamer.ops.triton.program import (
    ALIGNMENT,
    Affine,
    Arg,
    Compiled,
    Launch,
    Loop,
    Program,
    Spec,
    Value,
    affine,
    empty,
)

CAPACITY = 32  # graphs kept; a training run needs about ten


class Graphs:
    """The graphs that are kept, the least recently used one given up first. Thread-safe.

    A graph belongs to a program (so to its shapes and dtypes), a device, and the slots that are at
    no multiple of 16 bytes; anything else is captured anew. Launches of one graph run one after
    the other, so that they can share its scratch; the driver sees to that across streams, too.
    Kernels are shared by graphs and stay loaded: there are as many as the models and their
    precisions need, whatever the shapes, and a graph of torch's may hold them as well.

    Args:
        capacity: graphs kept.
        compile_kernel: as :func:`fastdreamer.ops.triton.aot.compile_kernel`, which is the default.
        on_host: take CPU tensors, for a stand-in driver that runs kernels on the CPU.
    """

    def __init__(
        self,
        capacity: int = CAPACITY,
        *,
        compile_kernel: Callable[[Spec, int], Compiled] | None = None,
        on_host: bool = False,
    ) -> None:
        self._capacity = capacity
        self._compile = compile_kernel
        self._on_host = on_host
        self._lock = threading.Lock()
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._devices: dict[int, Any] = {}
        self._kernels: dict[tuple[Spec, int], Any] = {}

    def run(self, program: Program, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a program on torch's current stream; return its outputs, new tensors.

        Raises:
            ValueError: an input is missing, unknown, or not what its slot says.
            RuntimeError: there is no driver, or one of its calls failed.
        """
        device = program.check(inputs)
        if device.type != "cuda" and not self._on_host:
            raise ValueError(f"{program.name}: a CUDA graph needs CUDA tensors, got {device}")
        outputs = {slot.name: empty(slot, device) for slot in program.of_kind("output")}
        given = {**inputs, **outputs}
        misaligned = [name for name, x in given.items() if x.data_ptr() % ALIGNMENT]
        self._graph(program, device, misaligned).replay(given)
        return outputs

    def enqueue(self, program: Program, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same while torch captures its current stream: the launches become part of its graph.

        Outputs and scratch come from that graph's memory. Loading a kernel is not allowed inside a
        capture, so each must have been loaded by an earlier :meth:`run`.

        Raises:
            RuntimeError: a kernel is not loaded, or as :meth:`run`.
        """
        device = program.check(inputs)
        new = {s.name: empty(s, device) for s in program.slots.values() if s.kind != "input"}
        tensors = {**inputs, **new}
        misaligned = [name for name, x in tensors.items() if x.data_ptr() % ALIGNMENT]
        with self._lock:
            graph = self._graphs.get(self._key(program, device, misaligned))
            loop = graph.loop if graph else self._describe(program, device, misaligned, load=False)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        loop.enqueue([tensors[name].data_ptr() for name in program.slots], stream)
        return {slot.name: tensors[slot.name] for slot in program.of_kind("output")}

    def clear(self) -> None:
        """Give up every graph, kernel and device context; the next run starts anew.

        Waits for the devices. A graph of torch's into which :meth:`enqueue` put launches must not
        be replayed any more.
        """
        with self._lock:
            self._graphs.clear()
            self._kernels.clear()
            self._devices.clear()

    def _forget(self) -> None:
        """In a forked child: leave what belongs to the parent alone, to the child's end.

        Where scratch was used on other streams than its own, torch's allocator asks CUDA for events
        when it is freed: in a child an error inside a destructor, which ends the process. So not
        even the interpreter may free it, when it finishes.
        """
        parents = self._graphs, self._kernels, self._devices
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(parents))
        self._lock = threading.Lock()
        self._graphs, self._kernels, self._devices = OrderedDict(), {}, {}

    def __len__(self) -> int:
        return len(self._graphs)

    @staticmethod
    def _key(program: Program, device: torch.device, misaligned: Sequence[str]) -> tuple:
        return program, device.index or 0, frozenset(misaligned)

    def _graph(self, program: Program, device: torch.device, misaligned: Sequence[str]) -> _Graph:
        key = self._key(program, device, misaligned)
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None:
                loop = self._describe(program, device, misaligned)
                graph = self._graphs[key] = _Graph(program, device, loop)
                while len(self._graphs) > self._capacity:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            return graph

    def _describe(
        self,
        program: Program,
        device: torch.device,
        misaligned: Sequence[str],
        *,
        load: bool = True,
    ) -> Any:
        """A loop with all of a program's launches."""
        from fastdreamer import _native

        owner = self._devices.get(device.index or 0)
        if owner is None:
            owner = self._devices[device.index or 0] = _native.CudaDevice(device.index or 0)
        slots = list(program.slots.values())
        places = {slot.name: i for i, slot in enumerate(slots)}
        loop = _native.CudaLoop(owner, [slot.numel * slot.dtype.itemsize for slot in slots])

        compiled = self._compile_all(program, misaligned, owner) if load else {}

        def add(body: Sequence[Launch | Loop], counts: dict[str, int]) -> None:
            depths = {name: depth for depth, name in enumerate(counts)}
            for item in body:
                if isinstance(item, Loop):
                    if item.count:
                        loop.begin(item.count)
                        add(item.body, {**counts, item.name: item.count})
                        loop.end()
                    continue
                kernel = self._kernel(item, item.spec(counts, misaligned), owner, compiled)
                values = [_argument(value, places, depths) for value in item.args.values()]
                loop.launch(kernel, item.grid, tuple(values))

        add(program.body, {})
        return loop

    def _compile_all(
        self, program: Program, misaligned: Sequence[str], device: Any
    ) -> dict[Spec, Compiled]:
        """Those of a program's kernels that are not loaded yet."""
        missing: dict[Spec, None] = {}

        def add(body: Sequence[Launch | Loop], counts: dict[str, int]) -> None:
            for item in body:
                if isinstance(item, Loop):
                    if item.count:
                        add(item.body, {**counts, item.name: item.count})
                else:
                    spec = item.spec(counts, misaligned)
                    if (spec, device.ordinal) not in self._kernels:
                        missing[spec] = None

        add(program.body, {})
        if self._compile is not None:
            return {spec: self._compile(spec, device.capability) for spec in missing}
        if not missing:
            return {}
        from fastdreamer.ops.triton.aot import compile_kernels

        return compile_kernels(missing, device.capability)

    def _kernel(
        self, launch: Launch, spec: Spec, device: Any, compiled: Mapping[Spec, Compiled]
    ) -> Any:
        from fastdreamer import _native

        key = (spec, device.ordinal)
        kernel = self._kernels.get(key)
        if kernel is None:
            made = compiled.get(spec)
            if made is None:
                raise RuntimeError(
                    f"{launch.kernel.name} is not loaded, and CUDA loads nothing while a graph is "
                    "captured: make the same call once before the capture"
                )
            kernel = self._kernels[key] = _with_memory(
                lambda: _native.CudaKernel(
                    device=device, name=made.name, image=made.image, kinds=list(made.kinds),
                    hidden=made.hidden, threads=made.threads, shared_bytes=made.shared_bytes,
                )
            )  # fmt: skip
        return kernel


class _Graph:
    """One program's graph and the scratch that it works in."""

    def __init__(self, program: Program, device: torch.device, loop: Any) -> None:
        self.loop = loop
        self._names = list(program.slots)
        self._scratch = {slot.name: empty(slot, device) for slot in program.of_kind("scratch")}
        self._device = device
        self._streams: set[int] = set()

    def replay(self, given: Mapping[str, Tensor]) -> None:
        tensors = {**given, **self._scratch}
        addresses, stream = [tensors[name].data_ptr() for name in self._names], self._stream()
        _with_memory(lambda: self.loop.replay(addresses, stream))

    def _stream(self) -> int:
        if self._device.type != "cuda":
            return 0
        stream = torch.cuda.current_stream(self._device)
        if stream.cuda_stream not in self._streams:
            self._streams.add(stream.cuda_stream)
            for tensor in self._scratch.values():  # freed, it must not be reused before its end
                tensor.record_stream(stream)
        return stream.cuda_stream


def _with_memory(call: Callable[[], Any]) -> Any:
    """What a call returns; it is made once more if the driver has no memory for it.

    Kernels and graphs are allocated outside torch, which may hold the memory and not use it.
    """
    try:
        return call()
    except RuntimeError as error:
        if "CUDA_ERROR_OUT_OF_MEMORY" not in str(error):
            raise
    torch.cuda.empty_cache()
    return call()


def _argument(value: Value, places: Mapping[str, int], depths: Mapping[str, int]) -> Any:
    """As the C++ loop takes it; offsets become bytes."""
    if isinstance(value, float):
        return value
    if isinstance(value, Arg):
        offset = value.offset * value.slot.dtype.itemsize
        return (places[value.slot.name], offset.base, _terms(offset, depths))
    number = affine(int(value) if isinstance(value, bool) else value)
    return (number.base, _terms(number, depths))


def _terms(value: Affine, depths: Mapping[str, int]) -> tuple:
    return tuple((depths[t.loop], t.stride, t.start, t.step, t.modulo) for t in value.terms)


GRAPHS = Graphs()
"""The graphs of this process."""

# A fork may have copied a lock that another thread holds, and CUDA does not work in the child.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=GRAPHS._forget)
