"""Which body of an op runs: eager PyTorch, the native C++ core, or Triton.

A call resolves its backend from the ``backend=`` argument, then the :func:`use_backend` context,
then the environment variable ``FASTDREAMER_BACKEND``, then ``auto``. An explicit choice that
cannot run raises :class:`BackendError` with the reason; only ``auto`` falls back (to eager), and
it logs each reason once per op on the logger ``fastdreamer``.

``auto`` takes native for CPU tensors, unless the CPU has no instruction set that makes it faster
than eager (see :func:`why_slow`), and triton for CUDA tensors. What each body accepts:

- eager: any device and floating dtype (float64 is the reference; autocast works);
- native: CPU tensors, triton: CUDA tensors; both want them contiguous (for others auto warns once
  an op and takes eager; nothing is copied unasked) and their floating dtypes float32 (of
  ``observe`` and ``decide`` the embedding may be bfloat16), so that auto takes eager for float64
  and bfloat16 and an explicit choice raises;
- both differentiate in reverse mode alone: inside ``torch.func``'s transforms and
  ``torch.autograd.forward_ad.dual_level`` auto takes eager and an explicit choice raises;
- triton needs a GPU of compute capability 8.0 or newer, NVIDIA's driver, Triton 3.6 or newer and
  the extension built (:mod:`fastdreamer.ops.gpu`); without them auto takes eager;
- triton takes CPU tensors where Triton's interpreter is on (``TRITON_INTERPRET=1``, set before
  triton is imported; for tests, it is slow), but not under autocast to bfloat16, which it computes
  wrongly.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.metadata
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastdreamer.errors import ArgumentError, FastdreamerError, how_to_install
from fastdreamer.ops.gpu import interpreting, why_no_cuda, why_no_kernels
from fastdreamer.ops.private import forward_mode, transforms_active

BACKENDS = ("eager", "native", "triton")
_NAMES = (*BACKENDS, "auto")
_AUTO = {"cpu": "native", "cuda": "triton"}  # by device type; every other device is eager

OPS: dict[str, Op] = {}
"""Every op by name; an op appears when its module is imported."""

_CONTIGUOUS = "needs it contiguous: keep it so, or pass its .contiguous()"
_log = logging.getLogger("fastdreamer")
_context: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "fastdreamer_backend", default=None
)
_ran = threading.local()


class BackendError(FastdreamerError, RuntimeError):
    """An explicitly chosen backend cannot run this op; the message says why."""


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend of every op call inside the block that names none itself.

    Args:
        name: ``"eager"``, ``"native"``, ``"triton"`` or ``"auto"``.

    Raises:
        ValueError: an unknown name; the message lists the valid ones.
    """
    token = _context.set(_valid(name, "use_backend"))
    try:
        yield
    finally:
        _context.reset(token)


def last_backend(op: str) -> str | None:
    """Return the backend that the last call of ``op`` on this thread took, None before any."""
    return getattr(_ran, op, None)


def chosen_backend(device: torch.device | str) -> str:
    """Who computes on a device where a call names no backend, for a reader: what ``auto`` takes,
    and why eager where that is eager for a reason."""
    name = _resolve(None)
    if name != "auto":
        return name
    taken = _AUTO.get(torch.device(device).type, "eager")
    if taken == "eager":
        return taken
    reasons = {op.why_not(taken, device) for op in OPS.values()} - {None}
    if taken == "native" and not reasons and (slow := why_slow()):
        reasons = {slow}
    return f"eager ({'; '.join(sorted(reasons))})" if reasons else taken


def check_backend(name: str, device: torch.device | str) -> None:
    """Raise at once what the first op call of a long job would raise later.

    Args:
        name: a backend, or ``"auto"``, which runs wherever there is such a device.
        device: where the tensors will be.

    Raises:
        ValueError: an unknown name.
        BackendError: an op imported so far has no such body, or it cannot run there.
    """
    body = "eager" if _valid(name, "backend") == "auto" else name
    for op in OPS.values():
        if reason := op.why_not(body, device):
            if name == "auto":  # it takes eager, which only the device can keep from running
                raise BackendError(f"device {str(device)!r} cannot be used: {reason}")
            raise BackendError(f"{op.name}: backend {name!r} cannot run: {reason}")


