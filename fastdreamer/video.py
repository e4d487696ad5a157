"""Frames to an mp4 file."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastdreamer.errors import ArgumentError, FastdreamerError, how_to_install
from fastdreamer.files import make_directory, replacing


def check_video(path: Path) -> None:
    """Make a video's directory; raise what ``write_video`` would of its name or its encoder.

    For who has to play before there are frames.
    """
    try:  # not before: it brings an ffmpeg of tens of megabytes
        import imageio_ffmpeg  # noqa: F401
    except ModuleNotFoundError as error:
        raise FastdreamerError(how_to_install(error) or str(error)) from error
    if path.suffix != ".mp4":
        raise ArgumentError(f"write_video: the file name must end in .mp4, got {path}")
    if path.is_dir():
        raise ArgumentError(f"write_video: {path} is a directory")
    make_directory(path.parent)


class VideoError(FastdreamerError, RuntimeError):
    """The encoder failed; the message is its own."""


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float) -> Path:
    """Write frames as an mp4 (H.264, yuv420p) that every player shows.

    path: .mp4; appears only when complete. frames: uint8 [h, w, 3], all of one size; an odd size
    is padded to even by repeating the last row or column. fps: frames per second.
    Returns path. Raises ValueError when there is no frame or one of another type or size,
    FastdreamerError where the encoder is not installed, VideoError where it fails, DiskFullError
    where that is for want of room.
    """
    path = Path(path)
    check_video(path)
    import imageio_ffmpeg

    shape = None
    encoder = None
    with replacing(path) as temporary, tempfile.TemporaryFile() as said:
        try:
            for frame in frames:
                frame = np.asarray(frame)
                if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                    got = f"{frame.dtype} {list(frame.shape)}"
                    raise ValueError(f"write_video: frames must be uint8 [h, w, 3], got {got}")
                if shape not in (None, frame.shape):
                    got = f"{list(shape)} and {list(frame.shape)}"
                    raise ValueError(f"write_video: frames must be of one size, got {got}")
                shape = frame.shape
                even = np.pad(frame, ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0)), mode="edge")
                if encoder is None:
                    program = imageio_ffmpeg.get_ffmpeg_exe()
                    encoder = _start(program, temporary, even.shape, fps, said)
                try:
                    encoder.stdin.write(even.tobytes())
                except BrokenPipeError:  # it has ended, and has said why
                    break
            if encoder is None:
                raise ValueError(f"write_video: no frames for {path}")
            with contextlib.suppress(BrokenPipeError):
                encoder.stdin.close()
            if status := encoder.wait():
                said.seek(0)
                why = " ".join(said.read().decode(errors="replace").split())
                raise VideoError(f"{path}: ffmpeg ended with status {status}: {why}")
        finally:
            if encoder is not None:
                encoder.kill()
                encoder.wait()
                with contextlib.suppress(BrokenPipeError):
                    encoder.stdin.close()
    return path


def _start(
    program: str, path: Path, shape: tuple[int, ...], fps: float, said: BinaryIO
) -> subprocess.Popen[bytes]:
    """An ffmpeg that encodes what it is written: frames [h, w, 3]."""
    given = ["-f", "rawvideo", "-s", f"{shape[1]}x{shape[0]}", "-pix_fmt", "rgb24"]
    rate = str(Fraction(fps).limit_denominator())
    made = ["-an", "-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", "10"]
    return subprocess.Popen(
        [program, "-y", "-v", "error", *given, "-r", rate, "-i", "-", *made, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=said,
        start_new_session=True,  # a terminal's Ctrl-C is not for it
    )
