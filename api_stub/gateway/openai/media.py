"""The http(s) media of a chat: fetched before the job is handed in, and from there on like media that came inline."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, BinaryIO, Final, TypeVar, cast

from anyio import to_thread
from starlette.types import Receive

from api_stub.contract.media import S3Object
from api_stub.errors import StoreUnavailable
from api_stub.gateway.access import check_allowed
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.intake import JobForm
from api_stub.gateway.keys import Caller
from api_stub.gateway.media_hosts import MediaAddress, MediaHosts
from api_stub.gateway.openai.chat import listed_address
from api_stub.gateway.problems import Problem, wrong_field
from api_stub.gateway.remote_media import Allowance, FetchRefused, Kind
from api_stub.gateway.uploads import Destination, InlineMedia
from api_stub.submit import checked

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: Fetches of one request at a time.
MAX_AT_ONCE: Final = 4


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Media to fetch, and the field that first names them."""

    place: str
    kind: Kind
    address: MediaAddress


@asynccontextmanager
async def fetched_media(
    gateway: Gateway, caller: Caller, fields: dict[str, Any], receive: Receive
) -> AsyncGenerator[JobForm, None]:
    """Yield a chat's job, its http(s) media fetched into files that are open until the block ends.

    A client that disconnects meanwhile ends the fetches. The request's body must have been read. Raises Problem,
    InvalidRequest (before anything is fetched), StoreUnavailable.
    """
    wanted = _wanted(fields, gateway.media.rules.hosts)
    if not wanted:
        yield JobForm(fields)
        return
    stand_in = S3Object(gateway.settings.media_bucket, "stand-in").uri
    check_allowed(caller, checked(_with_uris(fields, lambda kind, uri: uri if uri.startswith("s3://") else stand_in)))
    with ExitStack() as files:
        found = await _unless_left(receive, _fetched(gateway, caller, wanted, files))
        uris = {key: media.uri for key, media in found.items()}
        yield JobForm(_with_uris(fields, lambda kind, uri: uris.get((kind, uri), uri)), inline=tuple(found.values()))


def _wanted(fields: dict[str, Any], hosts: MediaHosts) -> dict[tuple[Kind, str], _Wanted]:
    """Find what to fetch, each once. Raises Problem."""
    found: dict[tuple[Kind, str], _Wanted] = {}
    for place, kind, url in _media_of(fields):
        address = listed_address(hosts, url, place)
        if address is not None:
            found.setdefault((kind, url), _Wanted(place, kind, address))
    return found


def _media_of(fields: dict[str, Any]) -> Iterator[tuple[str, Kind, str]]:
    for at, message in enumerate(fields["messages"]):
        for i, part in enumerate(message["content"]):
            if part["type"] != "text":
                yield f"messages.{at}.content.{i}.{part['type']}_url.url", part["type"], part["uri"]


def _with_uris(fields: dict[str, Any], uri_of: Callable[[Kind, str], str]) -> dict[str, Any]:
    messages = [
        message
        | {
            "content": [
                part if part["type"] == "text" else part | {"uri": uri_of(part["type"], part["uri"])}
                for part in message["content"]
            ]
        }
        for message in fields["messages"]
    ]
    return fields | {"messages": messages}


async def _fetched(
    gateway: Gateway, caller: Caller, wanted: dict[tuple[Kind, str], _Wanted], files: ExitStack
) -> dict[tuple[Kind, str], InlineMedia]:
    """Fetch all, a few at a time; the first that fails ends the others."""
    allowance, room = Allowance(gateway.media.rules), asyncio.Semaphore(MAX_AT_ONCE)
    where = Destination(gateway.settings.media_bucket, caller.tenant)

    async def one(media: _Wanted) -> InlineMedia:
        async with room:
            return await _fetch(gateway, media, where, _opened(files), allowance)

    tasks = [asyncio.create_task(one(media)) for media in wanted.values()]
    try:
        return dict(zip(wanted, await asyncio.gather(*tasks), strict=True))
    finally:
        await _ended(*tasks)


async def _fetch(
    gateway: Gateway, media: _Wanted, where: Destination, file: BinaryIO, allowance: Allowance
) -> InlineMedia:
    begun = time.monotonic()
    facts = {"action": "fetch", "host": media.address.host}
    try:
        content_type = await gateway.media.fetch(media.address, media.kind, file, allowance)
    except FetchRefused as error:
        logger.info("media not fetched", extra=facts | {"code": error.code, "reason": str(error)})
        raise wrong_field(error.status, error.code, media.place, f"{media.address.origin}: {error}") from error
    logger.info("media fetched", extra=facts | {"num_bytes": file.tell(), "duration_s": _since(begun)})
    file.seek(0)
    return await to_thread.run_sync(where.media, file, content_type)


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