def release_memory() -> None:
    """Give back to the system what the native core keeps between calls for later ones.

    Calls work as before, the next ones allocate anew. For a pause between two kinds of work: a
    rollout's tape would lie idle while an encoder and a decoder learn.
    """
    if core := sys.modules.get("fastdreamer._native"):
        core.arena_release()


@functools.cache
def why_slow() -> str | None:
    """Return why ``auto`` passes over the native core on this CPU, None where it does not.

    The scalar kernels run on any CPU, but slower than eager, whose matrix products have vectors.
    Who asks for them by ``FASTDREAMER_ISA`` or ``backend="native"`` gets them.
    """
    if os.environ.get("FASTDREAMER_ISA"):
        return None
    try:
        from fastdreamer import _native
    except ImportError:  # then it is not the speed that keeps native from running
        return None
    if _native.isa() != "scalar":
        return None
    return (
        "this CPU has no AVX2, and the scalar core is slower than eager "
        "(FASTDREAMER_ISA=scalar takes it all the same)"
    )


def kernel_choice() -> dict[str, str] | None:
    """Which kernels of the native core compute here, None where it is not built.

    The core chooses once a process, by a measurement of milliseconds or as ``FASTDREAMER_ISA`` and
    ``FASTDREAMER_ARITHMETIC`` say.

    Returns:
        The instruction sets of ``fp32`` and ``bf16``, and the arithmetic ``for_bf16`` that calls
        under autocast to bfloat16 compute in: ``"fp32"`` where that is faster.

    Raises:
        ArgumentError: a variable names what this CPU has not.
    """
    try:
        from fastdreamer import _native
    except ImportError:
        return None
    try:
        return _native.choice()
    except ValueError as error:
        raise ArgumentError(str(error)) from error


def describe_kernels(choice: dict[str, str]) -> str:
    """A :func:`kernel_choice` for a reader."""
    as_asked = choice["for_bf16"] == "bf16"
    bf16 = f"by {choice['bf16']}" if as_asked else "in fp32 arithmetic"
    return f"fp32 by {choice['fp32']}, bf16 {bf16}"


def settle_kernels(choice: dict[str, str] | None) -> None:
    """Compute with another process's :func:`kernel_choice`: then results equal that one's.

    Raises:
        BackendError: the CPU has them not, the core has chosen others already or is not built.
    """
    if choice is None:
        return
    try:
        from fastdreamer import _native

        _native.settle(**choice)
    except ImportError as error:
        why = why_not_loaded(error)
    except ValueError as error:
        why = f"{error}; FASTDREAMER_ISA names those that both have"
    else:
        return
    raise BackendError(
        f"{platform.node()} cannot compute with the learner's kernels "
        f"({describe_kernels(choice)}): {why}"
    )


def faster_precision(backend: str = "auto") -> str:
    """Return ``"bf16"`` or ``"fp32"``: what matrix products on this CPU measure faster in.

    Args:
        backend: whose products; ``"auto"`` is resolved as by a call. bf16 has to win by a tenth.
    """
    name = _resolve(None if backend == "auto" else backend)
    if name == "eager" or (name == "auto" and why_slow()) or kernel_choice() is None:
        return _torch_faster()
    from fastdreamer import _native

    return _native.faster()


@functools.cache
def _torch_faster() -> str:
    """The same of torch's own products, by turns of a layer of preset ``report``."""
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    given = {dtype: torch.ones(400, 400, dtype=dtype) for dtype in best}
    with torch.inference_mode():
        for _ in range(8):
            for dtype, x in given.items():
                start = time.perf_counter()
                torch.nn.functional.linear(x, x)
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    return "bf16" if best[torch.float32] > 1.1 * best[torch.bfloat16] else "fp32"


