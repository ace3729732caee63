"""What media a worker accepts, and decoded media as fetch and decode hand them to prompting.

Every limit of `MediaPolicy` is checked before the work it bounds: bytes before the download, pixels and seconds before
decoding.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

MEBIBYTE = 1024 * 1024
MEGAPIXEL = 1_000_000
#: Pillow stores a pixel of an RGB picture in 32 bits.
PIXEL_BYTES = 4


@dataclass(frozen=True, slots=True)
class MediaPolicy:
    """Limits of one image, of one clip and of one job.

    buckets: the only buckets that are ever asked for an object.
    max_image_pixels, max_frame_pixels: width × height of a still and of a clip's frame (default: 8K video).
    max_clip_pixels: width × height × sampled frames of one clip; 3 bytes of memory each.
    max_video_frames: frames a clip may hold, sampled or not; bounds the time spent indexing it.
    max_job_bytes: all objects of one job, by their sizes in storage; their files are on disk together.
    max_job_pixels: width × height of all stills and sampled frames of one job, checked after each is decoded.
    max_aspect: longer side over shorter side; processors that resize by the shorter side would make extreme strips
    huge.
    """

    buckets: frozenset[str]
    max_image_bytes: int = 32 * MEBIBYTE
    max_image_pixels: int = 50 * MEGAPIXEL
    max_video_bytes: int = 512 * MEBIBYTE
    max_video_seconds: float = 3_600.0
    max_video_frames: int = 3_600 * 60
    max_frame_pixels: int = 7_680 * 4_320
    max_clip_pixels: int = 256 * MEGAPIXEL
    max_job_bytes: int = 1024 * MEBIBYTE
    max_job_pixels: int = 256 * MEGAPIXEL
    max_aspect: float = 200.0


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
