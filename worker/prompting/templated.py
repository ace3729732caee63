"""Prompts of models with a chat template: render the template, then run the family's own processor.

In: turns and decoded media. Out: tensors on the CPU. Text without literal control tokens takes the same path as
`processor.apply_chat_template(..., tokenize=True)`; in text with them they are marked first
(worker.prompting.processors). Clips are given as transformers' video processors expect: sampled frames of one size,
with `VideoMetadata`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Final

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, ProcessorMixin
from transformers.video_utils import VideoMetadata

from api_stub.contract.conversation import ImagePart, Role, TextPart, Turn, VideoPart
from api_stub.contract.media import MediaOptions
from worker.errors import InvalidRequest
from worker.media.types import DecodedClip, DecodedImage, DecodedMedia
from worker.models.capabilities import Capabilities
from worker.models.inputs import ModelInputs
from worker.prompting.chat import Conversation, Placeholder, SpreadMedia, render, spread
from worker.prompting.pixel_limits import PixelLimits, find_limits
from worker.prompting.pixels import Arguments, FixedSize
from worker.prompting.processors import MARK, Processors, tensors_of

#: Processors count time in frames; for a clip without a frame rate these are milliseconds.
MILLISECONDS_PER_S: Final = 1000.0

_SHAPES_REMEMBERED = 512


def video_options(processor: ProcessorMixin, clips: Sequence[DecodedClip]) -> dict[str, Any]:
    """Return the processor's arguments for the clips of one conversation, in order; none without clips."""
    if not clips:
        return {}
    # Qwen's video towers process frames in pairs and refuse a clip of one frame.
    least = getattr(processor.video_processor, "temporal_patch_size", 1)
    padded = [_at_least(least, clip) for clip in clips]
    return {
        "videos": [[_frames_of_one_size(clip) for clip in padded]],
        # New for every call: processors change it.
        "video_metadata": [_metadata(clip) for clip in padded],
        "do_sample_frames": False,
    }


def _at_least(num_frames: int, clip: DecodedClip) -> DecodedClip:
    """Repeat the last frame, as processors themselves do for an odd number of frames."""
    missing = num_frames - len(clip.frames)
    if missing <= 0:
        return clip
    return DecodedClip(
        clip.frames + clip.frames[-1:] * missing,
        clip.timestamps_s + clip.timestamps_s[-1:] * missing,
        clip.duration_s,
        clip.fps,
    )


def _frames_of_one_size(clip: DecodedClip) -> list[Image.Image]:
    size = clip.frames[0].size
    return [frame if frame.size == size else frame.resize(size) for frame in clip.frames]


def _metadata(clip: DecodedClip) -> VideoMetadata:
    rate = clip.fps if clip.fps > 0 else MILLISECONDS_PER_S
    positions = [round(time_s * rate) for time_s in clip.timestamps_s]
    width, height = clip.frames[0].size
    return VideoMetadata(
        total_num_frames=max(round(clip.duration_s * rate), positions[-1] + 1),
        fps=rate,
        width=width,
        height=height,
        duration=clip.duration_s,
        frames_indices=positions,
    )


