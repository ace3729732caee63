"""Decoded media: what fetch and decode hand to prompting."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A still: RGB, upright (EXIF orientation applied)."""

    pixels: Image.Image

    @property
    def num_pixels(self) -> int:
        """Width × height."""
        return self.pixels.width * self.pixels.height


@dataclass(frozen=True, slots=True)
class DecodedClip:
    """Uniformly sampled frames of a clip, RGB, in time order, with their times in seconds.

    `duration_s` and `fps` describe the whole clip, not the sample; `fps` is 0 when the container does not say.
    """

    frames: tuple[Image.Image, ...]
    timestamps_s: tuple[float, ...]
    duration_s: float
    fps: float

    @property
    def num_pixels(self) -> int:
        """Width × height of all sampled frames."""
        return sum(frame.width * frame.height for frame in self.frames)


DecodedMedia = DecodedImage | DecodedClip
