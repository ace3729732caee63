"""Makes the model's tensors out of a conversation: template, then the family's own unmodified processor.

In: turns and decoded media. Out: `ModelInputs` on the CPU. Text without literal control tokens takes exactly the
ordinary path of `processor.apply_chat_template(..., tokenize=True)`; text with them is marked first (see literals).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from api_stub.contract.job import Turn
from worker.errors import InvalidRequest
from worker.media.types import DecodedMedia
from worker.models.inputs import ModelInputs
from worker.models.loader import LoadedModel
from worker.prompting.chat import Conversation, SpreadMedia, render, spread
from worker.prompting.literals import MARK, ControlTokens, literal_tokenizer

#: Training targets; a forward that sees them computes a loss.
_NOT_FOR_INFERENCE = ("labels",)
_SHAPES_REMEMBERED = 512


class PromptBuilder:
    """Prepares prompts for one loaded model. Called from many threads at once; nothing changes after construction.

    Two processors are kept: the loaded one, and a copy whose tokenizer drops the marks inside literals.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._capabilities = loaded.capabilities
        self._dtype = loaded.dtype
        self._plain = loaded.processor
        self._marked = copy.copy(loaded.processor)
        self._marked.tokenizer = literal_tokenizer(loaded.tokenizer)
        self._control = ControlTokens(loaded.tokenizer)
        self._bos_token: str | None = loaded.tokenizer.bos_token
        self._expected = lru_cache(maxsize=_SHAPES_REMEMBERED)(self._count_of_shape)
        for processor in (self._plain, self._marked):
            # The first call settles the tokenizer's truncation and padding; changing them under other threads fails.
            processor.tokenizer("", return_tensors=None)

    def prepare(self, turns: Sequence[Turn], media: Sequence[DecodedMedia]) -> ModelInputs:
        """Return the prompt's tensors. `media` are in the order of the parts that are not text.

        Raises InvalidRequest when the model cannot be asked this, or the template or the processor refuses it.
        """
        conversation, pictures = spread(turns, media)
        self._check_possible(conversation)
        processor, prompt = self._render(conversation)
        encoded = self._process(processor, prompt, pictures)
        if processor is self._marked:
            self._check_control_tokens(encoded, conversation, pictures)
        return ModelInputs(
            tensors={name: self._cast(value) for name, value in encoded.items()},
            num_images=pictures.num_images,
            num_frames=pictures.num_frames,
            is_continuation=conversation.is_continuation,
        )

    def _check_possible(self, conversation: Conversation) -> None:
        if not self._capabilities.has_chat_template:
            raise InvalidRequest("messages: this model has no chat template, so it takes no text")
        if conversation.num_images and self._capabilities.image_token is None:
            raise InvalidRequest(f"media: this model's chat template shows no images, got {conversation.num_images}")

    def _render(self, conversation: Conversation) -> tuple[ProcessorMixin, str]:
        """Return a prompt whose control tokens are the template's alone, and the processor that reads it.

        A literal may also arise where two pieces of text meet; then the pieces are fenced off by marks.
        """
        expected = self._expected(_shape(conversation))
        if not any(self._control.occur_in(text) for text in conversation.texts):
            prompt = render(self._plain, conversation)
            if self._control.count_in(prompt) == expected:
                return self._plain, prompt
        escapes: tuple[Callable[[str], str], ...] = (self._control.mark, self._fence)
        for escape in escapes:
            prompt = render(self._marked, conversation.with_texts(escape))
            if self._control.count_in(prompt) == expected:
                return self._marked, prompt
        raise InvalidRequest("messages: the text cannot be told apart from the model's control tokens")

    def _fence(self, text: str) -> str:
        return f"{MARK}{self._control.mark(text)}{MARK}"

    def _count_of_shape(self, shape: Conversation) -> Counter[str]:
        """Count the template's own control tokens, and see that every image has its place."""
        counts = self._control.count_in(render(self._plain, shape))
        image_token = self._capabilities.image_token
        if image_token is not None and counts[image_token] != shape.num_images:
            raise InvalidRequest(
                f"messages: the model's chat template shows {counts[image_token]} of {shape.num_images} images"
            )
        return counts

    def _process(self, processor: ProcessorMixin, prompt: str, pictures: SpreadMedia) -> dict[str, Tensor]:
        """Run the processor as transformers' own chat path does: no second BOS, images nested per conversation."""
        options: dict[str, Any] = {}
        if self._bos_token is not None and prompt.startswith(self._bos_token):
            options["add_special_tokens"] = False
        images = [list(pictures.pictures)] if pictures.pictures else None
        try:
            encoded = processor(text=prompt, images=images, return_tensors="pt", **options)
        except ValueError as error:
            raise InvalidRequest(f"messages: the model's processor refuses them: {error}") from error
        return {
            name: value
            for name, value in encoded.items()
            if isinstance(value, Tensor) and name not in _NOT_FOR_INFERENCE
        }

    def _check_control_tokens(
        self, encoded: dict[str, Tensor], conversation: Conversation, pictures: SpreadMedia
    ) -> None:
        """The last wall: the ids hold as many control tokens as the same conversation with harmless text."""
        harmless = self._process(self._plain, render(self._plain, _shape(conversation)), pictures)
        if self._control_ids(encoded) != self._control_ids(harmless):
            raise InvalidRequest("messages: the text cannot be told apart from the model's control tokens")

    def _control_ids(self, encoded: dict[str, Tensor]) -> Counter[int]:
        return Counter(token for token in encoded["input_ids"][0].tolist() if token in self._control.ids)

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self._dtype) if torch.is_floating_point(value) else value


def _shape(conversation: Conversation) -> Conversation:
    """Return the conversation with harmless text in place of its own."""
    return conversation.with_texts(lambda text: "x" if text.strip() else text)
