"""Work as one torch CUDA graph.

What is captured must not read from the device, copy from the host or draw from a generator that
the graph does not know; torch raises where it does. Tensors made outside are read and written at
the addresses that they had, so new input is copied into them before a replay, and they have to stay
as long as there are replays: a graph of torch's keeps none of them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")
WARMUP = 3  # runs before the capture: kernels are loaded, algorithms chosen, Adam makes its state


class CaptureError(RuntimeError):
    """torch refused to capture; the message is its reason."""


class Replay(NamedTuple):
    """What runs a graph again, and keeps what its addresses belong to."""

    graph: torch.cuda.CUDAGraph
    work: Callable[[], object]  # with the tensors made outside that it reads and writes

    def __call__(self) -> None:
        self.graph.replay()


def capture(work: Callable[[], T], *, generator: torch.Generator | None = None) -> tuple[Replay, T]:
    """Run work a few times, then capture it.

    Args:
        work: returns tensors without an autograd graph. The tensors made outside that it uses are
            to be its own, as a closure's are: it is kept, and nothing else is.
        generator: of the GPU, if it draws from one besides torch's own.

    Returns:
        What replays the graph on the current stream, and what ``work`` returned: its tensors are
        filled by every replay, and hold nothing before the first.

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
    return Replay(graph, work), out
