"""What a worker and its decoder processes say to each other: length-prefixed JSON, and pixels as plain bytes.

A task goes down. Up come a `Ready` once, then for each task pictures, each followed by its pixels, and one ending.
The worker believes none of it unchecked: whatever took over a decoder can only ever say one of these.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from api_stub.contract.error import ErrorCode
from worker.media.sniff import MediaKind
from worker.media.types import MediaPolicy

PREFIX: Final = struct.Struct("<I")
#: Longer than the times of as many frames as a job may ask for.
MAX_MESSAGE_BYTES: Final = 1024 * 1024
#: Red, green, blue.
PIXEL_BYTES: Final = 3
MAX_WORDS: Final = 500


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DecodeTask(_Message):
    """A file to decode, within `limit_s`. `num_frames` counts for clips only; the policy's buckets are not sent."""

    path: Path
    kind: MediaKind
    num_frames: int
    limit_s: float
    policy: MediaPolicy


class Ready(_Message):
    """The decoder has loaded everything and given up what it does not need."""

    type: Literal["ready"] = "ready"


class Picture(_Message):
    """The next picture; width × height × `PIXEL_BYTES` bytes follow, rows from the top."""

    type: Literal["picture"] = "picture"
    width: int = Field(ge=1)
    height: int = Field(ge=1)


class Again(_Message):
    """The clip turned out shorter than its index: forget the pictures so far."""

    type: Literal["again"] = "again"


class Decoded(_Message):
    """All pictures are sent. The rest describes a clip and is empty for an image."""

    type: Literal["decoded"] = "decoded"
    timestamps_s: tuple[float, ...] = ()
    duration_s: float = 0.0
    fps: float = 0.0


class Refused(_Message):
    """The file is not decoded, and why, as the producer may read it."""

    type: Literal["refused"] = "refused"
    code: ErrorCode
    words: str = Field(max_length=MAX_WORDS)


class OutOfRoom(_Message):
    """Decoding needs more memory than the decoder may have."""

    type: Literal["out_of_room"] = "out_of_room"


class Broken(_Message):
    """The decoder's own code failed; a defect of ours, not of the file."""

    type: Literal["broken"] = "broken"
    words: str = Field(max_length=MAX_WORDS)


Reply = Annotated[Ready | Picture | Again | Decoded | Refused | OutOfRoom | Broken, Field(discriminator="type")]
_REPLY: Final[TypeAdapter[Reply]] = TypeAdapter(Reply)


def packed(message: _Message) -> bytes:
    """Return a message as it travels."""
    body = message.model_dump_json().encode()
    return PREFIX.pack(len(body)) + body


def read_task(body: bytes) -> DecodeTask:
    """Parse a task without its prefix."""
    return DecodeTask.model_validate_json(body)


def read_reply(body: bytes) -> Reply:
    """Parse a reply without its prefix. Raises ValueError for anything that is none."""
    return _REPLY.validate_json(body)
