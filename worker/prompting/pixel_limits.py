"""Which limits of pixels a processor supports, found out by tests at boot, and the limits of each job.

In: a function that encodes one picture or clip with given arguments. Out: the rules that passed all tests, and the
least tokens of a picture. The tests encode noise and run no model. A rule by which a picture once has more pixels than
the limit, or the limit changes nothing, fails: jobs with limits are then refused. `PixelPolicy` combines a job's
`media_options` with the worker's own, or raises the reason why it cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import PreTrainedConfig, ProcessorMixin

from api_stub.contract.media import MediaOptions
from worker.errors import CannotStart, InvalidRequest
from worker.media.types import DecodedClip, DecodedImage, DecodedMedia
from worker.models.inputs import ModelInputs
from worker.prompting.pixels import Arguments, FixedSize, LongestEdge, SizeRule, rules_for_clips, rules_for_pictures

#: `(medium, arguments of the image processor or, for a clip, of the video processor)` to a prompt about the medium.
Encode = Callable[[DecodedMedia, Arguments], ModelInputs]
Size = tuple[int, int]

NUM_CHANNELS: Final = 3
#: By rounding, an edge may be this many times shorter than the limit allows.
ROUNDING: Final = 4
#: Odd numbers, too: some families process frames in pairs.
FRAMES: Final = (3, 4, 5)
#: What processors raise for arguments that they do not support.
_REFUSALS: Final = (
    InvalidRequest, StrictDataclassError, ValueError, TypeError, RuntimeError, LookupError, AttributeError,
    ArithmeticError, MemoryError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PixelLimits:
    """The limits of pixels that a model's processor supports.

    pictures, clips: the rule; None: not supported. Clips that are given as frames are pictures.
    least_tokens: tokens of a picture with the fewest pixels; None: the number of tokens does not depend on pixels.
    """

    pictures: SizeRule | None = None
    clips: SizeRule | None = None
    least_tokens: int | None = None


def find_limits(processor: ProcessorMixin, config: PreTrainedConfig, encode: Encode, *, has_clips: bool) -> PixelLimits:
    """Test every candidate rule and return those that pass first."""
    trials = _Trials(processor, encode)
    pictures = next((rule for rule in rules_for_pictures(processor, config) if trials.hold_for_pictures(rule)), None)
    if pictures is None:
        return PixelLimits()
    candidates = rules_for_clips(processor, pictures) if has_clips else []
    clips = next((rule for rule in candidates if trials.hold_for_clips(rule)), None)
    picture = _picture(_large(pictures))
    whole, least = (encode(picture, asked) for asked in ({}, pictures.arguments(MediaOptions(max_pixels=1))))
    saves = least.num_media_tokens < whole.num_media_tokens
    return PixelLimits(pictures, clips, least.num_media_tokens if saves else None)


@dataclass(frozen=True, slots=True)
class _Trials:
    processor: ProcessorMixin
    encode: Encode

    def hold_for_pictures(self, rule: SizeRule) -> bool:
        """Return whether pictures of several shapes stay within the limits, and come near them where they can."""
        width, height = _large(rule)
        try:
            whole = self._pixels(_picture((width, height)), {})
            trials = [((width, height), limits) for limits in _limits(whole)]
            trials.append(((width, height), MediaOptions(max_pixels=1)))
            trials += [(size, next(_limits(whole))) for size in ((width, height // 3), (width // 3, height))]
            if rule.takes_min:
                trials += [(size, MediaOptions(min_pixels=whole // 4, max_pixels=whole)) for size in ((9, 9), (24, 9))]
            return all(
                _keeps(self._pixels(_picture(size), rule.arguments(limits)), limits, rule, whole)
                for size, limits in trials
            )
        except _REFUSALS:
            return False

    def hold_for_clips(self, rule: SizeRule) -> bool:
        """Return the same for every frame of clips of several lengths."""
        size = _large(rule)
        try:
            for num_frames in FRAMES:
                whole = self._pixels(_clip(size, num_frames), {})
                trials = [(size, limits) for limits in _limits(whole)]
                if rule.takes_min:
                    trials.append(((9, 9), MediaOptions(min_pixels=whole // 4, max_pixels=whole)))
                for shown, limits in trials:
                    pixels = self._pixels(_clip(shown, num_frames), rule.arguments(limits, (num_frames,)))
                    if not _keeps(pixels, limits, rule, whole):
                        return False
        except _REFUSALS:
            return False
        return True

    def _pixels(self, medium: DecodedMedia, arguments: Arguments) -> int:
        """Return the pixels that the vision tower gets of a picture, or of each frame of a clip."""
        tensors = self.encode(medium, arguments).tensors
        num_frames = len(medium.frames) if isinstance(medium, DecodedClip) else 1
        mask = tensors.get("pixel_attention_mask")
        if mask is not None:
            return int(mask.sum()) // num_frames
        grid = tensors.get("video_grid_thw" if num_frames > 1 else "image_grid_thw")
        if grid is None:
            return tensors["pixel_values"].numel() // NUM_CHANNELS // num_frames
        # A row is one patch, of all frames that are processed together; a picture is copied to each of them.
        rows = tensors["pixel_values_videos" if num_frames > 1 else "pixel_values"]
        owner = self.processor.video_processor if num_frames > 1 else self.processor.image_processor
        patch = rows.shape[-1] // NUM_CHANNELS // int(getattr(owner, "temporal_patch_size", 1))
        return int(grid[0, 1] * grid[0, 2]) * patch


def _limits(whole: int) -> Iterator[MediaOptions]:
    return (MediaOptions(max_pixels=max(1, whole // share)) for share in (2, 5, 16))


def _keeps(pixels: int, limits: MediaOptions, rule: SizeRule, whole: int) -> bool:
    """Return whether a picture's pixels obey the limits; `whole`: pixels of a large one without limits."""
    assert limits.max_pixels is not None
    if pixels > max(limits.max_pixels, rule.least):
        return False
    if isinstance(rule, FixedSize):
        return True
    if limits.min_pixels is not None:
        return pixels >= limits.min_pixels
    return pixels < whole and pixels * ROUNDING * ROUNDING >= limits.max_pixels


