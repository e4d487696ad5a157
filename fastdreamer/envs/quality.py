"""What of a scene is drawn: the names of ``--render-quality``, and who may draw."""

from __future__ import annotations

from dataclasses import dataclass

RENDERERS = ("opengl", "rays")


@dataclass(frozen=True)
class Quality:
    """Multisampled edges, the floor's mirror image, shadows, the sky."""

    multisampling: bool = True
    mirror: bool = True
    shadows: bool = True
    sky: bool = True


QUALITIES = {
    "full": Quality(),
    "fast": Quality(multisampling=False),
    "matte": Quality(multisampling=False, mirror=False),
    "unshadowed": Quality(multisampling=False, mirror=False, shadows=False),
    "bare": Quality(multisampling=False, mirror=False, shadows=False, sky=False),
}
"""Each leaves out what the one before does, and one thing more."""
