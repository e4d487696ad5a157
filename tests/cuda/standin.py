"""The stand-in driver, and what runs a graph's launches by Triton's interpreter.

A process that runs kernels has ``TRITON_INTERPRET=1``, in which Triton cannot compile; so another
process compiles (:class:`Compiler`). Every launch that reaches the driver is taken apart from its
raw parameters alone: addresses are looked up in an :class:`Arena`, where guard gaps of NaN lie
between the tensors, and the same Triton function is run on views of them.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fastdreamer.ops.triton import program as graph
from fastdreamer.testing import Sizes

HERE = Path(__file__).resolve().parent
KINDS = ("contexts", "modules", "streams", "graphs", "execs")
FAULTS = (
    "none", "drop node", "reverse order", "stale pointers", "wrong block", "wrong shared",
    "wrong scalar", "swap pointers", "short grid", "repeat node", "shift pointer",
    "hidden pointer",
)  # fmt: skip
OUT_OF_MEMORY, INVALID_HANDLE = 2, 400
SMALL = Sizes(A=2, D=20, S=6, E=24, hidden=24, units=24, reward_layers=1, critic_layers=1,
              actor_layers=1, activation="elu")  # fmt: skip
"""A model that the interpreter gets through in seconds, with remainders in its blocks."""

_RUN = ctypes.CFUNCTYPE(
    None, ctypes.c_uint64, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.POINTER(ctypes.c_ubyte),
    ctypes.c_size_t, ctypes.c_void_p,
)  # fmt: skip


def cuda_header() -> Path | None:
    """The folder of Triton's own cuda.h, None where there is none; does not import triton."""
    found = importlib.util.find_spec("triton")
    folder = Path(found.origin).parent / "backends/nvidia/include" if found else None
    return folder if folder and (folder / "cuda.h").exists() else None


def why_not() -> str | None:
    """Why the stand-in cannot be built here."""
    if shutil.which("cc") is None:
        return "no C compiler (cc)"
    return None if cuda_header() else "no cuda.h: the Triton wheel is not installed or has none"


def build(folder: Path, *flags: str) -> Path:
    """Compile the stand-in into a folder, under the name by which everybody asks for it."""
    library = folder / "libcuda.so.1"
    command = ["cc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += ["-fvisibility=hidden", f"-I{cuda_header()}", "-Wl,-soname,libcuda.so.1", *flags]
    subprocess.run([*command, "-o", library, HERE / "standin.c", "-lpthread"], check=True)
    return library


class Driver:
    """The stand-in as the tests see it; FASTDREAMER_LIBCUDA is to name the same file."""

    def __init__(self, library: Path) -> None:
        self._lib = ctypes.CDLL(str(library))
        self._lib.standin_identity.restype = ctypes.c_uint64
        self._lib.standin_call.restype = ctypes.c_char_p
        self._lib.standin_calls.restype = ctypes.c_long
        self._lib.standin_live.restype = ctypes.c_long
        self._callback = None

    def on_launch(self, function) -> None:
        """``function(identity, name, grid, block, shared, values)``; None for nothing."""
        if function is None:
            self._callback = None
            self._lib.standin_run(None)
            return

        def call(identity, name, grid, block, shared, values, size, _):
            data = ctypes.string_at(values, size)
            function(identity, name.decode(), tuple(grid[:3]), tuple(block[:3]), shared, data)

        self._callback = _RUN(call)
        self._lib.standin_run(self._callback)

    def identity(self, image: bytes) -> int:
        return self._lib.standin_identity(image)

    def live(self) -> dict[str, int]:
        """How many objects of each kind there are, kinds with none left out."""
        counts = {kind: self._lib.standin_live(i) for i, kind in enumerate(KINDS)}
        return {kind: count for kind, count in counts.items() if count}

    @property
    def calls(self) -> int:
        return self._lib.standin_calls()

    def names(self, since: int) -> list[str]:
        return [self._lib.standin_call(ctypes.c_long(i)).decode() for i in range(since, self.calls)]

    def fail(self, after: int, error: int = OUT_OF_MEMORY) -> None:
        """Make the call fail that comes after that many others; -1 takes it back."""
        self._lib.standin_fail(ctypes.c_long(after), error)

    def fault(self, name: str = "none", node: int = 0) -> None:
        self._lib.standin_fault(FAULTS.index(name), node)

    def device(self, version: int = 12080, count: int = 1, capability: int = 90) -> None:
        self._lib.standin_device(version, count, capability)

    def capturing(self, on: bool = True) -> None:
        """As while somebody else captures: nothing can be loaded, nothing waited for."""
        self._lib.standin_capturing(int(on))

    @property
    def context_depth(self) -> int:
        return self._lib.standin_context_depth()


class Compiler:
    """Compiles in a process of its own, which has no interpreter; use as ``compile_kernel``."""

    def __init__(self) -> None:
        clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**clean, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        self._known: dict = {}
        self._lock = threading.Lock()

    def __call__(self, spec: graph.Spec, capability: int) -> graph.Compiled:
        python = spec.fn.fn
        with self._lock:
            key = (spec, capability)
            if key not in self._known:
                asked = (python.__module__, python.__name__, spec._replace(fn=None), capability)
                pickle.dump(asked, self._process.stdin)
                self._process.stdin.flush()
                self._known[key] = pickle.load(self._process.stdout)
            if isinstance(self._known[key], Exception):
                raise self._known[key]
            return self._known[key]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)


