"""Kernels compiled ahead of time, for the CUDA-graph loop; needs no GPU.

What is compiled is decided by the argument types of the launches alone. A pointer is said to be a
multiple of 16 bytes where it always is; integers are never specialised by value.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdreamer.ops.triton.program import ALIGNMENT, Compiled, Spec

# As the kernel takes it: what PTX says of a parameter, and what the loop is told.
_LAYOUT = {
    "i1": ("u8", "u8"),
    "i32": ("u32", "i32"),
    "i64": ("u64", "i64"),
    "fp32": ("f32", "f32"),
}
_POINTER = ("u64", "pointer")
_LONG = 2.0  # seconds of compiling that are worth a line
_MAX_HIDDEN = 2  # global and profile scratch; Triton 3.4 has the first alone


class LayoutError(RuntimeError):
    """The compiler made a kernel that takes other parameters than the loop would give it."""


@functools.lru_cache(maxsize=512)
def compile_kernel(spec: Spec, capability: int) -> Compiled:
    """Compile a kernel for a device.

    Args:
        spec: the function, its constants, options and argument types.
        capability: 90 is 9.0.

    Raises:
        LayoutError: this version of Triton passes parameters in another way than is known here,
            or the kernel wants what the loop does not give (scratch memory, clusters of blocks).
    """
    made = triton.compile(
        source(spec),
        target=GPUTarget("cuda", capability, 32),
        options=dict(spec.options),
    )
    if "ptx" not in made.asm:
        raise LayoutError(
            f"{made.metadata.name}: Triton kept no PTX to compare its parameters with, as "
            "TRITON_STORE_BINARY_ONLY has it: unset that, and where it was set before empty "
            f"{triton.knobs.cache.dir}"
        )
    return checked(spec, made.metadata, made.asm["ptx"], made.asm["cubin"])


def compile_kernels(specs: Iterable[Spec], capability: int) -> dict[Spec, Compiled]:
    """Compile several kernels side by side, as :func:`compile_kernel` does one.

    What Triton has in its cache takes milliseconds; the first wait in a process that is longer is
    logged.
    """
    specs = list(dict.fromkeys(specs))
    for spec in specs:
        _ = spec.fn.cache_key  # here, so that no two threads do it
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        made = {spec: pool.submit(compile_kernel, spec, capability) for spec in specs}
        if wait(made.values(), timeout=_LONG).not_done:
            _announce(capability)
    return {spec: future.result() for spec, future in made.items()}


@functools.cache
def _announce(capability: int) -> None:
    # a line on the terminal: else the first update looks as if it hung
    logging.getLogger("fastdreamer").warning(
        "compiling kernels for sm_%d, once: up to a minute or two at the first update; "
        "they are kept in %s",
        capability,
        triton.knobs.cache.dir,
    )


def source(spec: Spec) -> ASTSource:
    """Return what ``triton.compile`` is given."""
    constants, types = dict(spec.constants), dict(spec.types)
    names = spec.fn.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    hints = [["tt.divisibility", ALIGNMENT]]
    aligned = {(i,): hints for i, name in enumerate(names) if name in spec.aligned}
    return ASTSource(spec.fn, signature, constants, aligned)


def checked(spec: Spec, metadata: Any, ptx: str, cubin: bytes) -> Compiled:
    """Return the kernel with its parameters, derived from the types and compared with the PTX."""
    name = metadata.name
    unexpected = {
        "num_ctas": 1,
        "launch_cooperative_grid": False,
        "launch_pdl": False,
        "global_scratch_size": 0,
        "profile_scratch_size": 0,
    }
    for what, only in unexpected.items():
        if (got := getattr(metadata, what, only)) != only:
            raise LayoutError(f"{name}: {what} is {got}, the loop can run it with {only} only")
    threads = 32 * metadata.num_warps
    if (required := entry_threads(ptx, name)) != threads:
        raise LayoutError(f"{name}: the PTX wants blocks of {required} threads, not {threads}")
    layout = [_POINTER if t.startswith("*") else _LAYOUT[t] for _, t in spec.types]
    expected, found = [ptx_type for ptx_type, _ in layout], entry_types(ptx, name)
    hidden = len(found) - len(expected)
    if not 0 <= hidden <= _MAX_HIDDEN or found != expected + ["u64"] * hidden:
        raise LayoutError(
            f"{name}: the compiled kernel takes {found}, its signature says {expected} and at "
            f"most {_MAX_HIDDEN} pointers (Triton {triton.__version__})"
        )
    return Compiled(
        name=name,
        image=cubin,
        kinds=tuple(kind for _, kind in layout),
        hidden=hidden,
        threads=threads,
        shared_bytes=metadata.shared,
    )


def entry_threads(ptx: str, name: str) -> int:
    """Return how many threads a block of a kernel must have, as its PTX says (``.reqntid``)."""
    sizes = re.search(rf"\.entry\s+{re.escape(name)}\b[^{{]*?\.reqntid\s+([\d\s,]+)", ptx)
    if sizes is None:
        raise LayoutError(f"{name}: no .reqntid in the PTX")
    return math.prod(int(size) for size in sizes[1].split(","))


def entry_types(ptx: str, name: str) -> list[str]:
    """Return the type of each parameter of a kernel, as PTX writes it (``u64``, ``f32``, ...)."""
    entry = re.search(rf"\.entry\s+{re.escape(name)}\s*\(([^)]*)\)", ptx)
    if entry is None:
        raise LayoutError(f"{name}: no such .entry in the PTX")
    parameters = [line for line in entry[1].split(",") if line.strip()]
    types = [re.match(r"\s*\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\b", p) for p in parameters]
    if not all(types):
        raise LayoutError(f"{name}: the PTX's parameters cannot be read: {entry[1]}")
    return [found[1] for found in types]  # type: ignore[index]
