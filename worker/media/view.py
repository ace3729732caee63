"""How a player shows a coded frame: with square pixels, upright.

Pixels that are not square are made so by the width: the height is kept, as players do it. The frame is turned after
that, as the container's matrix says.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from worker.media.orientation import AS_STORED, swaps_sides, upright


@dataclass(frozen=True, slots=True)
class View:
    """orientation: EXIF's number. pixel_aspect: width over height of a coded pixel."""

    orientation: int = AS_STORED
    pixel_aspect: float = 1.0

    def size(self, coded: tuple[int, int]) -> tuple[int, int]:
        """Return width and height of a frame as it is shown; 0 for a side that vanishes."""
        width, height = self._square(coded)
        return (height, width) if swaps_sides(self.orientation) else (width, height)

    def show(self, frame: Image.Image) -> Image.Image:
        """Return a coded frame as it is shown."""
        size = self._square(frame.size)
        square = frame if size == frame.size else frame.resize(size, Image.Resampling.BICUBIC)
        return upright(square, self.orientation)

    def _square(self, coded: tuple[int, int]) -> tuple[int, int]:
        width, height = coded
        return round(width * self.pixel_aspect), height
