"""Files that appear under their name only when they are complete and on the disk."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastdreamer.errors import ArgumentError, FastdreamerError

_TMP = re.compile(r"\.tmp-(\d+)-.*")
_TMP_MAX_AGE = 3600  # seconds; a write takes far less, so an older one belongs to a recycled pid


class DiskFullError(FastdreamerError, OSError):
    """There is no room for a file; what was there before is whole."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR)
_NO_SUCH_CALL = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)
"""What file systems answer that cannot sync a directory, as some that machines share."""


@contextlib.contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Raise DiskFullError, naming file and free space, where the body finds the disk full, and
    ArgumentError where the system refuses to write the file.

    A full disk also where a library words the system's answer in an exception of its own.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if _is_refusal(error, path):
            raise ArgumentError(f"{path} cannot be written: {error.strerror}") from error
        full = isinstance(error, OSError) and error.errno in _FULL
        words = [text for n in _FULL for text in (f"(os error {n})", os.strerror(n))]
        if not full and not any(text in str(error) for text in words):
            raise
        free = shutil.disk_usage(path.parent).free
        raise DiskFullError(
            f"{path}: cannot be written ({error}); {free >> 20} MiB are free there. Make room: all "
            "that was written before is whole"
        ) from error


def _is_refusal(error: Exception, path: Path) -> bool:
    """Whether the system lets nobody write that file, or its temporary beside it."""
    if not isinstance(error, OSError) or error.errno not in _REFUSED:
        return False
    return error.filename is None or Path(str(error.filename)).parent == path.parent


def file_in_the_way(directory: Path) -> Path | None:
    """The file for which that directory can't be made: in its place, or in one above."""
    return next((p for p in (directory, *directory.parents) if p.exists() and not p.is_dir()), None)


def make_directory(directory: Path) -> None:
    """Make a directory to write to, and those above it, where they lack.

    Raises:
        ArgumentError: a file is in the way, or the system refuses to make it or what is in it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror
        if isinstance(error, FileExistsError | NotADirectoryError):
            why = f"{file_in_the_way(directory)} is a file"
        raise ArgumentError(f"{directory} cannot be a directory: {why}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ArgumentError(f"{directory.absolute()} cannot be written to: choose another place")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, of its suffix, to write to; it becomes ``path`` at the end.

    Then file and directory entry are on the disk. At any moment ``path`` is absent, the old file
    or the complete new one; after an exception the old one, and nothing else is left. A killed
    process leaves ``.tmp-PID-NAME``.

    Raises:
        DiskFullError: there is no room for it. ArgumentError: the system refuses to write it.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with room_for(path):
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        try:
            _sync(path.parent)
        except OSError as error:
            if error.errno not in _NO_SUCH_CALL:
                raise


def write_csv(
    path: Path,
    rows: Sequence[dict[str, Any]],
    *,
    columns: Sequence[str] | None = None,
    about: dict[str, Any] | None = None,
) -> Path:
    """Write a table; makes its directory. Returns path.

    columns: their order; by default the first row's. about: JSON for a comment in the first line.
    """
    make_directory(path.parent)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        if about is not None:
            file.write(f"# {json.dumps(about)}\n")
        writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def remove_stale(directory: Path) -> None:
    """Remove the temporary files of `replacing` whose writers no longer live."""
    for path in directory.iterdir():
        match = _TMP.fullmatch(path.name)
        if not match:
            continue
        with contextlib.suppress(FileNotFoundError):  # its writer renamed it meanwhile
            if is_stale(path, match[1]):
                path.unlink()


def is_stale(path: Path, pid: str) -> bool:
    """Whether what that process writes for a moment has been left there by it.

    Raises:
        FileNotFoundError: it is not there.
    """
    if time.time() - path.stat().st_mtime > _TMP_MAX_AGE:
        return True
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False  # it lives, under another user
    # Killed, but not yet reaped: it answers signals and writes no more.
    return _is_zombie(pid)


def _is_zombie(pid: str) -> bool:
    with contextlib.suppress(OSError):  # it is gone, or there is no /proc: not told
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
