"""What is said in a job: turns of text and media parts, as producers write them and as models read them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from api_stub.contract.media import MediaUri
from api_stub.contract.wire import WholeNumber, WireModel

MAX_FRAMES = 512

NumFrames = Annotated[WholeNumber, Field(ge=1, le=MAX_FRAMES)]


class TextPart(WireModel):
    """A piece of text inside a turn."""

    type: Literal["text"] = "text"
    text: str


class ImagePart(WireModel):
    """An image inside a turn, at the place where the model shall see it."""

    type: Literal["image"] = "image"
    uri: MediaUri


class VideoPart(WireModel):
    """A clip inside a turn; `num_frames` are sampled uniformly (the job's number when absent)."""

    type: Literal["video"] = "video"
    uri: MediaUri
    num_frames: NumFrames | None = None


ContentPart = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Role(StrEnum):
    """Who speaks in a turn."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


class Message(WireModel):
    """One turn of a conversation, as producers write it."""

    role: Role
    content: tuple[ContentPart, ...] = Field(min_length=1)


class MediaPart(WireModel):
    """A member of a job's `media` list: image or clip, told apart by the object's own bytes."""

    type: Literal["media"] = "media"
    uri: MediaUri


class Turn(WireModel):
    """One turn in the shape that all jobs share. Media from a `media` list are MediaPart."""

    role: Role
    content: tuple[TextPart | ImagePart | VideoPart | MediaPart, ...]


def check_messages(messages: tuple[Message, ...], max_media: int) -> None:
    """Raise ValueError, naming the turn, for a conversation that no model can be asked to go on with."""
    if not any(message.role is Role.USER for message in messages):
        raise ValueError("messages: at least one user turn is required")
    for index, message in enumerate(messages):
        if message.role is Role.SYSTEM and index:
            raise ValueError(f"messages.{index}: only the first turn may be the system's")
        if message.role is not Role.USER and any(part.type != "text" for part in message.content):
            raise ValueError(f"messages.{index}: media belong to user turns")
    if messages[-1].role is Role.SYSTEM:
        raise ValueError("messages: the last turn must be the user's or the assistant's")
    num_media = sum(part.type != "text" for message in messages for part in message.content)
    if num_media > max_media:
        raise ValueError(f"messages: {num_media} media parts, the limit is {max_media}")


def has_part(messages: tuple[Message, ...], kind: str) -> bool:
    """Tell whether a part of type `kind` stands anywhere in the messages."""
    return any(part.type == kind for message in messages for part in message.content)
