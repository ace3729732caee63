"""Server-sent events: a reader's frames as a response that ends with the job, the reader or the gateway.

`id:` is the event's seq, so a reader that comes back with it misses nothing. Writing waits for the client, so a slow
one holds a socket buffer and a mailbox, no more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Final

import redis
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api_stub.contract.event import StreamGap
from api_stub.errors import VisionqError
from api_stub.gateway.broadcaster import Frame
from api_stub.gateway.problems import Problem, problem_of
from api_stub.gateway.reader import EventReader

logger = logging.getLogger(__name__)

MEDIA_TYPE: Final = "text/event-stream"
#: Milliseconds after which a browser comes back when the stream breaks.
RETRY_MS: Final = 1000
#: A client that takes nothing for this long is gone.
SEND_S: Final = 60.0
HEARTBEAT: Final = b": alive\n\n"
FAREWELL: Final = b": the gateway stops; come back with the last id\n\n"
#: Its data is a problem (RFC 9457). No event of a job: nothing more is known of the job.
ERROR_EVENT: Final = "error"


class EventStream(Response):
    """Sends `first`, then what the reader brings; closes the reader in the end, however it comes."""

    media_type = MEDIA_TYPE

    def __init__(self, reader: EventReader, first: Iterable[Frame], heartbeat_s: float) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._reader = reader
        self._first = tuple(first)
        self._heartbeat_s = heartbeat_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            async with leaving(receive, self._reader):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await self._send_all(send)
        except TimeoutError:
            logger.info(
                "stream ended: its reader is too slow", extra={"action": "follow", "job_id": self._reader.job_id}
            )
        finally:
            self._reader.close()

    async def _send_all(self, send: Send) -> None:
        await _send(send, b"retry: %d\n\n" % RETRY_MS + encoded(self._first))
        last = FAREWELL
        try:
            while not self._reader.is_finished:
                frames = await self._reader.frames(self._heartbeat_s)
                if frames:
                    await _send(send, encoded(frames))
                elif not self._reader.is_finished:
                    await _send(send, HEARTBEAT)
        except (VisionqError, redis.RedisError) as error:
            # Too late for a status. Whoever comes back gets the same problem as an answer.
            logger.warning("stream ended by an error", extra={"action": "follow", "error": type(error).__name__})
            last = _problem(problem_of(error))
        await _send(send, b"" if self._reader.has_ending else last, is_last=True)


@asynccontextmanager
async def leaving(receive: Receive, reader: EventReader) -> AsyncGenerator[None, None]:
    """End the reader when its client disconnects during the block. The request's body must have been read."""
    watch = asyncio.create_task(_until_disconnect(receive, reader))
    try:
        yield
    finally:
        watch.cancel()


def encoded(frames: Iterable[Frame]) -> bytes:
    """Return frames as text/event-stream."""
    return b"".join(_encoded(frame) for frame in frames)


def _encoded(frame: Frame) -> bytes:
    # A gap has no id: the reader is still at the event before it.
    head = "" if isinstance(frame.event, StreamGap) else f"id: {frame.event.seq}\n"
    return f"{head}event: {frame.event.type}\ndata: {frame.raw}\n\n".encode()


def _problem(problem: Problem) -> bytes:
    return f"event: {ERROR_EVENT}\ndata: {problem.body.model_dump_json(exclude_defaults=True)}\n\n".encode()


async def _until_disconnect(receive: Receive, reader: EventReader) -> None:
    with suppress(Problem):  # whoever sends for ever is told to leave, too
        while (await receive())["type"] != "http.disconnect":
            pass
    reader.leave()


async def _send(send: Send, body: bytes, *, is_last: bool = False) -> None:
    async with asyncio.timeout(SEND_S):
        await send({"type": "http.response.body", "body": body, "more_body": not is_last})
