"""Episodes: one file each, written whole, and checked from its first byte to its last when read.

An episode of D decisions has T = D + 1 steps, time first in every array:

    action      float32 [T, A]        action[t] led to the observation of step t; action[0] = 0
    reward      float32 [T]           received with the observation of step t; reward[0] = 0
    terminated  bool    [T]           the environment ended there; only the last may be True
    pixels      uint8   [T, h, w, 3]  and/or
    state       float32 [T, n]

docs/replay.md describes the file.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors.numpy import save

from fastdreamer.errors import FastdreamerError
from fastdreamer.files import replacing

EPISODE_GLOB = "episode-*.safetensors"
VERSION = 1

_Path = str | os.PathLike
Arrays = Mapping[str, np.ndarray]
Fields = Mapping[str, tuple[Any, tuple[int, ...]]]  # name -> (dtype, shape)
_NAME = re.compile(r"episode-([0-9]{6}|[1-9][0-9]{6,11})\.safetensors")
_HEADER_LIMIT = 1 << 20  # bytes; a real header has about 1 kB
_CHUNK = 1 << 20  # bytes read at a time for the checksum
# The one metadata entry: JSON in a JSON string. One, because the library writes several in random
# order, and the same episode should be the same bytes. Its first quote is not escaped, so nothing
# inside a string matches this.
_RECORD = "fastdreamer_episode"
_CRC = re.compile(rb'("fastdreamer_episode":"\{\\"version\\":1,\\"crc32\\":\\")([0-9a-f]{8})\\",')
_DTYPES = {"F32": np.dtype(np.float32), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_)}
_FIELDS = {  # name: dtype, number of dimensions
    "action": (np.dtype(np.float32), 2),
    "reward": (np.dtype(np.float32), 1),
    "terminated": (np.dtype(np.bool_), 1),
    "pixels": (np.dtype(np.uint8), 4),
    "state": (np.dtype(np.float32), 2),
}
_REQUIRED, _OBSERVED = ("action", "reward", "terminated"), ("pixels", "state")


class EpisodeError(FastdreamerError, ValueError):
    """An episode file, or what should become one, is damaged or foreign; names the file and why."""


class _Field(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]  # [T, ...]
    offset: int  # bytes from the start of the file

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class EpisodeInfo(NamedTuple):
    """One checked episode: where it lies, its length T in steps, its env frames and metadata."""

    path: Path
    index: int
    length: int
    env_frames: int
    meta: dict[str, Any]
    layout: dict[str, _Field]
    crc: int
    stamp: tuple[int, int, int]  # inode, size, mtime in ns, as of the last check


def episode_path(directory: _Path, index: int) -> Path:
    """Return the path of the episode file with this number; ValueError for a negative one."""
    if index < 0:
        raise ValueError(f"replay: an episode number is at least 0, got {index}")
    return Path(directory) / f"episode-{index:06d}.safetensors"


def episode_index(path: Path) -> int | None:
    """The number in the name of an episode file; None where it is named otherwise."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def episode_fields(obs_shapes: dict[str, tuple[int, ...]], action_dim: int) -> Fields:
    """The arrays of an episode of an environment: name -> (dtype, shape without T)."""
    dtypes = {"pixels": "uint8", "state": "float32"}
    return {
        **{kind: (dtypes[kind], shape) for kind, shape in obs_shapes.items()},
        "action": ("float32", (action_dim,)),
        "reward": ("float32", ()),
        "terminated": ("bool", ()),
    }


