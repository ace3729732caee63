"""Prompts of models with a chat template: template, then the family's own unmodified processor.

In: turns and decoded media. Out: tensors on the CPU. Text without literal control tokens takes exactly the
ordinary path of `processor.apply_chat_template(..., tokenize=True)`; text with them is marked first (see literals).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

from torch import Tensor
from transformers import ProcessorMixin

from api_stub.contract.conversation import Turn
from worker.errors import InvalidRequest
from worker.media.types import DecodedClip, DecodedMedia
from worker.models.capabilities import Capabilities
from worker.models.inputs import ModelInputs
from worker.prompting.chat import Conversation, Slot, SpreadMedia, render, spread
from worker.prompting.clips import video_options
from worker.prompting.literals import MARK
from worker.prompting.processors import Processors, tensors_of

_SHAPES_REMEMBERED = 512


class TemplatedPrompts:
    """Prepares prompts with one model's chat template. Called from many threads at once."""

    def __init__(self, processors: Processors, capabilities: Capabilities, bos_token: str | None) -> None:
        self._processors = processors
        self._plain, self._marked, self._control = processors.plain, processors.marked, processors.control
        self._capabilities = capabilities
        self._bos_token = bos_token
        self._expected = lru_cache(maxsize=_SHAPES_REMEMBERED)(self._count_of_shape)

    def prepare(self, turns: Sequence[Turn], media: Sequence[DecodedMedia]) -> ModelInputs:
        """Return the prompt's tensors. `media` are in the order of the parts that are not text.

        Raises InvalidRequest when the model cannot be asked this, or the template or the processor refuses it.
        """
        conversation, shown = spread(turns, media, keep_clips=self._keeps_clips(media))
        num_images = conversation.count(Slot.IMAGE)
        if num_images and self._capabilities.image_token is None:
            raise InvalidRequest(f"media: this model's chat template shows no images, got {num_images}")
        processor, prompt = self._render(conversation)
        tensors = self._process(processor, prompt, shown)
        if processor is self._marked:
            self._check_control_tokens(tensors, conversation, shown)
        return ModelInputs(
            tensors=tensors,
            num_images=shown.num_images,
            num_frames=shown.num_frames,
            is_continuation=conversation.is_continuation,
        )

    def _keeps_clips(self, media: Sequence[DecodedMedia]) -> bool:
        """Whether clips are given as clips: all of a prompt's or none, so that the model sees them alike."""
        clips = [medium for medium in media if isinstance(medium, DecodedClip)]
        has_images, num_lengths = len(clips) < len(media), len({len(clip.frames) for clip in clips})
        can = self._capabilities
        return can.native_video and (can.can_mix_media or not has_images) and (can.can_mix_lengths or num_lengths <= 1)

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

    def _process(self, processor: ProcessorMixin, prompt: str, shown: SpreadMedia) -> dict[str, Tensor]:
        """Run the processor as transformers' own chat path does: no second BOS, media nested per conversation."""
        options = video_options(processor, shown.clips)
        if self._bos_token is not None and prompt.startswith(self._bos_token):
            options["add_special_tokens"] = False
        images = [list(shown.pictures)] if shown.pictures else None
        try:
            encoded = processor(text=prompt, images=images, return_tensors="pt", **options)
        except ValueError as error:
            raise InvalidRequest(f"messages: the model's processor refuses them: {error}") from error
        return tensors_of(encoded)

    def _check_control_tokens(self, tensors: dict[str, Tensor], conversation: Conversation, shown: SpreadMedia) -> None:
        """The last wall: the ids hold as many control tokens as the same conversation with harmless text."""
        harmless = self._process(self._plain, self._render_with(self._plain, _shape(conversation)), shown)
        if self._processors.control_ids(tensors) != self._processors.control_ids(harmless):
            raise InvalidRequest("messages: the text cannot be told apart from the model's control tokens")


def _shape(conversation: Conversation) -> Conversation:
    """Return the conversation with harmless text in place of its own."""
    return conversation.with_texts(lambda text: "x" if text.strip() else text)