class Op:
    """One op: its eager body, and loaders of the compiled bodies it has.

    Args:
        name: the op's name, that of its files.
        eager: the eager body itself.
        native, triton: functions without arguments that import and return the compiled body, or
            None where the op has none. An ImportError they raise becomes the reason why the
            backend cannot run. All bodies take the same arguments.
    """

    def __init__(
        self,
        name: str,
        *,
        eager: Callable,
        native: Callable[[], Callable] | None = None,
        triton: Callable[[], Callable] | None = None,
    ) -> None:
        self.name = name
        self.eager = eager
        self._loaders = {"native": native, "triton": triton}
        self._loaded: dict[str, Callable | str] = {}  # body, or why it could not be loaded
        self._logged: set[str] = set()
        OPS[name] = self

    def select(
        self,
        backend: str | None,
        *tensors: Tensor | None,
        constant: tuple[Tensor, ...] = (),
        depth: int = 0,
        lacking: Mapping[str, str] = {},
    ) -> Callable:
        """Return the body to call for these inputs, and note it for :func:`last_backend`.

        Args:
            backend: the caller's ``backend=`` argument; None asks the context, the environment,
                then auto.
            tensors: the tensors that the body will get; Nones are skipped.
            constant: more of them, to which only eager gives gradients.
            depth: layers of the deepest MLP, of which native has a greatest number.
            lacking: backends whose body cannot do what this call asks for, and why.

        Raises:
            ValueError: unknown backend name.
            BackendError: an explicit choice that cannot run.
        """
        name = _resolve(backend)
        given = [tensor for tensor in (*tensors, *constant) if tensor is not None]
        if name == "auto":
            name = self._auto(given, constant, depth, lacking)
        elif reason := self._refusal(name, given, constant, depth, lacking):
            raise BackendError(f"{self.name}: backend {name!r} cannot run: {reason}")
        setattr(_ran, self.name, name)
        # Traced, native would see parameters without the versions that tell the packed weights
        # from old ones, and triton tensors without addresses.
        return self.eager if name == "eager" else untraced(self._loaded[name])

    def why_not(self, backend: str, device: torch.device | str) -> str | None:
        """Return why ``backend`` cannot run this op on ``device``, or None when it can.

        Args:
            backend: ``"eager"``, ``"native"`` or ``"triton"``.
            device: where the tensors would be.

        Raises:
            ValueError: unknown backend name, ``"auto"`` included.
        """
        if backend not in BACKENDS:
            raise ValueError(f"why_not: backend must be one of {_list(BACKENDS)}, got {backend!r}")
        device = torch.device(device)
        if device.type == "cuda" and (reason := why_no_cuda()):
            return reason
        if backend == "eager":
            return None
        if self._loaders[backend] is None:
            return f"{self.name} has no {backend} kernel"
        if backend == "native" and device.type != "cpu":
            return f"tensor is on {device}, native needs the cpu"
        if backend == "triton" and device.type != "cuda" and not interpreting():
            needs = f"tensor is on {device}, triton needs a CUDA device"
            return f"{needs}; {reason}" if (reason := why_no_cuda()) else needs
        on_gpu = backend == "triton" and device.type == "cuda"
        if on_gpu and (reason := why_no_kernels(device.index)):
            return reason
        body = self._load(backend)
        return body if isinstance(body, str) else None

    def _auto(
        self,
        tensors: list[Tensor],
        constant: tuple[Tensor, ...],
        depth: int,
        lacking: Mapping[str, str],
    ) -> str:
        name = _AUTO.get(tensors[0].device.type, "eager")
        if name == "eager":
            return name
        reason = self._refusal(name, tensors, constant, depth, lacking)
        if reason is None and name == "native":
            reason = why_slow()
        if reason is None:
            return name
        # Once, however many shapes a caller lays out like this.
        kind = _CONTIGUOUS if _CONTIGUOUS in reason else reason
        if kind not in self._logged:
            self._logged.add(kind)
            # A kernel that cannot be loaded, and one that a word of the caller's would let run, are
            # worth a line on the terminal.
            loud = kind == _CONTIGUOUS or reason == self._loaded.get(name)
            level = logging.WARNING if loud else logging.INFO
            _log.log(level, "%s: auto takes eager, not %s: %s", self.name, name, reason)
        return "eager"

    def _refusal(
        self,
        backend: str,
        tensors: list[Tensor],
        constant: tuple[Tensor, ...],
        depth: int,
        lacking: Mapping[str, str],
    ) -> str | None:
        if backend == "eager":
            return None
        # first of all: a transform's tensors answer few questions
        if transforms_active(tensors):
            return f"a transform of torch.func is active, {backend} has reverse mode alone"
        if forward_mode():  # the tangent may be a parameter's
            return f"forward-mode differentiation is active, {backend} has reverse mode alone"
        device = tensors[0].device
        for tensor in tensors:
            if tensor.device != device:
                return f"tensors are on {device} and {tensor.device}"
        if reason := self.why_not(backend, device):
            return reason
        if backend == "triton" and device.type == "cpu" and (reason := _why_not_interpreted()):
            return reason
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                return f"tensor is {str(tensor.dtype)[6:]}, {backend} needs float32"
            # noise may be: the op knows what to do in no steps
            if not tensor.numel() and not any(tensor is noise for noise in constant):
                return f"tensor is empty, {list(tensor.shape)}"
            if not tensor.is_contiguous():
                return (
                    f"tensor {list(tensor.shape)} has strides {tensor.stride()}, {backend} "
                    f"{_CONTIGUOUS}"
                )
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in constant):
            return f"noise requires a gradient, {backend} gives it none"
        if backend == "native" and depth > 1 and depth > (most := _most_layers()):
            return f"an MLP has {depth} layers, native takes at most {most}"
        return lacking.get(backend)

    def _load(self, backend: str) -> Callable | str:
        body = self._loaded.get(backend)
        if body is None:
            try:
                body = self._loaders[backend]()  # type: ignore[misc]
            except ImportError as error:
                if backend == "native":
                    body = why_not_loaded(error)
                elif not isinstance(error, ModuleNotFoundError) and "'_native'" not in str(error):
                    body = f"cannot be loaded: {error}"
                else:
                    body = how_to_install(error) or f"not installed: {error}"
            self._loaded[backend] = body
        return body