def _large(rule: SizeRule) -> Size:
    """Return the size of a square picture of many patches or tiles."""
    edge = max(256, 3 * math.isqrt(rule.least), rule.own_longest if isinstance(rule, LongestEdge) else 0)
    return edge, edge


def _noise(size: Size, seed: int = 0) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, NUM_CHANNELS), np.uint8))


def _picture(size: Size) -> DecodedImage:
    return DecodedImage(_noise(size))


def _clip(size: Size, num_frames: int) -> DecodedClip:
    frames = tuple(_noise(size, seed) for seed in range(num_frames))
    return DecodedClip(frames, tuple(float(second) for second in range(num_frames)), float(num_frames), 1.0)


#: The environment variable of each field.
VARIABLES: Final = {"min_pixels": "VISIONQ_MIN_PIXELS", "max_pixels": "VISIONQ_MAX_PIXELS"}


class PixelPolicy:
    """The worker's own limits, and the jobs' limits within them.

    name: of the model, for messages. max_job_pixels: limit of all pictures of a job, if they are enlarged.
    """

    def __init__(self, name: str, own: MediaOptions, max_job_pixels: int) -> None:
        self._name = name
        self._own = own
        self._max_job_pixels = max_job_pixels

    def check_own(self, limits: PixelLimits, *, has_clips: bool) -> None:
        """Raise CannotStart for a setting that the processor does not support."""
        for field, value in self._own.model_dump(exclude_none=True).items():
            reason = self._why_not(field, limits)
            if reason is None and has_clips and limits.clips is None:
                reason = f"{self._name} cannot be asked for it about clips"
            if reason is not None:
                raise CannotStart(f"{VARIABLES[field]}={value}: {reason}")

    def of(self, asked: MediaOptions | None, limits: PixelLimits) -> MediaOptions | None:
        """Return the limits for a job; None: none. Raises InvalidRequest for what is not supported or beyond the
        worker's.
        """
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

    def check_enlarged(self, asked: MediaOptions | None, media: Sequence[DecodedMedia]) -> None:
        """Raise InvalidRequest when a job's pictures would be enlarged beyond `max_job_pixels`."""
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
    """Raise InvalidRequest, with both numbers, for a job's limit above, or below, the worker's own."""
    if value is None or own is None or (value <= own if is_above else value >= own):
        return
    word, name = ("above", "most") if is_above else ("below", "least")
    raise InvalidRequest(f"media_options.{field}: {value} is {word} the {name} that this worker gives a picture, {own}")
