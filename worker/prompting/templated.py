"""Prompts of models with a chat template: template, then the family's own unmodified processor.

In: turns and decoded media. Out: tensors on the CPU. Text without literal control tokens takes exactly the
ordinary path of `processor.apply_chat_template(..., tokenize=True)`; text with them is marked first (`processors`).
Clips go in as transformers' video processors take them: frames of one size and `VideoMetadata`, sampled already.
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
from worker.prompting.chat import Conversation, Slot, SpreadMedia, render, spread
from worker.prompting.pixel_limits import PixelLimits, find_limits
from worker.prompting.pixels import Arguments, AsItIs
from worker.prompting.processors import MARK, Processors, tensors_of

#: Processors count time in frames; a clip that does not tell its rate is counted in milliseconds.
MILLISECONDS_PER_S: Final = 1000.0


def video_options(processor: ProcessorMixin, clips: Sequence[DecodedClip]) -> dict[str, Any]:
    """Return the processor's arguments for the clips of one conversation, in order; none without clips."""
    if not clips:
        return {}
    # Qwen's video towers look at pairs of frames and refuse a clip that has less than one pair.
    least = getattr(processor.video_processor, "temporal_patch_size", 1)
    padded = [_at_least(least, clip) for clip in clips]
    return {
        "videos": [[_frames_of_one_size(clip) for clip in padded]],
        # Made anew for every call: processors write into it.
        "video_metadata": [_metadata(clip) for clip in padded],
        "do_sample_frames": False,
    }


def _at_least(num_frames: int, clip: DecodedClip) -> DecodedClip:
    """Repeat the last frame, as the processors themselves fill up an odd number of frames."""
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


_SHAPES_REMEMBERED = 512