class Assembler:
    """Kernels that take the right parameters and do nothing; use as ``compile_kernel``.

    For tests whose launches the interpreter runs: assembling takes a hundredth of the time of
    compiling. That compiled kernels take these parameters is what ``launcher.py`` shows.
    """

    HIDDEN = 2
    _TYPES = {"i1": ("u8", "u8"), "i32": ("u32", "i32"), "i64": ("u64", "i64"),
              "fp32": ("f32", "f32")}  # fmt: skip
    _NUMBER = 0x5EED1234

    def __init__(self) -> None:
        self._images: dict = {}
        self._known: dict = {}

    def __call__(self, spec: graph.Spec, capability: int) -> graph.Compiled:
        key = (spec, capability)
        if key not in self._known:
            self._known[key] = self._make(spec, capability)
        return self._known[key]

    def _make(self, spec: graph.Spec, capability: int) -> graph.Compiled:
        name = spec.fn.fn.__name__
        pairs = [self._TYPES.get(type_, ("u64", "pointer")) for _, type_ in spec.types]
        types = (*(ptx for ptx, _ in pairs), *["u64"] * self.HIDDEN)
        key = (name, types, capability)
        if key not in self._images:
            self._images[key] = self._assemble(*key)
        # no two specs have one image: the stand-in tells kernels apart by it
        number = self._NUMBER.to_bytes(4, "little")
        image = self._images[key].replace(number, len(self._known).to_bytes(4, "little"))
        threads = 32 * dict(spec.options)["num_warps"]
        kinds = tuple(kind for _, kind in pairs)
        return graph.Compiled(name, image, kinds, self.HIDDEN, threads, 16 * 1024)

    def _assemble(self, name: str, types: Sequence[str], capability: int) -> bytes:
        import triton

        entry = ", ".join(f".param .{ptx} p{i}" for i, ptx in enumerate(types))
        text = (
            f".version 8.0\n.target sm_{capability}\n.address_size 64\n"
            f".visible .global .u32 number = {self._NUMBER};\n"
            f".visible .entry {name}({entry}) {{ ret; }}\n"
        )
        with tempfile.TemporaryDirectory() as folder:
            ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
            ptx.write_text(text)
            command = [triton.knobs.nvidia.ptxas.path, f"-arch=sm_{capability}", ptx, "-o", cubin]
            subprocess.run(command, check=True)
            image = cubin.read_bytes()
        assert image.count(self._NUMBER.to_bytes(4, "little")) == 1
        return image


def serve() -> None:
    """Answer a :class:`Compiler` until it hangs up."""
    from fastdreamer.ops.triton.aot import compile_kernel

    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed is no answer
    while True:
        try:
            module, name, spec, capability = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            fn = getattr(importlib.import_module(module), name)
            answer = compile_kernel(spec._replace(fn=fn), capability)
        except Exception as error:  # the other side raises it
            answer = RuntimeError(f"{name}: {error}")
        pickle.dump(answer, out)
        out.flush()


