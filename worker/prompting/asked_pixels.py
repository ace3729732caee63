"""What a worker's settings and a job together ask of the processor, or why that cannot be had.

In: `media_options` of a job, the worker's own, and what the processor can be asked. Out: the limits to ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from api_stub.contract.media_options import MediaOptions
from worker.errors import CannotStart, InvalidRequest
from worker.media.types import DecodedClip, DecodedMedia
from worker.prompting.pixel_trials import PixelLimits

#: The worker's setting behind each field.
VARIABLES: Final = {"min_pixels": "VISIONQ_MIN_PIXELS", "max_pixels": "VISIONQ_MAX_PIXELS"}


class AskedPixels:
    """A worker's own limits, and the jobs' within them.

    name: of the model, for messages. max_job_pixels: of all pictures of a job, however much they are enlarged.
    """

    def __init__(self, name: str, own: MediaOptions, max_job_pixels: int) -> None:
        self._name = name
        self._own = own
        self._max_job_pixels = max_job_pixels

    def check_own(self, limits: PixelLimits, *, has_clips: bool) -> None:
        """Raise CannotStart for a setting that the processor cannot be asked."""
        for field, value in self._own.model_dump(exclude_none=True).items():
            reason = self._why_not(field, limits)
            if reason is None and has_clips and limits.clips is None:
                reason = f"{self._name} cannot be asked for it about clips"
            if reason is not None:
                raise CannotStart(f"{VARIABLES[field]}={value}: {reason}")

    def of(self, asked: MediaOptions | None, limits: PixelLimits) -> MediaOptions | None:
        """Return what the processor is asked for a job; None: nothing. Raises InvalidRequest."""
        if asked is None or asked.are_empty:
            return None if self._own.are_empty else self._own
        for field in asked.model_dump(exclude_none=True):
            reason = self._why_not(field, limits)
            if reason is not None:
                raise InvalidRequest(f"media_options.{field}: {reason}")
        own = self._own
        _check_order("max_pixels", asked.max_pixels, own.max_pixels, is_above=True)
        _check_order("max_pixels", asked.max_pixels, own.min_pixels, is_above=False)
        _check_order("min_pixels", asked.min_pixels, own.max_pixels, is_above=True)
        least = max(filter(None, (asked.min_pixels, own.min_pixels)), default=None)
        return MediaOptions(min_pixels=least, max_pixels=asked.max_pixels or own.max_pixels)

    def check_room(self, asked: MediaOptions | None, media: Sequence[DecodedMedia]) -> None:
        """Raise InvalidRequest when pictures would be enlarged beyond what a job may have."""
        if asked is None or asked.min_pixels is None:
            return
        num_pictures = sum(len(medium.frames) if isinstance(medium, DecodedClip) else 1 for medium in media)
        num_pixels = num_pictures * asked.min_pixels
        if num_pixels > self._max_job_pixels:
            raise InvalidRequest(
                f"media_options.min_pixels: {num_pictures} pictures and frames of {asked.min_pixels} pixels are "
                f"{num_pixels}, the limit is {self._max_job_pixels} pixels per job"
            )

    def _why_not(self, field: str, limits: PixelLimits) -> str | None:
        if limits.pictures is None:
            return f"{self._name} cannot be asked for it: its processor sizes pictures in its own way only"
        if field == "min_pixels" and not limits.pictures.takes_min:
            return f"{self._name} cannot be asked for it: its processor has no least size to choose, only max_pixels"
        return None


def _check_order(field: str, value: int | None, own: int | None, *, is_above: bool) -> None:
    """Raise InvalidRequest, with both numbers, when a job asks for more, or less, than the worker gives."""
    if value is None or own is None or (value <= own if is_above else value >= own):
        return
    word, name = ("above", "most") if is_above else ("below", "least")
    raise InvalidRequest(f"media_options.{field}: {value} is {word} the {name} that this worker gives a picture, {own}")
