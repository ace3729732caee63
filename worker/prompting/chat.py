"""Turns and decoded media as a conversation, and the prompt that the processor's own chat template makes of it.

In: contract turns with their media. Out: a `Conversation` and rendered prompts. Knows no tokens and no tensors.
User text is data to the template, never template source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from jinja2 import TemplateError
from PIL import Image
from transformers import ProcessorMixin

from api_stub.contract.conversation import Role, TextPart, Turn
from worker.errors import InvalidRequest
from worker.media.types import DecodedClip, DecodedMedia


class Slot(Enum):
    """A place in a turn where something other than text stands."""

    IMAGE = "image"
    VIDEO = "video"


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One turn: who speaks, and texts and places of media in order."""

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

    def count(self, slot: Slot) -> int:
        """Return the number of such places in all turns."""
        return sum(part is slot for turn in self.turns for part in turn.parts)

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
    """What stands at a conversation's places, per kind in order: pictures (stills, frames) and whole clips.

    num_images, num_frames: stills, and frames of clips in either form.
    """

    pictures: tuple[Image.Image, ...]
    clips: tuple[DecodedClip, ...]
    num_images: int
    num_frames: int


def spread(
    turns: Sequence[Turn], media: Sequence[DecodedMedia], *, keep_clips: bool = False
) -> tuple[Conversation, SpreadMedia]:
    """Put every medium at its part's place; a clip stays whole or becomes one image place per frame, in time order.

    `media` has one entry per part that is not text, in the order of the parts; otherwise ValueError.
    """
    num_parts = sum(not isinstance(part, TextPart) for turn in turns for part in turn.content)
    if num_parts != len(media):
        raise ValueError(f"{len(media)} media for {num_parts} parts")
    waiting = iter(media)
    conversation = Conversation(tuple(_chat_turn(turn, waiting, keep_clips=keep_clips) for turn in turns))
    clips = tuple(medium for medium in media if isinstance(medium, DecodedClip))
    return conversation, SpreadMedia(
        pictures=tuple(picture for medium in media for picture in _pictures(medium, keep_clips=keep_clips)),
        clips=clips if keep_clips else (),
        num_images=len(media) - len(clips),
        num_frames=sum(len(clip.frames) for clip in clips),
    )


def _chat_turn(turn: Turn, waiting: Iterator[DecodedMedia], *, keep_clips: bool) -> ChatTurn:
    parts: list[str | Slot] = []
    for part in turn.content:
        if isinstance(part, TextPart):
            parts.append(part.text)
        else:
            parts.extend(_places(next(waiting), keep_clips=keep_clips))
    return ChatTurn(turn.role, tuple(parts))


def _places(medium: DecodedMedia, *, keep_clips: bool) -> tuple[Slot, ...]:
    if isinstance(medium, DecodedClip) and keep_clips:
        return (Slot.VIDEO,)
    return (Slot.IMAGE,) * len(_pictures(medium, keep_clips=keep_clips))


def _pictures(medium: DecodedMedia, *, keep_clips: bool) -> tuple[Image.Image, ...]:
    if isinstance(medium, DecodedClip):
        return () if keep_clips else medium.frames
    return (medium.pixels,)


def render(
    processor: ProcessorMixin, conversation: Conversation, *, template: str | None = None, takes_parts: bool = True
) -> str:
    """Return the prompt: ending with the assistant's cue, or inside its last turn when that is to be continued.

    template: instead of the processor's own. takes_parts: as in `Capabilities`; without it media are a ValueError.
    Raises InvalidRequest, with the template's words when it refuses the conversation on purpose.
    """
    try:
        return str(
            processor.apply_chat_template(
                _messages(conversation) if takes_parts else _plain_messages(conversation),
                chat_template=template,
                add_generation_prompt=not conversation.is_continuation,
                continue_final_message=conversation.is_continuation,
            )
        )
    except TemplateError as error:
        raise InvalidRequest(f"messages: the model's chat template refuses them: {error}") from error
    except Exception as error:  # a template is a program: it may raise whatever it likes
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


def _plain_messages(conversation: Conversation) -> list[dict[str, object]]:
    if conversation.count(Slot.IMAGE) + conversation.count(Slot.VIDEO):
        raise ValueError("plain text has no place for media")
    texts = [[part for part in turn.parts if isinstance(part, str)] for turn in conversation.turns]
    return [
        {"role": turn.role.value, "content": "".join(parts)}
        for turn, parts in zip(conversation.turns, texts, strict=True)
    ]