class Arena:
    """Memory for tensors, with guards of NaN between them; in place of ``torch.empty``."""

    GUARD = 1024

    def __init__(self, size: int = 8 << 20) -> None:
        self._memory = torch.full((size // 4,), torch.nan).view(torch.uint8)
        self._base = self._memory.data_ptr()
        self._used = 0
        self.regions: list[tuple[int, int, torch.Tensor]] = []  # first byte, behind, tensor

    def empty(self, shape, dtype, *, shift: int = 0) -> torch.Tensor:
        """A tensor whose first byte is ``shift`` bytes behind a multiple of 64."""
        first = -(-(self._used + self.GUARD) // 64) * 64 + shift
        count = int(np.prod(shape, dtype=np.int64))
        behind = first + max(count, 1) * dtype.itemsize
        self._used = behind
        assert behind + self.GUARD <= self._memory.numel(), "the arena is full"
        tensor = self._memory[first : first + count * dtype.itemsize].view(dtype).view(shape)
        self.regions.append((self._base + first, self._base + behind, tensor))
        return tensor

    def copy(self, tensor: torch.Tensor, *, shift: int = 0) -> torch.Tensor:
        return self.empty(tensor.shape, tensor.dtype, shift=shift).copy_(tensor)

    def find(self, address: int, dtype: torch.dtype) -> torch.Tensor:
        """What is from an address on to the end of the tensor that it lies in."""
        for first, behind, tensor in self.regions:
            if first <= address < behind:
                assert tensor.dtype == dtype, f"a pointer to {dtype} is into {tensor.dtype}"
                offset = address - first
                assert offset % dtype.itemsize == 0, "a pointer is between two elements"
                return tensor.view(-1)[offset // dtype.itemsize :]
        raise AssertionError("a pointer is into no tensor")

    def check_guards(self) -> None:
        bits = self._memory.view(torch.int32)
        nan = torch.tensor([torch.nan]).view(torch.int32)
        touched = bits != nan
        for first, behind, _ in self.regions:
            low, high = (first - self._base) // 4, -(-(behind - self._base) // 4)
            touched[low:high] = False
        assert not touched.any(), "something was written between the tensors"


_SIZES = {"pointer": 8, "i64": 8, "i32": 4, "f32": 4, "u8": 1}
_NUMBERS = {"i64": np.int64, "i32": np.int32, "f32": np.float32, "u8": np.uint8}
_DTYPES = {name: dtype for dtype, name in graph.POINTER_TYPES.items()}


class Bench:
    """A stand-in driver, an arena, and graphs whose launches run under the interpreter."""

    def __init__(self, driver: Driver, compiler: Compiler, capacity: int = 32) -> None:
        from fastdreamer.ops.triton.cuda_graph import Graphs

        self.driver = driver
        self.arena = Arena()
        self._compiler = compiler
        self._specs: dict[int, tuple[graph.Spec, graph.Compiled]] = {}
        self._lock = threading.Lock()  # the interpreter is for one thread
        self.failure: str | None = None
        self.launched: list[tuple] = []  # name, grid and the visible parameters of each launch
        self.graphs = Graphs(capacity, compile_kernel=self._compile, on_host=True)
        driver.on_launch(self._launch)

    def inputs(self, tensors, **shifts: int) -> dict[str, torch.Tensor]:
        return {n: self.arena.copy(x, shift=shifts.get(n, 0)) for n, x in tensors.items()}

    def run(self, program: graph.Program, inputs) -> dict[str, torch.Tensor]:
        """Replay it; raises what a launch raised, and checks guards and that inputs are kept.

        What was launched is not compared with the program: see :meth:`check_launches`.
        """
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        self.failure = None
        self.launched = []
        outputs = self.graphs.run(program, inputs)
        if self.failure is not None:
            raise AssertionError(self.failure)
        self.arena.check_guards()
        for name, tensor in inputs.items():
            same = tensor.view(torch.uint8) == before[name].view(torch.uint8)
            assert same.all(), f"the input {name} was written"
        return outputs

    def check_launches(self, program: graph.Program, tensors) -> None:
        """Compare what ran last with the program unrolled in Python, parameter by parameter."""
        (entry,) = [g for (p, *_), g in self.graphs._graphs.items() if p is program]
        addresses = {n: x.data_ptr() for n, x in {**tensors, **entry._scratch}.items()}

        def value(v, indices):
            if isinstance(v, graph.Arg):
                size = v.slot.dtype.itemsize
                return addresses[v.slot.name] + v.offset.value(indices) * size
            if isinstance(v, float):
                return float(np.float32(v))
            return graph.affine(v).value(indices)

        expected = [
            (x.kernel.name, x.grid, tuple(value(v, indices) for v in x.args.values()))
            for x, indices in program.launches()
        ]
        assert self.launched == expected

    def _compile(self, spec: graph.Spec, capability: int) -> graph.Compiled:
        made = self._compiler(spec, capability)
        self._specs[self.driver.identity(made.image)] = spec, made
        return made

    def _launch(self, identity, name, grid, block, shared, values) -> None:
        if self.failure is not None:
            return
        try:
            with self._lock:
                self._interpret(identity, name, grid, block, shared, values)
        except BaseException:  # ctypes would swallow it; kept, it would keep the graph
            self.failure = traceback.format_exc()

    def _interpret(self, identity, name, grid, block, shared, values) -> None:
        spec, made = self._specs[identity]
        assert name == made.name
        assert block == (made.threads, 1, 1), f"{name}: block is {block}"
        assert shared == made.shared_bytes, f"{name}: shared memory is {shared} bytes"
        at, args, raw_args = 0, {}, []
        for (argument, type_), kind in zip(spec.types, made.kinds, strict=True):
            size = _SIZES[kind]
            at = -(-at // size) * size
            raw, at = values[at : at + size], at + size
            if kind == "pointer":
                address = int.from_bytes(raw, "little")
                raw_args.append(address)
                if argument in spec.aligned:
                    assert address % 16 == 0, f"{name}: {argument} is not aligned as promised"
                args[argument] = self.arena.find(address, _DTYPES[type_])
            else:
                value = np.frombuffer(raw, _NUMBERS[kind])[0].item()
                raw_args.append(value)
                args[argument] = value
        at = -(-at // 8) * 8 if made.hidden else at
        hidden = values[at:]
        assert len(hidden) == 8 * made.hidden and not any(hidden), f"{name}: a hidden pointer"
        self.launched.append((name, grid, tuple(raw_args)))
        spec.fn[grid](**args, **dict(spec.constants), **dict(spec.options))


if __name__ == "__main__":
    serve()
