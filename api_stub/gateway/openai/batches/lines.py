"""The lines of a batch: its input, one JSON object each, read piece by piece, and its answers, written in segments.

A segment is a small object in S3; all of them are put together into one file in the end.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, Literal, NoReturn, cast

from anyio import to_thread
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from api_stub.contract.error import explain
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.openai.files import CONTENT_TYPE, FileRecord, content
from api_stub.gateway.openai.shapes import BatchError
from api_stub.gateway.problems import Problem, invalid
from api_stub.storage import Storage

MAX_LINES: Final = 50_000
#: JSON above this size is parsed in a thread, so that it stops nobody else.
_LARGE: Final = 64 * 1024

_NAMESPACE: Final = uuid.UUID("1f0c9b5e-2f38-4d0e-9e15-7b8f4f2f6c44")
#: A segment ends with the line that reaches one of these.
SEGMENT_LINES: Final = 256
SEGMENT_BYTES: Final = 4 * 1024 * 1024
_WHOLE: Final = 1 << 32


class BatchRefused(Exception):
    """Raised when a batch as a whole cannot be done."""

    def __init__(self, error: BatchError) -> None:
        super().__init__(error.message)
        self.error = error


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank. `number` counts from 1; `end`: bytes of the input up to the next line."""

    number: int
    end: int
    raw: bytes


class BatchLine(BaseModel):
    """What a line asks."""

    model_config = ConfigDict(frozen=True, strict=True, hide_input_in_errors=True)

    custom_id: str = Field(min_length=1, max_length=512)
    method: Literal["POST"]
    url: Literal["/v1/chat/completions"]
    body: dict[str, object]


class BatchLineError(BaseModel):
    """Why a line was not tried to its end."""

    code: str
    message: str


class BatchLineResponse(BaseModel):
    """What a request of its own would have been answered."""

    status_code: int
    request_id: str
    body: Any


class BatchLineAnswer(BaseModel):
    """A line of an output or error file."""

    id: str
    custom_id: str | None
    response: BatchLineResponse | None = None
    error: BatchLineError | None = None

    def encoded(self) -> bytes:
        """The line with its end."""
        return self.model_dump_json().encode() + b"\n"


async def lines_of(
    gateway: Gateway, record: FileRecord, number: int = 0, offset: int = 0
) -> AsyncGenerator[Line, None]:
    """Read a file's lines after line `number`, which ends at `offset`. Raises BatchRefused (a line is too long)."""
    limit = gateway.settings.api_max_body_bytes
    rest = b""
    async with aclosing(content(gateway, record, offset)) as pieces:
        async for piece in pieces:
            *whole, rest = (rest + piece).split(b"\n")
            for raw in whole:
                number, offset = number + 1, offset + len(raw) + 1
                if raw.strip():
                    yield Line(number, offset, raw)
            if len(rest) > limit:
                message = f"longer than {limit} bytes"
                raise BatchRefused(BatchError(code="line_too_long", message=message, line=number + 1))
    if rest.strip():
        yield Line(number + 1, offset + len(rest), rest)


async def count_lines(gateway: Gateway, record: FileRecord) -> int:
    """Look through the whole input. Raises BatchRefused: nothing in it, too many lines, a custom_id twice."""
    num_lines = 0
    seen: set[bytes] = set()
    async with aclosing(lines_of(gateway, record)) as lines:
        async for line in lines:
            num_lines += 1
            if num_lines > MAX_LINES:
                message = f"more than {MAX_LINES} lines"
                raise BatchRefused(BatchError(code="too_many_lines", message=message, line=line.number))
            name = await custom_id_of(line)
            if name is None:
                continue
            digest = hashlib.sha256(name.encode()).digest()[:16]
            if digest in seen:
                message = f"the custom_id {name[:80]!r} was used before"
                error = BatchError(code="duplicate_custom_id", message=message, line=line.number, param="custom_id")
                raise BatchRefused(error)
            seen.add(digest)
    if not num_lines:
        raise BatchRefused(BatchError(code="empty_file", message="the input has no lines"))
    return num_lines


async def custom_id_of(line: Line) -> str | None:
    """Return what a line calls itself; None when that cannot be told."""
    try:
        found = await _loaded(line.raw)
    except ValueError:
        return None
    name = found.get("custom_id") if isinstance(found, dict) else None
    return name if isinstance(name, str) and is_text(name) else None


def is_text(value: str) -> bool:
    """Tell whether a string has a form in UTF-8: JSON may escape half of a character, and no answer can hold that."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


async def parse_line(line: Line) -> BatchLine:
    """Read a line. Raises Problem that says what is wrong."""
    try:
        return BatchLine.model_validate(await _loaded(line.raw))
    except ValidationError as error:
        raise invalid(f"line {line.number}", explain(error)) from error
    except ValueError as error:
        raise Problem(invalid("", "").status, "invalid_json_line", f"line {line.number}: not JSON") from error


def request_id(batch_id: str, number: int) -> str:
    """Return the id of the job of line `number`: the same one whoever works on the batch, however often."""
    return str(uuid.uuid5(_NAMESPACE, f"{batch_id}\0{number}"))


async def _loaded(raw: bytes) -> Any:
    return _parsed(raw) if len(raw) <= _LARGE else await to_thread.run_sync(_parsed, raw)


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


class Joined(io.RawIOBase):
    """Segments as one file to read, one of them in memory at a time. Blocks."""

    def __init__(self, storage: Storage, uris: Sequence[str]) -> None:
        self._storage, self._left = storage, list(uris)
        self._open: io.BytesIO = io.BytesIO()
        self.num_bytes = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Read exactly `size` bytes, less at the end, all for -1."""
        pieces: list[bytes] = []
        wanted = size if size >= 0 else _WHOLE
        while wanted > 0:
            piece = self._open.read(wanted)
            if piece:
                pieces.append(piece)
                wanted -= len(piece)
            elif self._left:
                self._open = io.BytesIO(self._storage.read(self._left.pop(0), 0, _WHOLE))
            else:
                break
        read = b"".join(pieces)
        self.num_bytes += len(read)
        return read


async def put_segment(gateway: Gateway, uri: str, lines: Sequence[bytes]) -> None:
    """Store one segment."""
    body = io.BytesIO(b"".join(lines))
    await gateway.in_storage(lambda: gateway.storage.put(uri, body, CONTENT_TYPE))


async def join(gateway: Gateway, uris: Sequence[str], target: str) -> int:
    """Store all segments as one object, by a multipart upload, and return its size."""
    joined = Joined(gateway.storage, uris)
    await gateway.in_storage(lambda: gateway.storage.put(target, cast("BinaryIO", joined), CONTENT_TYPE))
    return joined.num_bytes


async def delete_segments(gateway: Gateway, uris: Sequence[str]) -> None:
    """Delete segments that are not needed any more."""
    for uri in uris:
        await gateway.in_storage(lambda uri=uri: gateway.storage.delete(uri))  # type: ignore[misc]
