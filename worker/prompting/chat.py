"""Turns and decoded media as a conversation, and the prompt that the processor's own chat template makes of it.

In: contract turns with their media. Out: a `Conversation` and rendered prompts. Knows no tokens and no tensors.
User text is data to the template, never template source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from jinja2 import TemplateError
from PIL import Image
from transformers import ProcessorMixin

from api_stub.contract.job import Role, TextPart, Turn
from worker.errors import InvalidRequest
from worker.media.types import DecodedClip, DecodedMedia


class Slot(Enum):
    """A place in a turn where something other than text stands."""

    IMAGE = "image"


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One turn: who speaks, and texts and image places in order."""

    role: Role
    parts: tuple[str | Slot, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is said, without the pixels. Hashable."""

    turns: tuple[ChatTurn, ...]

    @property
    def is_continuation(self) -> bool:
        """Whether the model goes on with the last turn instead of answering it."""
        return self.turns[-1].role is Role.ASSISTANT

    @property
    def num_images(self) -> int:
        """Image places in all turns."""
        return sum(part is Slot.IMAGE for turn in self.turns for part in turn.parts)

    @property
    def texts(self) -> tuple[str, ...]:
        """Every piece of text, in order."""
        return tuple(part for turn in self.turns for part in turn.parts if isinstance(part, str))

    def with_texts(self, change: Callable[[str], str]) -> Conversation:
        """Return the conversation with `change` applied to every piece of text."""
        return Conversation(
            tuple(
                replace(turn, parts=tuple(change(part) if isinstance(part, str) else part for part in turn.parts))
                for turn in self.turns
            )
        )


@dataclass(frozen=True, slots=True)
class SpreadMedia:
    """All pictures of a conversation in the order of its image places, and how many of them are stills and frames."""

    pictures: tuple[Image.Image, ...]
    num_images: int
    num_frames: int


def spread(turns: Sequence[Turn], media: Sequence[DecodedMedia]) -> tuple[Conversation, SpreadMedia]:
    """Put every medium at its part's place; a clip becomes one image place per frame, in time order.

    `media` has one entry per part that is not text, in the order of the parts; otherwise ValueError.
    """
    waiting = iter(media)
    chat_turns: list[ChatTurn] = []
    pictures: list[Image.Image] = []
    num_frames = 0
    for turn in turns:
        parts: list[str | Slot] = []
        for part in turn.content:
            if isinstance(part, TextPart):
                parts.append(part.text)
                continue
            medium = next(waiting, None)
            if medium is None:
                raise ValueError(f"{len(media)} media for more parts than that")
            frames = medium.frames if isinstance(medium, DecodedClip) else (medium.pixels,)
            num_frames += len(frames) if isinstance(medium, DecodedClip) else 0
            pictures.extend(frames)
            parts.extend([Slot.IMAGE] * len(frames))
        chat_turns.append(ChatTurn(turn.role, tuple(parts)))
    if next(waiting, None) is not None:
        raise ValueError(f"{len(media)} media for fewer parts than that")
    return Conversation(tuple(chat_turns)), SpreadMedia(tuple(pictures), len(pictures) - num_frames, num_frames)


def render(processor: ProcessorMixin, conversation: Conversation) -> str:
    """Return the prompt: ending with the assistant's cue, or inside its last turn when that is to be continued.

    Raises InvalidRequest, with the template's words when it refuses the conversation on purpose.
    """
    try:
        return str(
            processor.apply_chat_template(
                _messages(conversation),
                add_generation_prompt=not conversation.is_continuation,
                continue_final_message=conversation.is_continuation,
            )
        )
    except TemplateError as error:
        raise InvalidRequest(f"messages: the model's chat template refuses them: {error}") from error
    except (ValueError, TypeError) as error:
        # transformers' own words would repeat the conversation.
        ending = ", the last turn continued" if conversation.is_continuation else ""
        raise InvalidRequest(f"messages: the model's chat template cannot render them{ending}") from error


def _messages(conversation: Conversation) -> list[dict[str, object]]:
    return [
        {
            "role": turn.role.value,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": part.value} for part in turn.parts
            ],
        }
        for turn in conversation.turns
    ]
