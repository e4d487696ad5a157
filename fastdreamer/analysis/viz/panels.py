"""Pictures side by side, each below its name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

SIDE = 256
"""Pixels of the longer side of a small picture, enlarged by a whole factor to about that."""
_STRIP, _GAP = 16, 8


def panels(pictures: Mapping[str, np.ndarray]) -> np.ndarray:
    """One picture of several, in their order.

    pictures: uint8 [h, w, 3] by name, all of one size. Returns uint8 [H, W, 3], both even. Raises
    ValueError where there is none, or for another type or unequal sizes.
    """
    shapes = {(picture.dtype.name, *picture.shape) for picture in pictures.values()}
    if len(shapes) != 1 or next(iter(shapes))[:1] != ("uint8",) or len(next(iter(shapes))) != 4:
        raise ValueError(f"panels: pictures must be uint8 [h, w, 3] of one size, got {shapes}")
    (_, height, width, _) = shapes.pop()
    scale = max(1, SIDE // max(height, width))
    height, width = scale * height, scale * width
    total = len(pictures) * (width + _GAP) - _GAP
    whole = Image.new("RGB", (total + total % 2, _STRIP + height + height % 2), "white")
    draw = ImageDraw.Draw(whole)
    for i, (name, picture) in enumerate(pictures.items()):
        left = i * (width + _GAP)
        large = picture.repeat(scale, axis=0).repeat(scale, axis=1)
        whole.paste(Image.fromarray(large), (left, _STRIP))
        draw.text((left + 2, 2), name, "black")
    return np.asarray(whole)