def write_episode(
    directory: _Path, index: int, arrays: Mapping[str, Any], meta: Mapping[str, Any]
) -> Path:
    """Write one episode so that at any moment the file is absent, the old one, or complete.

    `arrays` as in the module docstring; `meta` is a JSON object with the int "env_frames" (> 0).
    Returns the file's path, with data, name and directory entry on disk. Raises EpisodeError for
    arrays or metadata outside the format and OSError where the disk refuses; neither leaves a file.
    """
    path = episode_path(directory, index)
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    check_fields(path, {name: (a.dtype, a.shape) for name, a in arrays.items()})
    _check_values(path, arrays)
    _check_meta(path, meta)
    record = {"version": VERSION, "crc32": "0" * 8, "meta": meta}
    try:
        record = json.dumps(record, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise EpisodeError(f"{path}: meta is not plain JSON: {error}") from error
    contiguous = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    blob = save(contiguous, metadata={_RECORD: record})
    start = 8 + int.from_bytes(blob[:8], "little")
    if start - 8 > _HEADER_LIMIT:
        raise EpisodeError(f"{path}: meta is too long (JSON of {len(record)} characters)")
    digits = _CRC.search(blob, 0, start).span(2)
    head = blob[: digits[0]] + b"%08x" % zlib.crc32(blob) + blob[digits[1] : start]

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(head)
        file.write(memoryview(blob)[start:])
    return path


def read_episode(path: _Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays and the metadata of an episode file, its checksum verified.

    Raises EpisodeError that names the file and what is wrong with it; no other exception.
    """
    with _opened(Path(path)) as file:
        info = _inspect(file, Path(path), -1)
        return {name: _read(file, info, name) for name in info.layout}, info.meta


def check_episode(path: Path, index: int) -> EpisodeInfo:
    """Check an episode's whole file; EpisodeError names the file and what is wrong with it."""
    with _opened(path) as file:
        return _inspect(file, path, index)


def read_rows(info: EpisodeInfo, start: int, count: int, rows: Arrays) -> EpisodeInfo:
    """Read steps start .. start + count - 1 of every field into the first `count` of `rows`.

    Returns what is now known of the file, which is checked anew where it was touched. Raises
    EpisodeError where it was cut, removed or replaced by other data.
    """
    # Plain reads, not a map. Both copy from the page cache, as fast, and leave nothing resident
    # afterwards. But under a map a disk error, or a file cut between any check and the copy, is
    # a SIGBUS that ends the process; under a read it is an exception that names the file.
    with _opened(info.path) as file:
        if _stamp(file) != info.stamp:
            now = _inspect(file, info.path, info.index)
            if now.crc != info.crc:
                raise EpisodeError(f"{info.path}: was replaced by other data since it entered")
            info = now
        for name, field in info.layout.items():
            row = field.nbytes // info.length
            _read_into(file, info.path, field.offset + start * row, rows[name][:count])
    return info


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open for unbuffered reading; every OSError, also of the body, becomes an EpisodeError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
            raise EpisodeError(f"{path}: is not a regular file")
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise EpisodeError(f"{path}: cannot be read: {error.strerror or error}") from error


def _stamp(file: BinaryIO) -> tuple[int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read_into(file: BinaryIO, path: Path, offset: int, array: np.ndarray) -> None:
    view = memoryview(array.reshape(-1).view(np.uint8))
    file.seek(offset)
    while view:
        got = file.readinto(view)
        if not got:
            raise EpisodeError(f"{path}: is cut short")
        view = view[got:]


def _read(file: BinaryIO, info: EpisodeInfo, name: str) -> np.ndarray:
    field = info.layout[name]
    array = np.empty(field.shape, field.dtype)
    _read_into(file, info.path, field.offset, array)
    return array


def _inspect(file: BinaryIO, path: Path, index: int) -> EpisodeInfo:
    """Check an open file from its first byte to its last; trusts nothing that it says."""
    stamp = _stamp(file)
    size = stamp[1]
    prefix = file.read(8)
    header_size = int.from_bytes(prefix, "little")
    if header_size > _HEADER_LIMIT:
        raise EpisodeError(f"{path}: is not an episode (header of {header_size} bytes)")
    header = file.read(header_size)
    if len(prefix) < 8 or len(header) < header_size:
        raise EpisodeError(f"{path}: is cut short ({size} bytes)")
    entries = _parse_json(path, "header", header)
    record = entries.pop("__metadata__", None)
    if not isinstance(record, dict) or record.keys() != {_RECORD}:
        raise EpisodeError(f"{path}: is not an episode (no {_RECORD!r} in its metadata)")
    record = _parse_json(path, "metadata", record[_RECORD])
    meta, version = record.get("meta"), record.get("version")
    if version != VERSION:
        raise EpisodeError(f"{path}: has format version {version!r}, this program reads {VERSION}")
    layout = _parse_layout(path, entries, 8 + header_size, size)
    length = check_fields(path, {name: (f.dtype, f.shape) for name, f in layout.items()})
    _check_meta(path, meta)

    stored = list(_CRC.finditer(header))
    if len(stored) != 1 or stored[0][2].decode() != record.get("crc32"):
        raise EpisodeError(f"{path}: has no valid checksum entry")
    start, end = stored[0].span(2)
    crc = zlib.crc32(prefix + header[:start] + b"0" * 8 + header[end:])
    while chunk := file.read(_CHUNK):
        crc = zlib.crc32(chunk, crc)
    if crc != int(stored[0][2], 16):
        raise EpisodeError(f"{path}: is damaged (its checksum does not fit)")
    info = EpisodeInfo(path, index, length, meta["env_frames"], meta, layout, crc, stamp)
    _check_values(path, {name: _read(file, info, name) for name in layout if name != "pixels"})
    return info


def _parse_json(path: Path, what: str, text: Any) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise EpisodeError(f"{path}: is not an episode ({what} is not JSON: {error})") from error
    if not isinstance(value, dict):
        raise EpisodeError(f"{path}: is not an episode ({what} is not a JSON object)")
    return value


def _parse_layout(path: Path, entries: dict[str, Any], start: int, size: int) -> dict[str, _Field]:
    """Return the fields in file order; together they must fill the data section exactly."""
    layout = {}
    for name, entry in entries.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise EpisodeError(f"{path}: entry {name!r} is malformed")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in list(_DTYPES):
            raise EpisodeError(f"{path}: {name!r} has dtype {dtype!r}, not one of {list(_DTYPES)}")
        # Bounded by the file's size, four of them at most: no product of these can run away.
        if not _sizes(shape, range(5), size) or not _sizes(offsets, (2,), size):
            raise EpisodeError(f"{path}: {name!r} has a malformed shape or offset")
        field = _Field(_DTYPES[dtype], tuple(shape), start + offsets[0])
        if field.nbytes != offsets[1] - offsets[0]:
            raise EpisodeError(f"{path}: {name!r} has {field.nbytes} bytes, offsets {offsets}")
        layout[name] = field
    layout = dict(sorted(layout.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    position = start
    for name, field in layout.items():
        if field.offset != position:
            raise EpisodeError(f"{path}: {name!r} is at {field.offset}, expected at {position}")
        position += field.nbytes
    if position != size:
        raise EpisodeError(f"{path}: has {size} bytes, its header describes {position}")
    return layout


def _sizes(value: Any, lengths: Iterable[int], limit: int) -> bool:
    known = isinstance(value, list) and len(value) in lengths
    return known and all(type(n) is int and 0 <= n <= limit for n in value)


def check_fields(where: object, arrays: Fields) -> int:
    """Return T if these are the fields of an episode."""
    missing = [name for name in _REQUIRED if name not in arrays]
    if missing or not any(name in arrays for name in _OBSERVED):
        raise EpisodeError(f"{where}: lacks {', '.join(missing) or 'pixels or state'}")
    for name, (dtype, shape) in arrays.items():
        if name not in _FIELDS:
            raise EpisodeError(f"{where}: unknown field {name!r}, known: {', '.join(_FIELDS)}")
        if (dtype, len(shape)) != _FIELDS[name] or 0 in shape:
            raise EpisodeError(
                f"{where}: {name} must be {_FIELDS[name][0]} with {_FIELDS[name][1]} dimensions, "
                f"none empty, got {describe({name: (dtype, shape)})}"
            )
    if "pixels" in arrays and arrays["pixels"][1][-1] != 3:
        raise EpisodeError(f"{where}: pixels must be [T, h, w, 3], got {arrays['pixels'][1]}")
    lengths = {name: shape[0] for name, (_, shape) in arrays.items()}
    if len(set(lengths.values())) != 1 or lengths["reward"] < 2:
        raise EpisodeError(f"{where}: fields must share one length T of at least 2, got {lengths}")
    return lengths["reward"]


def _check_values(where: object, arrays: Arrays) -> None:
    """Check the values of all fields but pixels, of which every value is right."""
    for name, array in arrays.items():
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise EpisodeError(f"{where}: {name} has a value that is not finite")
    if arrays["action"][0].any() or arrays["reward"][0] != 0:
        raise EpisodeError(f"{where}: action and reward of step 0 must be 0")
    terminated = arrays["terminated"].view(np.uint8)
    if terminated[:-1].any() or terminated[-1] > 1:
        raise EpisodeError(f"{where}: terminated must be 0, at the last step 0 or 1")


def _check_meta(where: object, meta: object) -> None:
    frames = meta.get("env_frames") if isinstance(meta, Mapping) else None
    if type(frames) is not int or frames < 1:
        raise EpisodeError(f"{where}: meta must be a dict with 'env_frames', an int above 0")


def describe(fields: Fields) -> str:
    """Names, dtypes and shapes in a line, for messages."""
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (dtype, shape) in fields.items())
