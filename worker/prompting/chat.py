"""Conversations with placeholders for media, and the prompts that a chat template renders of them.

In: contract turns with their media. Out: a `Conversation` and rendered prompts. Knows no tokens and no tensors. Users'
text is data for the template, never template source.
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


class Placeholder(Enum):
    """Stands for an image or a clip between the texts of a turn."""

    IMAGE = "image"
    VIDEO = "video"


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One turn: its role, and its texts and placeholders in order."""

    role: Role
    parts: tuple[str | Placeholder, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation without its pixels. Hashable."""

    turns: tuple[ChatTurn, ...]

    @property
    def is_continuation(self) -> bool:
        """Whether the model continues the last turn, an assistant's, instead of answering it."""
        return self.turns[-1].role is Role.ASSISTANT

    def count(self, placeholder: Placeholder) -> int:
        """Return the number of such placeholders in all turns."""
        return sum(part is placeholder for turn in self.turns for part in turn.parts)

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts, in order."""
        return tuple(part for turn in self.turns for part in turn.parts if isinstance(part, str))

    def with_texts(self, change: Callable[[str], str]) -> Conversation:
        """Return the conversation with `change` applied to every text."""
        return Conversation(
            tuple(
                replace(turn, parts=tuple(change(part) if isinstance(part, str) else part for part in turn.parts))
                for turn in self.turns
            )
        )


@dataclass(frozen=True, slots=True)
class SpreadMedia:
    """The media of a conversation's placeholders, per kind in order: pictures (stills and frames) and whole clips.

    num_images, num_frames: counts of stills, and of clips' frames in either form.
    """

    pictures: tuple[Image.Image, ...]
    clips: tuple[DecodedClip, ...]
    num_images: int
    num_frames: int


def spread(
    turns: Sequence[Turn], media: Sequence[DecodedMedia], *, keep_clips: bool = False
) -> tuple[Conversation, SpreadMedia]:
    """Replace every media part by a placeholder; without `keep_clips` a clip becomes one per frame, in time order.

    `media` has one entry per media part, in order; otherwise ValueError.
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
    parts: list[str | Placeholder] = []
    for part in turn.content:
        if isinstance(part, TextPart):
            parts.append(part.text)
        else:
            parts.extend(_placeholders(next(waiting), keep_clips=keep_clips))
    return ChatTurn(turn.role, tuple(parts))


def _placeholders(medium: DecodedMedia, *, keep_clips: bool) -> tuple[Placeholder, ...]:
    if isinstance(medium, DecodedClip) and keep_clips:
        return (Placeholder.VIDEO,)
    return (Placeholder.IMAGE,) * len(_pictures(medium, keep_clips=keep_clips))


def _pictures(medium: DecodedMedia, *, keep_clips: bool) -> tuple[Image.Image, ...]:
    if isinstance(medium, DecodedClip):
        return () if keep_clips else medium.frames
    return (medium.pixels,)


def render(
    processor: ProcessorMixin,
    conversation: Conversation,
    *,
    template: str | None = None,
    takes_parts: bool = True,
    is_complete: bool = False,
) -> str:
    """Return the prompt; it ends with the generation prompt, or inside an assistant's last turn that is to be
    continued.

    template: to use instead of the processor's own. takes_parts: as in `Capabilities`; if False, media are a
    ValueError. is_complete: nothing is to be written any more, the text ends with the last turn's end. Raises
    InvalidRequest, with the template's own message when it raises one.
    """
    try:
        return str(
            processor.apply_chat_template(
                _messages(conversation) if takes_parts else _plain_messages(conversation),
                chat_template=template,
                add_generation_prompt=not conversation.is_continuation and not is_complete,
                continue_final_message=conversation.is_continuation and not is_complete,
            )
        )
    except TemplateError as error:
        raise InvalidRequest(f"messages: the model's chat template refuses them: {error}") from error
    except Exception as error:  # a template is a program and may raise anything
        # The exception's own text may quote the conversation.
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
    if conversation.count(Placeholder.IMAGE) + conversation.count(Placeholder.VIDEO):
        raise ValueError("plain text has no place for media")
    texts = [[part for part in turn.parts if isinstance(part, str)] for turn in conversation.turns]
    return [
        {"role": turn.role.value, "content": "".join(parts)}
        for turn, parts in zip(conversation.turns, texts, strict=True)
    ]
