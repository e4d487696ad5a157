"""Block sizes of the kernels, by what they run on and for how many rows."""

from __future__ import annotations

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

    def out(self, padded: int) -> int:
        """Columns of a block of outputs: the power of two that holds them, at most ``columns``."""
        size = 16
        while size < min(padded, self.columns):
            size *= 2
        return size


Kind = Literal["step", "step_backward", "mlp", "mlp_backward", "gradient"]


def capability(device: torch.device) -> int:
    """Compute capability without the dot; that of an A100 where the interpreter runs on a CPU."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def choose(kind: Kind, rows: int, *, bf16: bool, arch: int) -> Tile:
    """Return the tile of a kernel.

    What decides, from compiling each for sm_80, 90, 100 and 120 (``tests/triton_resources.py``
    asserts it): no spills, at most 99 KB of shared memory, which all of them have.
    """
    del arch  # one table serves all four so far
    if not bf16:
        # ieee products use no tensor core: small tiles, or the operands spill
        if kind == "gradient":
            return Tile(32, 64, 64, 64, 4, 2)
        return Tile(16, 32, 32, 32, 4, 2)
    if kind == "gradient":
        return Tile(64, 64, 64, 64, 4, 3)
    if kind in ("step", "step_backward"):
        # One step waits for the other, so few rows a program: each streams all weights from the
        # L2 cache in the same time, whatever rows it has. 32 rows from where 16 would be more
        # programs than multiprocessors (about 130).
        return Tile(16 if rows <= 2048 else 32, 64, 64, 64, 8, 3)
    # Many rows at once, nothing waits: 64 rows, from which on sm_90 and sm_100 have the wide
    # matrix instructions; the actor, within a step, as the step.
    return Tile(16 if rows <= 2048 else 64, 64, 64, 64, 8, 3)
