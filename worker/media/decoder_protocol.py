"""The protocol between a worker and its decoder processes: length-prefixed JSON messages, and pixels as raw bytes.

The worker sends tasks. A decoder sends `Ready` once, then for each task headers of pictures, each followed by its
pixels, and one final reply. The worker validates every message, because a decoder may have been taken over by what it
decodes.
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
#: More than the timestamps of the most frames that a job may ask for.
MAX_MESSAGE_BYTES: Final = 1024 * 1024
#: RGB.
PIXEL_BYTES: Final = 3
MAX_MESSAGE_CHARS: Final = 500


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
    """The decoder has loaded everything and entered its sandbox."""

    type: Literal["ready"] = "ready"


class PictureHeader(_Message):
    """The next picture; width × height × `PIXEL_BYTES` bytes follow, rows from the top."""

    type: Literal["picture"] = "picture"
    width: int = Field(ge=1)
    height: int = Field(ge=1)


class Restarted(_Message):
    """The clip turned out shorter than its index: its pictures so far are void and are sent again."""

    type: Literal["restarted"] = "restarted"


class Decoded(_Message):
    """All pictures are sent. The rest describes a clip and is empty for an image."""

    type: Literal["decoded"] = "decoded"
    timestamps_s: tuple[float, ...] = ()
    duration_s: float = 0.0
    fps: float = 0.0


class Refused(_Message):
    """The file cannot be decoded; code and message are the producer's."""

    type: Literal["refused"] = "refused"
    code: ErrorCode
    message: str = Field(max_length=MAX_MESSAGE_CHARS)


class MemoryExhausted(_Message):
    """Decoding needs more memory than the decoder may use."""

    type: Literal["memory_exhausted"] = "memory_exhausted"


class Broken(_Message):
    """The decoder's own code failed: a bug, not a fault of the file."""

    type: Literal["broken"] = "broken"
    message: str = Field(max_length=MAX_MESSAGE_CHARS)


Reply = Annotated[
    Ready | PictureHeader | Restarted | Decoded | Refused | MemoryExhausted | Broken, Field(discriminator="type")
]
_REPLY: Final[TypeAdapter[Reply]] = TypeAdapter(Reply)


def encode(message: _Message) -> bytes:
    """Return a message as bytes, with its length prefix."""
    body = message.model_dump_json().encode()
    return PREFIX.pack(len(body)) + body


def read_task(body: bytes) -> DecodeTask:
    """Parse a task without its prefix."""
    return DecodeTask.model_validate_json(body)


def read_reply(body: bytes) -> Reply:
    """Parse a reply without its prefix. Raises ValueError for anything else."""
    return _REPLY.validate_json(body)
