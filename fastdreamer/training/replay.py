"""Replay: the newest episodes on disk, and sequences sampled from them.

The files are described in :mod:`fastdreamer.training.episodes`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fastdreamer.errors import ArgumentError
from fastdreamer.files import remove_stale
from fastdreamer.training.episodes import (
    EPISODE_GLOB,
    Arrays,
    EpisodeError,
    EpisodeInfo,
    Fields,
    check_episode,
    check_fields,
    describe,
    episode_index,
    episode_path,
    read_rows,
)

_log = logging.getLogger("fastdreamer")


class Replay:
    """The newest episodes within a capacity, and sequences drawn from them.

    Frames stay on disk; memory holds what it takes to find them. Oldest means lowest number,
    whatever the order of entry. Not thread-safe.

    directory: of the episode files. Temporary files that a killed writer left there are removed.
    capacity: env frames; the oldest episodes beyond it leave, at least one stays.
    fields: name -> (dtype, shape without T) of every array that an episode must have; None: those
        of the first that enters.
    task: if given, meta["task"] must equal it.
    drawn: if given, (render, render_quality) of the pixels; an episode whose meta says another is
        foreign. One from before there was `render` was drawn by OpenGL.

    Raises ArgumentError where there is no such directory.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        capacity: int = 1_000_000,
        fields: Fields | None = None,
        task: str | None = None,
        drawn: tuple[str, str] | None = None,
    ):
        if capacity < 1:
            raise ValueError(f"replay: capacity must be at least 1 env frame, got {capacity}")
        self.directory = Path(directory)
        self.capacity = capacity
        self.fields: Fields | None = None
        if fields is not None:
            self.fields = {n: (np.dtype(d), tuple(shape)) for n, (d, shape) in fields.items()}
            check_fields("replay fields", {n: (d, (2, *s)) for n, (d, s) in self.fields.items()})
        self.task = task
        self.drawn = drawn
        self._episodes: dict[int, EpisodeInfo] = {}  # sorted by index
        if not self.directory.is_dir():
            raise ArgumentError(f"replay: {self.directory} is no directory of episodes")
        remove_stale(self.directory)

    def __len__(self) -> int:
        return len(self._episodes)

    @property
    def num_episodes(self) -> int:
        return len(self._episodes)

    @property
    def num_steps(self) -> int:
        """Steps held: the sum of T = decisions + 1 over the episodes."""
        return sum(e.length for e in self._episodes.values())

    @property
    def env_frames(self) -> int:
        """Env frames held, counted as the episodes' metadata counts them."""
        return sum(e.env_frames for e in self._episodes.values())

    @property
    def indices(self) -> list[int]:
        """Numbers of the episodes held, ascending: what `load` takes to restore this replay."""
        return list(self._episodes)

    def add(self, index: int) -> EpisodeInfo:
        """Check the file of this number and enter it; evict the oldest episodes beyond capacity.

        Evicted files stay on disk until `delete_before`. Raises EpisodeError for a missing,
        damaged or foreign file (nothing changes), ValueError if the number is already held.
        """
        if index in self._episodes:
            raise ValueError(f"replay: episode {index} is already held")
        info = self._check(index)
        last = next(reversed(self._episodes), -1)
        self.fields = _fields_of(info)
        self._episodes[index] = info
        if index < last:
            self._episodes = dict(sorted(self._episodes.items()))
        frames = self.env_frames
        while frames > self.capacity and len(self._episodes) > 1:
            oldest = self._episodes.pop(next(iter(self._episodes)))
            frames -= oldest.env_frames
        return info

    def _check(self, index: int) -> EpisodeInfo:
        """Check the file of this number; EpisodeError where it is missing, damaged or foreign."""
        path = episode_path(self.directory, index)
        info = check_episode(path, index)
        found = _fields_of(info)
        if self.fields not in (None, found):
            found, expected = describe(found), describe(self.fields)
            raise EpisodeError(f"{path}: is of another environment: {found}; expected {expected}")
        if self.task is not None and info.meta.get("task") != self.task:
            task = info.meta.get("task")
            raise EpisodeError(f"{path}: is of task {task!r}, expected {self.task!r}")
        if self.drawn is not None:
            render, quality = self.drawn
            drawn = info.meta.get("render", "opengl"), info.meta.get("render_quality", quality)
            if drawn != self.drawn:
                raise EpisodeError(
                    f"{path}: was drawn by {drawn[0]} in quality {drawn[1]}, expected {render} in "
                    f"{quality}"
                )
        return info

    def load(self, indices: Iterable[int] | None = None) -> list[str]:
        """Enter the episodes of these numbers in order; None means every file in the directory.

        A missing, damaged or foreign file is skipped. Returns one message for each, also logged.
        """
        warnings = []
        if indices is None:
            indices = []
            for path in sorted(self.directory.glob(EPISODE_GLOB)):
                if (index := episode_index(path)) is not None:
                    indices.append(index)
                else:
                    warnings.append(f"{path}: is not named episode-NNNNNN.safetensors")
            indices.sort()
        for index in indices:
            try:
                self.add(index)
            except EpisodeError as error:
                warnings.append(str(error))
        for message in warnings:
            _log.warning("skipped episode: %s", message)
        return warnings

    def delete_before(self, index: int) -> None:
        """Unlink the files of all episodes of lower numbers, but for those held, and damaged or
        foreign ones, which are left to be looked at.

        To be called with the oldest episode that any checkpoint refers to. It looks at the
        directory, not at what this process saw leave: a kill may have come between. Temporary
        files of writers that have died since are removed too.
        """
        remove_stale(self.directory)
        for path in sorted(self.directory.glob(EPISODE_GLOB)):
            found = episode_index(path)
            if found is None or found >= index or found in self._episodes:
                continue
            with contextlib.suppress(EpisodeError):
                self._check(found)
                path.unlink(missing_ok=True)

    def sample(
        self, batch: int, length: int, rng: np.random.Generator, out: Arrays | None = None
    ) -> dict[str, np.ndarray]:
        """Draw `batch` sequences of `length` steps, uniformly among all places one can start.

        An episode of T >= length steps has T - length + 1 starts. A shorter one has one, and its
        sequence goes on at step 0 of further episodes, drawn likewise, until it is full.

        Returns every field as [length, batch, ...] and "is_first" bool [length, batch]: True at
        t = 0 and wherever another episode begins. The filter starts from the zero state there and
        ignores the action, which is as recorded and came from outside the sequence. `out`, if
        given, is a dict of arrays of these names, shapes and dtypes that are filled and returned.

        The result depends on the generator and on the episodes held, on nothing else. An episode
        whose file was cut, changed or removed since it entered is logged, dropped and replaced by
        a new draw; what is left of the file stays. Raises ValueError for a batch or length below 1
        or an `out` that does not fit, EpisodeError where no episode is left.
        """
        if batch < 1 or length < 1:
            raise ValueError(f"replay: batch and length must be positive, got {batch}, {length}")
        indices, bounds = self._starts(length)
        want = {n: (d, (length, batch, *s)) for n, (d, s) in self.fields.items()}
        want["is_first"] = (np.dtype(np.bool_), (length, batch))
        if out is None:
            out = {name: np.empty(shape, dtype) for name, (dtype, shape) in want.items()}
        elif {n: (a.dtype, a.shape) for n, a in out.items()} != want:
            raise ValueError(f"replay: out must be {describe(want)}")
        out = dict(out)
        out["is_first"][...] = False
        rows = {n: np.empty((length, *s), d) for n, (d, s) in self.fields.items()}
        for b in range(batch):
            done = 0
            while done < length:
                pick = int(rng.integers(bounds[-1]))
                place = int(np.searchsorted(bounds, pick, side="right")) - 1
                info = self._episodes[indices[place]]
                start = pick - int(bounds[place]) if done == 0 else 0
                count = min(length - done, info.length - start)
                try:
                    self._episodes[info.index] = read_rows(info, start, count, rows)
                except EpisodeError as error:
                    del self._episodes[info.index]
                    _log.warning("dropped episode: %s (%d left)", error, len(self))
                    indices, bounds = self._starts(length)
                    continue
                for name, row in rows.items():
                    out[name][done : done + count, b] = row[:count]
                out["is_first"][done, b] = True
                done += count
        return out

    def _starts(self, length: int) -> tuple[list[int], np.ndarray]:
        """Return the episodes' numbers and [0, starts in the first, in the first two, ...]."""
        if not self._episodes:
            raise EpisodeError(
                f"{self.directory}: replay holds no episode to sample from; load() enters those of "
                "its directory, RUN/episodes"
            )
        counts = [max(1, e.length - length + 1) for e in self._episodes.values()]
        return self.indices, np.cumsum([0, *counts])


def _fields_of(info: EpisodeInfo) -> Fields:
    return {name: (field.dtype, field.shape[1:]) for name, field in info.layout.items()}
