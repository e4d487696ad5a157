"""Clocks: phases of one thing, and medians of many."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import numpy as np

MIN_REPEATS = 20


class PhaseRecorder:
    """Times named ranges, each without the ranges inside it.

    ``annotate`` takes the place of ``nvtx.annotate``; it reads the clock where a range opens or
    closes and charges the time since the last reading to the innermost open range. So no time is
    counted twice, whatever is nested in what. Meant for code that runs in the calling thread and
    is done when it returns, as CPU tensors' operations are (CUDA's are not).
    """

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {}
        """Seconds by phase, one entry per repeat; ``whole`` and ``other`` (outside all ranges)."""
        self._stack: list[str] = []
        self._times: dict[str, float] = {}
        self._last = 0.0

    @contextlib.contextmanager
    def annotate(self, message: str) -> Iterator[None]:
        """A range of that name."""
        self._charge()
        self._stack.append(message)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._stack:
            phase = self._stack[-1]
            self._times[phase] = self._times.get(phase, 0.0) + now - self._last
        self._last = now

    @contextlib.contextmanager
    def repeat(self, *, containers: Sequence[str] = ()) -> Iterator[None]:
        """One repeat: everything inside is ``whole``, timed on its own from end to end.

        Args:
            containers: ranges that only hold others; their own time belongs to ``other``.
        """
        self._times = {}
        start = time.perf_counter()
        yield
        whole = time.perf_counter() - start
        phases = {k: v for k, v in self._times.items() if k not in containers}
        phases |= {"other": whole - sum(phases.values()), "whole": whole}
        for name, seconds in phases.items():
            self.samples.setdefault(name, []).append(seconds)


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, 20th and 80th percentile in milliseconds, and the number of repeats."""
    p20, median, p80 = (float(x) for x in np.percentile(np.asarray(seconds) * 1e3, (20, 50, 80)))
    return {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "repeats": len(seconds)}


def cell(times: dict[str, float] | None) -> str:
    """Return ``median (p20–p80)`` for a table, with digits that suit the size; – for None."""
    if times is None:
        return "–"
    digits = next((d for limit, d in ((100, 0), (10, 1), (1, 2)) if times["median_ms"] >= limit), 3)
    median, p20, p80 = (f"{times[k]:.{digits}f}" for k in ("median_ms", "p20_ms", "p80_ms"))
    return f"{median} ({p20}–{p80})"


def rate_cell(times: dict[str, float], amount: float) -> str:
    """Return ``median (p20–p80)`` of an amount a second; the slow times make the low rates."""
    median, low, high = (1e3 * amount / times[k] for k in ("median_ms", "p80_ms", "p20_ms"))
    digits = 0 if median >= 100 else 1
    return f"{median:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"