class TemplatedPrompts:
    """Prepares prompts with one model's chat template. Called from many threads at once."""

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
        self._places = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        self._expected = lru_cache(maxsize=_SHAPES_REMEMBERED)(self._count_of_shape)

    @cached_property
    def limits(self) -> PixelLimits:
        """How the processor can be asked for fewer or more pixels. Found out at the first look, in about a second."""
        if self._capabilities.image_token is None:
            return PixelLimits()
        return find_limits(self._plain, self._config, self._encode, has_clips=self._capabilities.native_video)

    def prepare(
        self, turns: Sequence[Turn], media: Sequence[DecodedMedia], options: MediaOptions | None = None
    ) -> ModelInputs:
        """Return the prompt's tensors. `media` are in the order of the parts that are not text.

        options: what is asked of the processor; `limits` must have a way for it.
        Raises InvalidRequest when the model cannot be asked this, or the template or the processor refuses it.
        """
        conversation, shown = spread(turns, media, keep_clips=self._keeps_clips(media))
        num_images = conversation.count(Slot.IMAGE)
        if num_images and self._capabilities.image_token is None:
            raise InvalidRequest(f"media: this model's chat template shows no images, got {num_images}")
        processor, prompt = self._render(conversation)
        asked = self._asked(options, shown) if options is not None else {}
        tensors = self._process(processor, prompt, shown, asked)
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
        """Return a prompt about one medium, for trials."""
        is_clip = isinstance(medium, DecodedClip)
        part = VideoPart(uri="s3://trial/noise") if is_clip else ImagePart(uri="s3://trial/noise")
        turns = (Turn(role=Role.USER, content=(part, TextPart(text="x"))),)
        conversation, shown = spread(turns, (medium,), keep_clips=is_clip)
        prompt = self._render_with(self._plain, conversation)
        tensors = self._process(self._plain, prompt, shown, {"videos_kwargs" if is_clip else "images_kwargs": asked})
        return ModelInputs(tensors, num_media_tokens=self._num_media_tokens(self._plain, prompt, tensors))

    def _asked(self, options: MediaOptions, shown: SpreadMedia) -> Mapping[str, Arguments]:
        """Return the processor's arguments for what is asked, per kind of media. Raises InvalidRequest."""
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
        for piece in filter(None, self._places.split(prompt)):
            num_words += len(tokenizer(piece, add_special_tokens=False)["input_ids"])
        return max(0, int(tensors["input_ids"].shape[1]) - num_words)

    def _can_take_fewer(self, num_media_tokens: int, shown: SpreadMedia) -> bool:
        """Tell whether fewer pixels would help, as far as that has been found out."""
        limits: PixelLimits | None = self.__dict__.get("limits")
        if limits is None or limits.least_tokens is None:
            return False
        if shown.clips:
            return limits.clips is not None and not isinstance(limits.clips, AsItIs)
        return num_media_tokens > len(shown.pictures) * limits.least_tokens

    def _keeps_clips(self, media: Sequence[DecodedMedia]) -> bool:
        """Whether clips are given as clips: all of a prompt's or none, so that the model sees them alike."""
        clips = [medium for medium in media if isinstance(medium, DecodedClip)]
        has_images, num_lengths = len(clips) < len(media), len({len(clip.frames) for clip in clips})
        can = self._capabilities
        if not can.native_video or not (can.can_mix_lengths or num_lengths <= 1):
            return False
        return not clips or not has_images or (can.can_mix_media and not self._share_places)

    @cached_property
    def _share_places(self) -> bool:
        """Whether pictures and clips, each in tensors of their own, stand for one and the same token.

        GLM-4V takes the frames of clips for pictures then, and its `generate` fails on a prompt with both.
        """
        noise = Image.fromarray(np.zeros((256, 256, 3), np.uint8))
        picture = self._encode(DecodedImage(noise), {}).tensors
        clip = self._encode(DecodedClip((noise,) * 4, (0.0, 1.0, 2.0, 3.0), 4.0, 1.0), {}).tensors
        if picture.keys() >= clip.keys():
            return False
        # Of one medium and one letter of text, the placeholder is the token that comes most often.
        places = [int(tensors["input_ids"].flatten().mode().values) for tensors in (picture, clip)]
        return places[0] == places[1]

    def _render(self, conversation: Conversation) -> tuple[ProcessorMixin, str]:
        """Return a prompt whose control tokens are the template's alone, and the processor that reads it.

        A literal may also arise where two pieces of text meet; then the pieces are fenced off by marks.
        """
        expected = self._expected(_shape(conversation))
        if not any(self._control.occur_in(text) for text in conversation.texts):
            prompt = self._render_with(self._plain, conversation)
            if self._control.count_in(prompt) == expected:
                return self._plain, prompt
        escapes: tuple[Callable[[str], str], ...] = (self._control.mark, self._fence)
        for escape in escapes:
            prompt = self._render_with(self._marked, conversation.with_texts(escape))
            if self._control.count_in(prompt) == expected:
                return self._marked, prompt
        raise InvalidRequest("messages: the text cannot be told apart from the model's control tokens")

    def _render_with(self, processor: ProcessorMixin, conversation: Conversation) -> str:
        can = self._capabilities
        return render(processor, conversation, template=can.given_template, takes_parts=can.takes_parts)

    def _fence(self, text: str) -> str:
        return f"{MARK}{self._control.mark(text)}{MARK}"

    def _count_of_shape(self, shape: Conversation) -> Counter[str]:
        """Count the template's own control tokens, and see that every image and clip has its place."""
        counts = self._control.count_in(self._render_with(self._plain, shape))
        tokens = {Slot.IMAGE: self._capabilities.image_token, Slot.VIDEO: self._capabilities.video_token}
        for slot, token in tokens.items():
            if token is not None and counts[token] != shape.count(slot):
                raise InvalidRequest(
                    f"messages: the model's chat template shows {counts[token]} of {shape.count(slot)} {slot.value}s"
                )
        return counts

    def _process(
        self, processor: ProcessorMixin, prompt: str, shown: SpreadMedia, asked: Mapping[str, Arguments]
    ) -> dict[str, Tensor]:
        """Run the processor as transformers' own chat path does: no second BOS, media nested per conversation."""
        options: dict[str, Any] = video_options(processor, shown.clips)
        # Copies: processors take out of them what they have read.
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
        """The last wall: the ids hold as many control tokens as the same conversation with harmless text."""
        harmless = self._process(self._plain, self._render_with(self._plain, _shape(conversation)), shown, asked)
        if self._processors.control_ids(tensors) != self._processors.control_ids(harmless):
            raise InvalidRequest("messages: the text cannot be told apart from the model's control tokens")


def _shape(conversation: Conversation) -> Conversation:
    """Return the conversation with harmless text in place of its own."""
    return conversation.with_texts(lambda text: "x" if text.strip() else text)
