"""Block sizes of the kernels, by what they run on and for how many rows."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch


class Tile(NamedTuple):
    """Of a kernel over rows; of the weights' gradients ``rows`` is the depth of the sum."""

    rows: int
    columns: int
    depth: int  # of the products
    gates: int  # columns of a block of the GRU's gates, which has four accumulators
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most; None: as the assembler likes

    def out(self, padded: int) -> int:
        """Columns of a block of outputs: the power of two that holds them, at most ``columns``."""
        size = 16
        while size < min(padded, self.columns):
            size *= 2
        return size


Kind = Literal[
    "step", "step_backward", "mlp", "mlp_backward", "layer", "layer_backward", "gradient"
]


def capability(device: torch.device) -> int:
    """Compute capability without the dot; that of an A100 where the interpreter runs on a CPU."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class Entry(NamedTuple):
    """From which compute capability and number of rows on a tile is taken."""

    kinds: tuple[str, ...]  # " normed" behind one: of layers with norms alone
    bf16: bool
    arch: int
    rows: int
    tile: Tile
    reason: str
    since: tuple[int, int] = (0, 0)  # of Triton


_STEPS, _MLPS, _GRADIENT = ("step", "step_backward"), ("mlp", "mlp_backward"), ("gradient",)
_LAYERS = "layer", "layer_backward"
_ALL = 255
"""Registers that a thread can have. Without a bound the assembler (ptxas) takes few, so that more
programs fit a multiprocessor, and may spill a word to save some; with one it fills what it is
given. Which of both spills, compiling shows, with each version of Triton anew."""

TABLE = (
    Entry(
        _STEPS, True, 80, 1, Tile(16, 64, 64, 64, 8, 3),
        "one step waits for the other, and a program streams all weights from the L2 cache in the "
        "same time whatever rows it has: the fewest that a matrix instruction takes",
    ),
    Entry(
        ("step_backward",), True, 90, 1, Tile(16, 64, 64, 64, 8, 3, _ALL),
        "a program has a multiprocessor to itself, so registers can be had where the assembler "
        "would spill: with layers of 1024",
    ),
    Entry(
        ("step",), True, 90, 1, Tile(16, 64, 64, 64, 8, 3, _ALL),
        "left to itself, the assembler stops at 128 registers and spills where rows are reset",
        since=(3, 9),
    ),
    Entry(
        ("step_backward",), True, 90, 1, Tile(16, 32, 64, 32, 8, 3, _ALL),
        "blocks of 64 columns spill there, with the bound, too", since=(3, 9),
    ),
    Entry(
        ("step",), True, 100, 1, Tile(16, 64, 64, 64, 8, 3), "as on sm_80",
    ),
    Entry(
        ("step_backward",), True, 100, 1, Tile(16, 64, 64, 64, 8, 3),
        "there it spills with the bound, and not without",
    ),
    Entry(
        ("step normed",), True, 120, 1, Tile(16, 64, 64, 32, 8, 3),
        "with norms, where rows are reset, blocks of 64 gates spill there, bounded or not",
    ),
    Entry(
        _STEPS, True, 80, 2049, Tile(32, 64, 64, 64, 8, 3, _ALL),
        "16 rows would be more programs than multiprocessors (about 130), each of which reads all "
        "weights again",
    ),
    Entry(
        ("step_backward",), True, 90, 2049, Tile(32, 32, 64, 32, 8, 3, _ALL),
        "blocks of 64 columns spill there", since=(3, 9),
    ),
    Entry(
        ("step",), True, 90, 2049, Tile(32, 32, 64, 32, 8, 3),
        "blocks of 64 columns spill there and on sm_100, one or other model's, with a bound on "
        "registers or without",
    ),
    Entry(
        ("step",), True, 120, 2049, Tile(32, 64, 64, 64, 8, 3, _ALL),
        "there they do not",
    ),
    Entry(
        ("step_backward",), True, 100, 2049, Tile(32, 32, 64, 32, 8, 3, _ALL),
        "blocks of 64 columns spill there and on sm_120, with a bound on registers or without",
    ),
    Entry(
        _MLPS, True, 80, 1, Tile(16, 64, 64, 64, 8, 3, _ALL),
        "the actor inside a rollout, as the step; else few rows in all",
    ),
    Entry(
        _MLPS, True, 80, 2049, Tile(32, 64, 64, 64, 8, 3),
        "all steps at once, nothing waits: weights are read half as often as with 16 rows",
    ),
    Entry(
        ("mlp normed",), True, 80, 2049, Tile(32, 64, 64, 64, 8, 3, _ALL),
        "with norms a policy's kernel spills likewise",
    ),
    Entry(
        ("mlp_backward",), True, 80, 2049, Tile(32, 64, 64, 64, 8, 3, _ALL),
        "left to itself, the assembler spills there with layers of 1024",
    ),
    Entry(
        _MLPS, True, 90, 2049, Tile(64, 64, 64, 64, 8, 3),
        "as many rows as the wide matrix instructions take",
    ),
    Entry(
        _MLPS, True, 100, 2049, Tile(32, 64, 64, 64, 8, 3),
        "sm_100 has wide ones too, but there and on sm_120 64 rows spill",
    ),
    Entry(
        _MLPS, True, 120, 2049, Tile(32, 32, 64, 32, 8, 3),
        "blocks of 64 columns spill, with a bound on registers or without",
    ),
    Entry(
        ("layer",), True, 80, 1, Tile(16, 64, 64, 64, 8, 3),
        "one layer, its columns shared out to programs as well; with a bound on registers the "
        "assembler unrolls until it spills, without it takes about 60",
    ),
    Entry(
        ("layer_backward",), True, 80, 1, Tile(16, 64, 64, 64, 8, 3, _ALL),
        "left to itself, the assembler stops at 48 registers and spills on sm_120",
    ),
    Entry(
        _LAYERS, True, 80, 257, Tile(64, 64, 64, 64, 4, 3),
        "with that many rows there are programs enough: as many as the wide matrix instructions "
        "take; with 8 warps it spills on sm_80",
    ),
    Entry(
        _GRADIENT, True, 80, 1, Tile(64, 64, 64, 64, 4, 3, 200),
        "square blocks of the weight, 64 rows at a time; left to itself, the assembler takes fewer "
        "registers and spills on sm_120, and with 168 where rows were reset",
    ),
    Entry(
        ("step",), False, 80, 1, Tile(16, 32, 16, 32, 4, 2, _ALL),
        "ieee products use no matrix instruction: larger blocks of operands spill; with three "
        "gates those 32 deep do on sm_90 and sm_100, with a bound on registers or without. On "
        "sm_80 even these spill without it, with an input layer of 200",
    ),
    Entry(
        ("step",), False, 90, 1, Tile(16, 32, 16, 32, 4, 2),
        "there they do not",
    ),
    Entry(
        ("step_backward",), False, 80, 1, Tile(16, 32, 32, 32, 4, 2, _ALL),
        "one accumulator: operands may be 32 deep; without the bound they spill on sm_90",
    ),
    Entry(
        _MLPS, False, 80, 1, Tile(16, 32, 32, 32, 4, 2, _ALL),
        "the same; these spill where the assembler saves registers or may take no more than 128",
    ),
    Entry(_LAYERS, False, 80, 1, Tile(16, 32, 32, 32, 4, 2, _ALL), "as an MLP"),
    Entry(_GRADIENT, False, 80, 1, Tile(32, 64, 64, 64, 4, 2, _ALL), "the same"),
)  # fmt: skip
"""Proved for Triton 3.7.1, which torch 2.13 brings with CUDA: compiled for sm_80, 90, 100 and 120,
no kernel spills or takes more than 99 KB of shared memory, what the least of them has. That holds
for all kernels at the sizes of preset ``report`` with ELU, its input layer of 200 units or of 400,
and in bfloat16 for the step's and the actor's with SiLU, at those sizes and with widths of 1024;
for a model made of DreamerV3's parts, of 512 units and 32 x 32 stochastic numbers; and for three
whose steps are taken in stages, of 512 and 2048 units. Other models may spill, which costs time
alone. ``python -m tests.triton_resources`` shows it. What was tried of other versions of Triton is
in docs/gpu.md; ``since`` is of an entry of newer ones. No time was measured."""


@functools.cache
def triton_version() -> tuple[int, int]:
    """Of the Triton that compiles."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def choose(kind: Kind, rows: int, *, bf16: bool, arch: int, normed: bool = False) -> Tile:
    """Return the tile of a kernel: the last entry that fits."""
    kinds = (kind, f"{kind} normed") if normed else (kind,)
    fitting = [
        entry.tile
        for entry in TABLE
        if any(name in entry.kinds for name in kinds)
        and entry.bf16 == bf16
        and arch >= entry.arch
        and rows >= entry.rows
        if triton_version() >= entry.since
    ]
    if not fitting:
        raise ValueError(f"triton kernels need a GPU of compute capability 8.0 or more, got {arch}")
    return fitting[-1]