_hidden: dict[Callable, Callable] = {}  # functions, from torch.compile


def untraced(function: Callable) -> Callable:
    """A function as torch.compile is to call it: it breaks the graph."""
    if "torch._dynamo" not in sys.modules:  # nobody compiles, and it takes as long as torch
        return function
    if function not in _hidden:
        _hidden[function] = torch.compiler.disable(function)
    return _hidden[function]


def why_not_loaded(error: ImportError) -> str:
    """What to say of an error in importing the core."""
    # of the package itself "cannot import name '_native'"
    if isinstance(error, ModuleNotFoundError) or "'_native'" in str(error):
        return f"extension not built: {error}{how_to_build()}"
    return f"cannot be loaded: {error}"


@functools.cache
def how_to_build() -> str:
    """What to say of a missing extension.

    Python started in a clone imports the clone, whatever is installed.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "setup.py").is_file():
        return "; installed again with a C++ compiler, without FASTDREAMER_NO_NATIVE, it has one"
    hidden = ""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        installed = importlib.metadata.distribution("fastdreamer").locate_file("fastdreamer")
        if Path(str(installed)).resolve().parent != root and Path(str(installed)).is_dir():
            hidden = f", and the source tree hides the package in {installed}"
    return f"{hidden}; `pip install -e {root}` builds it in place"


@functools.cache
def _most_layers() -> int:
    from fastdreamer import _native

    return _native.MAX_LAYERS


def _why_not_interpreted() -> str | None:
    """Why Triton's interpreter cannot compute here, None where it can."""
    if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return None
    module = sys.modules.get("triton.runtime.interpreter")
    if module is not None and module.InterpreterBuilder.create_dot.__module__ != module.__name__:
        return None  # mended, as by tests/ops/interpreter.py
    return (
        "under autocast to bfloat16 Triton's interpreter (TRITON_INTERPRET=1) multiplies bit "
        "patterns as if they were numbers: leave autocast, or unset it"
    )


def _resolve(backend: str | None) -> str:
    if backend is not None:
        return _valid(backend, "backend")
    if (name := _context.get()) is not None:
        return name
    return _valid(os.environ.get("FASTDREAMER_BACKEND") or "auto", "FASTDREAMER_BACKEND")


def _valid(name: str, source: str) -> str:
    if name not in _NAMES:
        raise ArgumentError(f"{source} must be one of {_list(_NAMES)}, got {name!r}")
    return name


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names)
