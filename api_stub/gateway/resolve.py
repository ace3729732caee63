"""Turns the sources of a draft into S3 objects that are still to be stored: reads data URLs and files, fetches http(s).

Keys are made of the tenant and of the content, so the same request again names the same objects. What is fetched has a
placeholder until its content is known: the job is checked first, and nothing is fetched for one that is refused.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import io
import logging
import mimetypes
import re
import tempfile
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, BinaryIO, Final, TypeVar, cast

from anyio import to_thread
from starlette.types import Receive

from api_stub.contract.job import FinetuneJob, Job
from api_stub.contract.media import S3Object
from api_stub.errors import StoreUnavailable
from api_stub.gateway.drafts import Attached, Inline, Remote, Unstored
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.problems import Problem, invalid, wrong_field
from api_stub.gateway.remote_media import Allowance, FetchRefused
from api_stub.storage import UPLOAD_PREFIX

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: Fetches of one request at a time.
MAX_AT_ONCE: Final = 4
_DATA_URL: Final = re.compile(r"data:(?P<type>(?:image|video)/[A-Za-z0-9][A-Za-z0-9.+-]{0,63});base64,", re.IGNORECASE)
_CONTENT_TYPE: Final = re.compile(r"(image|video)/[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", re.IGNORECASE)
_CHUNK: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class NewObject:
    """An object that must be stored before its job. `content` stands at its beginning."""

    uri: str
    content: BinaryIO
    content_type: str


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a tenant's media go that come with a request."""

    bucket: str
    tenant: str

    def named(self, content: BinaryIO, content_type: str) -> NewObject:
        """Name an object after its content. Blocks: reads all of it."""
        digest = hashlib.sha256()
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
        content.seek(0)
        suffix = mimetypes.guess_extension(content_type) or ""
        return NewObject(self._uri(f"{digest.hexdigest()}{suffix}"), content, content_type)

    def placeholder(self, number: int) -> str:
        """Return a URI, no shorter than a real one, for media whose content is not known yet."""
        return self._uri(f"{number:064x}.unknown")

    def _uri(self, name: str) -> str:
        folder = hashlib.sha256(self.tenant.encode(errors="surrogatepass")).hexdigest()[:16]
        return S3Object(self.bucket, f"{UPLOAD_PREFIX}inline/{folder}/{name}").uri


def read_local(sources: Iterable[Unstored], where: Destination) -> dict[Unstored, NewObject]:
    """Name the media that came with the request; Remote ones are passed over.

    Raises Problem for what is no image or clip or cannot be read. Blocks: decodes and hashes all of it.
    """
    found: dict[Unstored, NewObject] = {}
    for source in sources:
        if isinstance(source, Inline):
            found[source] = _of_data_url(source, where)
        elif isinstance(source, Attached):
            found[source] = _of_file(source, where)
    return found


def _of_data_url(source: Inline, where: Destination) -> NewObject:
    head = _DATA_URL.match(source.url)
    if head is None:
        raise invalid(source.place, "a data URL must begin with data:image/…;base64, or data:video/…;base64,")
    try:
        content = base64.b64decode(source.url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(source.place, "the data URL's base64 cannot be read") from error
    if not content:
        raise invalid(source.place, "the data URL is empty")
    return where.named(io.BytesIO(content), head["type"].lower())


def _of_file(source: Attached, where: Destination) -> NewObject:
    content_type = (source.file.content_type or "").partition(";")[0].strip()
    if not _CONTENT_TYPE.fullmatch(content_type):
        raise invalid(source.place, "a file of the form needs a Content-Type of image/… or video/…")
    return where.named(source.file.file, content_type.lower())


def with_uris(job: Job, uris: Mapping[str, str]) -> Job:
    """Return a checked job with other URIs, of our own making, in its messages."""
    if isinstance(job, FinetuneJob) or not uris or job.messages is None:
        return job
    messages = tuple(
        message.model_copy(
            update={
                "content": tuple(
                    part if part.type == "text" else part.model_copy(update={"uri": uris.get(part.uri, part.uri)})
                    for part in message.content
                )
            }
        )
        for message in job.messages
    )
    return job.model_copy(update={"messages": messages})


@asynccontextmanager
async def fetched(
    gateway: Gateway, sources: Sequence[Remote], where: Destination, receive: Receive | None
) -> AsyncGenerator[Sequence[NewObject], None]:
    """Yield what `sources` lead to, in order, in files that are open until the block ends.

    A client that disconnects meanwhile ends the fetches; `receive` gives what it sends after its body. Raises Problem,
    StoreUnavailable.
    """
    with ExitStack() as files:
        work = _all_fetched(gateway, sources, where, files)
        yield await (work if receive is None or not sources else _unless_left(receive, work))


async def _all_fetched(
    gateway: Gateway, sources: Sequence[Remote], where: Destination, files: ExitStack
) -> Sequence[NewObject]:
    """Fetch all, a few at a time; the first that fails ends the others."""
    allowance, turns = Allowance(gateway.remote.rules), asyncio.Semaphore(MAX_AT_ONCE)

    async def one(source: Remote) -> NewObject:
        async with turns:
            return await _fetch(gateway, source, where, _opened(files), allowance)

    tasks = [asyncio.create_task(one(source)) for source in sources]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _ended(*tasks)


async def _fetch(
    gateway: Gateway, source: Remote, where: Destination, file: BinaryIO, allowance: Allowance
) -> NewObject:
    begun = time.monotonic()
    facts = {"action": "fetch", "host": source.address.host}
    try:
        content_type = await gateway.remote.fetch(source.address, source.kind, file, allowance)
    except FetchRefused as error:
        logger.info("media not fetched", extra=facts | {"code": error.code, "reason": str(error)})
        raise wrong_field(error.status, error.code, source.place, f"{source.address.origin}: {error}") from error
    logger.info("media fetched", extra=facts | {"num_bytes": file.tell(), "duration_s": _since(begun)})
    file.seek(0)
    return await to_thread.run_sync(where.named, file, content_type)


def _opened(files: ExitStack) -> BinaryIO:
    try:
        return cast("BinaryIO", files.enter_context(tempfile.TemporaryFile()))
    except OSError as error:
        raise StoreUnavailable("the gateway has no room on its disk") from error


async def _unless_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do work, but no longer than the client stays. Raises Problem when it has left."""
    task, watch = asyncio.create_task(work), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Problem(HTTPStatus.BAD_REQUEST, "client_closed_request", "the client has left")
        return task.result()
    finally:
        await _ended(task, watch)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 4)
