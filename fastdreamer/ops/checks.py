"""The one check that every public op makes of its tensors, with one form of message."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdreamer.ops.params import ReturnParams


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    shape: tuple[str | int, ...],
    dims: dict[str, int],
    *,
    dtype: torch.dtype | None = None,
    like: Tensor | None = None,
    contiguous: bool = False,
) -> None:
    """Check one argument of an op.

    Args:
        op, name: who asks, and the argument's name, for the message.
        tensor: the argument.
        shape: one letter (see :mod:`fastdreamer.ops`) or number per dimension, e.g.
            ``("H", "B", 1)``.
        dims: sizes of the letters met so far; a new letter is entered, a known one must agree.
            Pass one dict through all the checks of a call.
        dtype: the dtype it must have; None takes that of ``like``, or any floating dtype.
        like: a tensor whose device (and dtype, unless ``dtype`` is given) it must share.
        contiguous: whether it must be contiguous.

    Raises:
        TypeError: not a tensor.
        ValueError: anything else, e.g. ``imagine: action must be [H=15, B=400, A] float32
        contiguous, got [15, 399, 6] float32``.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if dtype is None and like is not None:
        dtype = like.dtype
    sizes = tensor.shape
    if (
        len(sizes) == len(shape)
        and (tensor.is_floating_point() if dtype is None else tensor.dtype == dtype)
        and (like is None or tensor.device == like.device)
        and (not contiguous or tensor.is_contiguous())
    ):
        new: dict[str, int] = {}  # entered only if all agree: the message names what was known
        for letter, size in zip(shape, sizes, strict=True):
            known = letter if isinstance(letter, int) else dims.get(letter)
            if known is None:  # a letter that stands twice must agree with itself as well
                known = new.setdefault(letter, size)
            if known != size:
                break
        else:
            dims.update(new)
            return
    want = ", ".join(f"{k}={dims[k]}" if k in dims else str(k) for k in shape)
    kind = "floating" if dtype is None else str(dtype)[6:]
    place = "" if like is None or tensor.device == like.device else f" on {like.device}"
    layout = " contiguous" if contiguous else ""
    got = f"{list(sizes)} {str(tensor.dtype)[6:]}"
    if place:
        got += f" on {tensor.device}"
    if contiguous and not tensor.is_contiguous():
        got += f" with strides {list(tensor.stride())}"
    raise ValueError(f"{op}: {name} must be [{want}] {kind}{layout}{place}, got {got}")


def check_bins(op: str, returns: ReturnParams) -> None:
    """Check that bins are where their heads are, one an output; in any floating dtype.

    From elsewhere they would be copied in every call, for which a GPU is waited for.
    """
    critic = returns.critic if returns.critic is not None else returns.target
    for name, head in (("reward_as", returns.reward), ("value_as", critic)):
        bins = getattr(returns, name).bins
        if bins is not None and head is not None:
            shape, like = (head.outputs,), head.weights[-1]
            name = f"returns.{name}.bins"
            check_tensor(op, name, bins, shape, {}, dtype=bins.dtype, like=like)
