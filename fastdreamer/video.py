"""Frames to an mp4 file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fastdreamer.errors import ArgumentError, FastdreamerError, how_to_install
from fastdreamer.files import replacing


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float) -> Path:
    """Write frames as an mp4 (H.264, yuv420p) that every player shows.

    path: .mp4; appears only when complete. frames: uint8 [h, w, 3], all of one size; an odd size
    is padded to even by repeating the last row or column. fps: frames per second.
    Returns path. Raises ValueError when there is no frame or one of another type or size,
    FastdreamerError where the encoder is not installed.
    """
    try:  # not before: it brings an ffmpeg of tens of megabytes
        import imageio_ffmpeg
    except ModuleNotFoundError as error:
        raise FastdreamerError(how_to_install(error) or str(error)) from error
    path = Path(path)
    if path.suffix != ".mp4":
        raise ArgumentError(f"write_video: the file name must end in .mp4, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = None
    writer = None
    with replacing(path) as temporary:
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
                if writer is None:
                    writer = imageio_ffmpeg.write_frames(
                        str(temporary),
                        (even.shape[1], even.shape[0]),
                        fps=fps,
                        codec="libx264",
                        pix_fmt_out="yuv420p",
                        quality=8,
                        macro_block_size=2,
                    )
                    writer.send(None)
                writer.send(np.ascontiguousarray(even))
        finally:
            if writer is not None:
                writer.close()
        if shape is None:
            raise ValueError(f"write_video: no frames for {path}")
    return path
