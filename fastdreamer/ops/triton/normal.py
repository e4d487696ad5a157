"""Samples of Normals and their gradients, where a kernel of its own draws them."""

import triton
import triton.language as tl

BLOCK = 1024


@triton.jit(do_not_specialize=["size"])
def sample_kernel(
    mean,  # [size] float32, as all the others
    std,
    noise,
    sample,  # written
    size,
    BLOCK: tl.constexpr,
):
    """mean + std · noise."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    m = tl.load(mean + at, mask=inside, other=0.0)
    s = tl.load(std + at, mask=inside, other=0.0)
    tl.store(sample + at, m + s * tl.load(noise + at, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["size"])
def backward_kernel(
    noise,
    d_sample,
    d_mean,  # what reaches mean and std beside the sample; or None
    d_std,
    all_mean,  # all that does, written
    all_std,
    size,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    d_m = tl.load(d_sample + at, mask=inside, other=0.0)
    d_s = d_m * tl.load(noise + at, mask=inside, other=0.0)
    if d_mean is not None:
        d_m += tl.load(d_mean + at, mask=inside, other=0.0)
        d_s += tl.load(d_std + at, mask=inside, other=0.0)
    tl.store(all_mean + at, d_m, mask=inside)
    tl.store(all_std + at, d_s, mask=inside)