class TemplatedPrompts:
    """Prepares prompts with one model's chat template. Any thread."""

    def __init__(
        self,
        processors: Processors,
        capabilities: Capabilities,
        config: PreTrainedConfig,
        bos_token: str | None,
    ) -> None:
        self._processors = processors
        self._plain, self._marked, self._control = processors.plain, processors.marked, processors.control
        self._capabilities = capabilities
        self._config = config
        self._bos_token = bos_token
        tokens = sorted(filter(None, (capabilities.image_token, capabilities.video_token)), key=len, reverse=True)
        self._placeholders = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        self._expected = lru_cache(maxsize=_SHAPES_REMEMBERED)(self._count_of_shape)

    @cached_property
    def limits(self) -> PixelLimits:
        """The limits of pixels that the processor supports; tested at the first access, which takes about a second."""
        if self._capabilities.image_token is None:
            return PixelLimits()
        return find_limits(self._plain, self._config, self._encode, has_clips=self._capabilities.native_video)

    def prepare(
        self, turns: Sequence[Turn], media: Sequence[DecodedMedia], options: MediaOptions | None = None
    ) -> ModelInputs:
        """Return the prompt's tensors. `media` are in the order of the parts that are not text.

        options: limits of pixels; `limits` must have a rule for them.
        Raises InvalidRequest when the model does not support it, or the template or the processor refuses it.
        """
        conversation, shown = spread(turns, media, keep_clips=self.keeps_clips(media))
        num_images = conversation.count(Placeholder.IMAGE)
        if num_images and self._capabilities.image_token is None:
            raise InvalidRequest(f"media: this model's chat template shows no images, got {num_images}")
        processor, prompt = self._render(conversation)
        asked = self._asked(options, shown) if options is not None else {}
        tensors = self.process(processor, prompt, shown, asked)
        if processor is self._marked:
            self._check_control_tokens(tensors, conversation, shown, asked)
        num_media_tokens = self._num_media_tokens(processor, prompt, tensors) if media else 0
        return ModelInputs(
            tensors=tensors,
            num_images=shown.num_images,
            num_frames=shown.num_frames,
            is_continuation=conversation.is_continuation,
            num_media_tokens=num_media_tokens,
            can_take_fewer=self._can_take_fewer(num_media_tokens, shown),
        )

    def _encode(self, medium: DecodedMedia, asked: Arguments) -> ModelInputs:
        """Encode a prompt with one medium, to test the processor."""
        is_clip = isinstance(medium, DecodedClip)
        part = VideoPart(uri="s3://trial/noise") if is_clip else ImagePart(uri="s3://trial/noise")
        turns = (Turn(role=Role.USER, content=(part, TextPart(text="x"))),)
        conversation, shown = spread(turns, (medium,), keep_clips=is_clip)
        prompt = self._render_with(self._plain, conversation)
        tensors = self.process(self._plain, prompt, shown, {"videos_kwargs" if is_clip else "images_kwargs": asked})
        return ModelInputs(tensors, num_media_tokens=self._num_media_tokens(self._plain, prompt, tensors))

    def _asked(self, options: MediaOptions, shown: SpreadMedia) -> Mapping[str, Arguments]:
        """Return the processor's arguments for limits of pixels, per kind of media. Raises InvalidRequest."""
        asked: dict[str, Arguments] = {}
        try:
            if shown.pictures and self.limits.pictures is not None:
                asked["images_kwargs"] = self.limits.pictures.arguments(options)
            if shown.clips:
                if self.limits.clips is None:
                    name = type(self._plain.video_processor).__name__
                    raise InvalidRequest(f"media_options: {name} sizes the frames of clips in its own way only")
                num_frames = [len(clip.frames) for clip in shown.clips]
                asked["videos_kwargs"] = self.limits.clips.arguments(options, num_frames)
        except ValueError as error:
            raise InvalidRequest(f"media_options: {error}") from error
        return asked

    def _num_media_tokens(self, processor: ProcessorMixin, prompt: str, tensors: Mapping[str, Tensor]) -> int:
        """Return how many tokens the prompt has beyond those of its text."""
        tokenizer = processor.tokenizer
        has_bos = self._bos_token is not None and prompt.startswith(self._bos_token)
        num_words = 0 if has_bos else tokenizer.num_special_tokens_to_add()
        for text in filter(None, self._placeholders.split(prompt)):
            num_words += len(tokenizer(text, add_special_tokens=False)["input_ids"])
        return max(0, int(tensors["input_ids"].shape[1]) - num_words)

    def _can_take_fewer(self, num_media_tokens: int, shown: SpreadMedia) -> bool:
        """Return whether fewer pixels would mean fewer tokens; False as long as `limits` has not been tested."""
        limits: PixelLimits | None = self.__dict__.get("limits")
        if limits is None or limits.least_tokens is None:
            return False
        if shown.clips:
            return limits.clips is not None and not isinstance(limits.clips, FixedSize)
        return num_media_tokens > len(shown.pictures) * limits.least_tokens

    def keeps_clips(self, media: Sequence[DecodedMedia]) -> bool:
        """Return whether clips are given as clips; else all clips of a prompt are given as their frames."""
        clips = [medium for medium in media if isinstance(medium, DecodedClip)]
        has_images, num_lengths = len(clips) < len(media), len({len(clip.frames) for clip in clips})
        can = self._capabilities
        if not can.native_video or not (can.can_mix_lengths or num_lengths <= 1):
            return False
        return not clips or not has_images or (can.can_mix_media and not self._share_placeholder)

    @cached_property
    def _share_placeholder(self) -> bool:
        """Whether pictures and clips have tensors of their own and yet the same placeholder token.

        GLM-4V's `generate` then takes clips' frames for pictures, and fails on a prompt with both.
        """
        noise = Image.fromarray(np.zeros((256, 256, 3), np.uint8))
        picture = self._encode(DecodedImage(noise), {}).tensors
        clip = self._encode(DecodedClip((noise,) * 4, (0.0, 1.0, 2.0, 3.0), 4.0, 1.0), {}).tensors
        if picture.keys() >= clip.keys():
            return False
        # In a prompt of one medium and one letter the placeholder is the most frequent token.
        placeholders = [int(tensors["input_ids"].flatten().mode().values) for tensors in (picture, clip)]
        return placeholders[0] == placeholders[1]

    def _render(self, conversation: Conversation) -> tuple[ProcessorMixin, str]:
        """Return a prompt in which all control tokens are the template's own, and the processor for it.

        A control token may also arise where two texts meet; then every text is enclosed in marks.
        """
        expected = self._expected(shape_of(conversation))
        if not any(self._control.occur_in(text) for text in conversation.texts):
            prompt = self._render_with(self._plain, conversation)
            if self._control.count_in(prompt) == expected:
                return self._plain, prompt
        escapes: tuple[Callable[[str], str], ...] = (self._control.mark, self._enclose)
        for escape in escapes:
            prompt = self._render_with(self._marked, conversation.with_texts(escape))
            if self._control.count_in(prompt) == expected:
                return self._marked, prompt
        raise InvalidRequest("messages: the text cannot be told apart from the model's control tokens")

    def _render_with(self, processor: ProcessorMixin, conversation: Conversation, *, is_complete: bool = False) -> str:
        can = self._capabilities
        return render(
            processor,
            conversation,
            template=can.given_template,
            takes_parts=can.takes_parts,
            is_complete=is_complete,
        )

    def render_plain(self, conversation: Conversation, *, is_complete: bool = False) -> str:
        """Return the prompt without looking for control tokens in its texts; `is_complete` as in `render`."""
        return self._render_with(self._plain, conversation, is_complete=is_complete)

    def _enclose(self, text: str) -> str:
        return f"{MARK}{self._control.mark(text)}{MARK}"

    def _count_of_shape(self, shape: Conversation) -> Counter[str]:
        """Count the template's own control tokens, and check that there is one placeholder per image and clip."""
        counts = self._control.count_in(self._render_with(self._plain, shape))
        tokens = {Placeholder.IMAGE: self._capabilities.image_token, Placeholder.VIDEO: self._capabilities.video_token}
        for placeholder, token in tokens.items():
            if token is not None and counts[token] != shape.count(placeholder):
                shown = f"{counts[token]} of {shape.count(placeholder)} {placeholder.value}s"
                raise InvalidRequest(f"messages: the model's chat template shows {shown}")
        return counts

    def process(
        self, processor: ProcessorMixin, prompt: str, shown: SpreadMedia, asked: Mapping[str, Arguments]
    ) -> dict[str, Tensor]:
        """Run the processor as transformers' own chat path does: no second BOS, media nested per conversation."""
        options: dict[str, Any] = video_options(processor, shown.clips)
        # Copies: processors remove the entries that they have read.
        options.update({kind: dict(arguments) for kind, arguments in asked.items() if arguments})
        if self._bos_token is not None and prompt.startswith(self._bos_token):
            options["add_special_tokens"] = False
        images = [list(shown.pictures)] if shown.pictures else None
        try:
            encoded = processor(text=prompt, images=images, return_tensors="pt", **options)
        except ValueError as error:
            raise InvalidRequest(f"messages: the model's processor refuses them: {error}") from error
        return tensors_of(encoded)

    def _check_control_tokens(
        self,
        tensors: dict[str, Tensor],
        conversation: Conversation,
        shown: SpreadMedia,
        asked: Mapping[str, Arguments],
    ) -> None:
        """Check that the ids hold as many control tokens as those of the same conversation with harmless text."""
        harmless = self.process(self._plain, self._render_with(self._plain, shape_of(conversation)), shown, asked)
        if self._processors.control_ids(tensors) != self._processors.control_ids(harmless):
            raise InvalidRequest("messages: the text cannot be told apart from the model's control tokens")


def shape_of(conversation: Conversation) -> Conversation:
    """Return the conversation with harmless text in place of its own."""
    return conversation.with_texts(lambda text: "x" if text.strip() else text)
