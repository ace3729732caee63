"""Files of batches: the bytes are in S3, what they are called and whose they are is in Redis."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, BinaryIO, Final, Literal

import redis.asyncio

from api_stub.contract import names
from api_stub.contract.media import S3Object
from api_stub.contract.wire import WireModel
from api_stub.errors import StorageRefused
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.keys import Caller
from api_stub.gateway.openai.shapes import FileObject
from api_stub.gateway.problems import Problem, invalid

#: After this time a file's record is gone; its object is left to the bucket's own rules.
FILE_TTL_S: Final = 30 * 86_400
FILE_PREFIX: Final = names.PREFIX + "gateway:file:"
CONTENT_TYPE: Final = "application/jsonl"
OBJECT_PREFIX: Final = "files/"
CHUNK_BYTES: Final = 256 * 1024


class FileRecord(WireModel):
    """One file."""

    id: str
    tenant: str
    uri: str
    num_bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]

    @property
    def public(self) -> FileObject:
        """What the API shows of it."""
        return FileObject(
            id=self.id,
            bytes=self.num_bytes,
            created_at=self.created_at,
            expires_at=self.created_at + FILE_TTL_S,
            filename=self.filename,
            purpose=self.purpose,
        )


@dataclass(frozen=True, slots=True)
class Page:
    """Ids, newest first, and whether there are more."""

    ids: list[str]
    has_more: bool


def files_key(tenant: str) -> str:
    """ZSET file id -> time of its creation: a tenant's files."""
    return f"{names.PREFIX}gateway:files:{tenant}"


def new_object(gateway: Gateway, tenant: str, name: str) -> str:
    """Return the address of an object of a tenant's files."""
    folder = hashlib.sha256(tenant.encode()).hexdigest()[:16]
    return S3Object(gateway.settings.media_bucket, f"{OBJECT_PREFIX}{folder}/{name}").uri


async def store(gateway: Gateway, caller: Caller, content: BinaryIO, num_bytes: int, filename: str) -> FileRecord:
    """Store the input of a batch. Raises StorageRefused, StoreUnavailable."""
    file_id = f"file-{uuid.uuid4().hex}"
    record = FileRecord(
        id=file_id,
        tenant=caller.tenant,
        uri=new_object(gateway, caller.tenant, file_id),
        num_bytes=num_bytes,
        created_at=int(time.time()),
        filename=filename,
        purpose="batch",
    )
    await gateway.in_storage(lambda: gateway.storage.put(record.uri, content, CONTENT_TYPE))
    async with gateway.commands.pipeline(transaction=True) as step:
        step.set(FILE_PREFIX + file_id, record.to_json(), ex=FILE_TTL_S)
        step.zadd(files_key(caller.tenant), {file_id: record.created_at})
        step.expire(files_key(caller.tenant), FILE_TTL_S)
        await step.execute()
    return record


async def find(gateway: Gateway, caller: Caller, file_id: str) -> FileRecord:
    """Return a file that the caller may see. Raises Problem (404)."""
    record = await load(gateway, file_id)
    if record is None or not caller.sees(record.tenant):
        raise _not_found(file_id)
    return record


async def load(gateway: Gateway, file_id: str) -> FileRecord | None:
    """Return a file, whoever asks."""
    raw = await gateway.commands.get(FILE_PREFIX + file_id)
    return None if raw is None else FileRecord.model_validate_json(raw)


async def list_files(gateway: Gateway, caller: Caller, after: str | None, limit: int) -> tuple[list[FileRecord], bool]:
    """Return a page of the caller's files, newest first, and whether there are more. Raises Problem."""
    page = await page_of(gateway.commands, files_key(caller.tenant), after, limit)
    raws: list[Any] = await gateway.commands.mget([FILE_PREFIX + file_id for file_id in page.ids]) if page.ids else []
    return [FileRecord.model_validate_json(raw) for raw in raws if raw is not None], page.has_more


async def page_of(commands: redis.asyncio.Redis, key: str, after: str | None, limit: int) -> Page:
    """Read a page of an index, newest first, from the id `after` on. Raises Problem."""
    start = 0
    if after is not None:
        rank: Any = await commands.zrevrank(key, after)
        if rank is None:
            raise invalid("after", "not an id of this list")
        start = int(rank) + 1
    ids: list[Any] = await commands.zrevrange(key, start, start + limit)
    return Page([str(found) for found in ids[:limit]], len(ids) > limit)


async def delete(gateway: Gateway, record: FileRecord) -> None:
    """Delete a file."""
    await gateway.in_storage(lambda: gateway.storage.delete(record.uri))
    async with gateway.commands.pipeline(transaction=True) as step:
        step.delete(FILE_PREFIX + record.id)
        step.zrem(files_key(record.tenant), record.id)
        await step.execute()


async def opened(gateway: Gateway, record: FileRecord) -> AsyncGenerator[bytes, None]:
    """Return a file's bytes, the first of them read already: a response's status can tell that there are none.

    Raises Problem (404: the object is gone), StorageRefused, StoreUnavailable.
    """
    pieces = content(gateway, record)
    try:
        first = await anext(pieces, b"")
    except StorageRefused as error:
        if await gateway.in_storage(lambda: gateway.storage.head(record.uri)) is None:
            raise _not_found(record.id) from error
        raise
    return _chained(first, pieces)


async def content(gateway: Gateway, record: FileRecord, start: int = 0) -> AsyncGenerator[bytes, None]:
    """Read a file from a place on, piece by piece; no connection is kept between two pieces."""
    while start < record.num_bytes:
        at = start
        piece = await gateway.in_storage(lambda at=at: gateway.storage.read(record.uri, at, CHUNK_BYTES))  # type: ignore[misc]
        if not piece:
            return
        yield piece
        start += len(piece)


async def _chained(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield first
        async for piece in rest:
            yield piece


def _not_found(file_id: str) -> Problem:
    return Problem(HTTPStatus.NOT_FOUND, "file_not_found", f"no file {file_id[:80]!r}")
