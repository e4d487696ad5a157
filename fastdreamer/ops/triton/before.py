"""What becomes of states and actions before a step takes them: learned starts, bounds."""

import triton
import triton.language as tl

from fastdreamer.ops.triton.device import at_least_1

BLOCK = 1024
ROWS, COLUMNS = 16, 64  # of a block of begin_gradient_kernel


@triton.jit(do_not_specialize=["size"])
def bound_kernel(
    action,  # [size] float32, as all the others
    grad,  # by what became of it, or None
    out,  # written; the gradient by a is added to it
    size,
    BLOCK: tl.constexpr,
):
    """a / max(1, |a|), or the gradient by a, which takes the divisor for a constant."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    a = tl.load(action + at, mask=inside, other=0.0)
    x = a
    if grad is not None:
        x = tl.load(grad + at, mask=inside, other=0.0)
    x /= at_least_1(a)
    if grad is not None:
        x += tl.load(out + at, mask=inside, other=0.0)
    tl.store(out + at, x, mask=inside)


@triton.jit(do_not_specialize=["size"])
def begin_kernel(
    first,  # [rows] bool: where an episode begins
    state,  # [rows, WIDTH] float32
    begin,  # [WIDTH], or None: zeros
    out,  # [rows, WIDTH]
    size,  # elements of it
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What an episode begins with, or the state."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    begins = tl.load(first + at // WIDTH, mask=inside, other=0) != 0
    new = 0.0
    if begin is not None:
        new = tl.load(begin + at % WIDTH, mask=inside, other=0.0)
    old = tl.load(state + at, mask=inside, other=0.0)
    tl.store(out + at, tl.where(begins, new, old), mask=inside)


@triton.jit(do_not_specialize=["size"])
def begin_backward_kernel(
    first,
    d_out,
    d_state,  # [rows, WIDTH]: added to where no episode begins
    size,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    goes_on = inside & (tl.load(first + at // WIDTH, mask=inside, other=0) == 0)
    total = tl.load(d_state + at, mask=goes_on, other=0.0)
    total += tl.load(d_out + at, mask=goes_on, other=0.0)
    tl.store(d_state + at, total, mask=goes_on)


@triton.jit(do_not_specialize=["rows", "share"])
def begin_gradient_kernel(
    first,
    d_out,
    d_begin,  # [splits, WIDTH], written
    rows,
    share,  # rows of a split, a multiple of ROWS
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Σ over the rows where an episode begins, in order; each split sums its share."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1).to(tl.int64)
    begin = split * share
    left = (tl.minimum(begin + share, rows) - begin).to(tl.int32)
    first += begin
    d_out += begin * WIDTH
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, left, ROWS):
        at = (start + row).to(tl.int64)
        begins = (at < left) & (tl.load(first + at, mask=at < left, other=0) != 0)
        mask = begins[:, None] & (column < WIDTH)[None, :]
        total += tl.load(d_out + at[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
    tl.store(d_begin + split * WIDTH + column, tl.sum(total, 0), mask=column < WIDTH)
