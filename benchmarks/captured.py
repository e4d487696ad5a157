"""Work as one torch CUDA graph.

What is captured must not read from the device, copy from the host or draw from a generator that
the graph does not know; torch raises where it does. Tensors made outside are read and written at
the addresses that they had, so new input is copied into them before a replay.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
WARMUP = 3  # runs before the capture: kernels are loaded, algorithms chosen, Adam makes its state


class CaptureError(RuntimeError):
    """torch refused to capture; the message is its reason."""


def capture(
    work: Callable[[], T], *, generator: torch.Generator | None = None
) -> tuple[Callable[[], None], T]:
    """Run work a few times, then capture it.

    Args:
        work: returns tensors without an autograd graph.
        generator: of the GPU, if it draws from one besides torch's own.

    Returns:
        A function that replays the graph on the current stream, and what ``work`` returned: its
        tensors are filled by every replay, and hold nothing before the first.

    Raises:
        CaptureError: something in the work cannot be captured.
    """
    try:
        stream = torch.cuda.Stream()
    except (AssertionError, RuntimeError) as error:
        raise CaptureError(f"no CUDA stream: {error}") from error
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the stream is put back if it fails, too
        for _ in range(WARMUP):
            work()
        # Backward runs where a parameter's gradient was first asked for, unless that is forgotten.
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, stream=stream):
                out = work()
        except RuntimeError as error:  # raised again when the capture ends: the first has the cause
            raise CaptureError(f"cannot be captured: {error.__context__ or error}") from error
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, out
