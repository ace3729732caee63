"""A job's answer as a chat completion, whole or in pieces. Who leaves before its end has cancelled the job."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Final

import redis
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api_stub.contract.event import FinalEvent, JobCompleted
from api_stub.cursor import TextCursor
from api_stub.errors import JobFailed, StoreUnavailable, VisionqError
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.hub import Frame
from api_stub.gateway.openai.errors import (
    OpenAIErrorBody,
    error_body,
    error_response,
    job_error_response,
    status_for,
)
from api_stub.gateway.openai.shapes import (
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatUsage,
    ChunkChoice,
    completion_id,
    finish_of,
)
from api_stub.gateway.problems import problem_of
from api_stub.gateway.reader import EventReader
from api_stub.gateway.sse import HEARTBEAT, MEDIA_TYPE, SEND_S, leaving

logger = logging.getLogger(__name__)

CANCEL_S: Final = 5.0
DONE: Final = b"data: [DONE]\n\n"


async def whole_answer(request: Request, gateway: Gateway, job_id: str) -> Response:
    """Wait for a job's end, however long it takes, and return it as a response."""
    async with _attended(gateway, job_id, only_final=True) as reader, leaving(request.receive, reader):
        ending = await ending_of(reader, gateway.settings.api_heartbeat_s)
    if ending is None:
        raise StoreUnavailable("the gateway stops; ask again")
    if not isinstance(ending, JobCompleted):
        return job_error_response(ending.error)
    completion = ChatCompletion.of(ending.result, ending.ts)
    return Response(completion.model_dump_json(), media_type="application/json")


async def ending_of(reader: EventReader, look_s: float) -> FinalEvent | None:
    """Wait for a job's final event; None when the reader left or the gateway stops. Raises UnknownJob."""
    while not reader.is_finished:
        frames = await reader.frames(look_s)
        if frames and isinstance(frames[-1].event, FinalEvent):
            return frames[-1].event
    return None


@asynccontextmanager
async def _attended(gateway: Gateway, job_id: str, *, only_final: bool = False) -> AsyncGenerator[EventReader, None]:
    """Read a job; when the block ends before the job does, nobody waits for it any more and it is cancelled."""
    reader = None
    try:
        reader = await gateway.readers.open(job_id, only_final=only_final)
        yield reader
    finally:
        if reader is not None:
            reader.close()
        if reader is None or not reader.has_ending:
            await asyncio.shield(_cancel(gateway, job_id))


async def _cancel(gateway: Gateway, job_id: str) -> None:
    try:
        async with asyncio.timeout(CANCEL_S):
            await gateway.ledger.cancel(job_id)
        logger.info("abandoned job cancelled", extra={"action": "cancel", "job_id": job_id})
    except (redis.RedisError, TimeoutError) as error:
        facts = {"action": "cancel", "job_id": job_id, "error": type(error).__name__}
        logger.warning("abandoned job not cancelled", extra=facts)


class ChatStream(Response):
    """Sends an answer as chunks.

    The status waits for the first text, one heartbeat at most: a job that fails before has the status of its error.
    """

    media_type = MEDIA_TYPE

    def __init__(self, gateway: Gateway, job_id: str, model: str, wants_usage: bool) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._gateway, self._job_id = gateway, job_id
        self._chunks = _Chunks(completion_id(job_id), model, wants_usage)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            async with _attended(self._gateway, self._job_id) as reader, leaving(receive, reader):
                first = await self._first(reader)
                if isinstance(first, Response):
                    await first(scope, receive, send)
                else:
                    await self._send_all(reader, first, send)
        except TimeoutError:
            logger.info("reader took nothing", extra={"action": "follow", "job_id": self._job_id})

    async def _first(self, reader: EventReader) -> bytes | Response:
        """Wait for text, an end, or the time to say that one is alive."""
        until = time.monotonic() + self._gateway.settings.api_heartbeat_s
        try:
            while not self._chunks.has_text and not reader.is_finished and (left_s := until - time.monotonic()) > 0:
                frames = await reader.frames(left_s)
                ending = frames[-1].event if frames else None
                if isinstance(ending, FinalEvent) and not isinstance(ending, JobCompleted):
                    return job_error_response(ending.error)
                self._chunks.take(frames)
        except (VisionqError, redis.RedisError) as error:
            problem = problem_of(error)
            return error_response(problem.status, problem.code, str(problem), headers=problem.headers)
        return self._chunks.opening() + self._chunks.taken()

    async def _send_all(self, reader: EventReader, first: bytes, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await _send(send, first)
        try:
            while not reader.is_finished:
                self._chunks.take(await reader.frames(self._gateway.settings.api_heartbeat_s))
                piece = self._chunks.taken()
                if piece or not reader.is_finished:
                    await _send(send, piece or HEARTBEAT)
            rest = DONE if reader.has_ending else _error(_stopping())
        except JobFailed as error:
            rest = _error(error_body(HTTPStatus.INTERNAL_SERVER_ERROR, error.code, error.message))
        except (VisionqError, redis.RedisError) as error:
            problem = problem_of(error)
            rest = _error(error_body(status_for(problem.status), problem.code, str(problem)))
        await _send(send, self._chunks.taken() + rest, is_last=True)


class _Chunks:
    """Turns events into chunks; a new attempt that repeats the text so far adds nothing to it."""

    def __init__(self, name: str, model: str, wants_usage: bool) -> None:
        self._name, self._model, self._wants_usage = name, model, wants_usage
        self._created = int(time.time())
        self._cursor = TextCursor()
        self._encoded: list[bytes] = []

    @property
    def has_text(self) -> bool:
        return bool(self._cursor.text)

    def opening(self) -> bytes:
        return self._chunk(ChatDelta(role="assistant", content=""))

    def taken(self) -> bytes:
        """Return all chunks since the last call."""
        encoded = b"".join(self._encoded)
        self._encoded.clear()
        return encoded

    def take(self, frames: Iterable[Frame]) -> None:
        """Add what the events bring. Raises StreamRestarted, JobFailed."""
        for frame in frames:
            text = self._cursor.take(frame.event)
            if text:
                self._encoded.append(self._chunk(ChatDelta(content=text)))
            if isinstance(frame.event, JobCompleted):
                self._complete(frame.event)

    def _complete(self, event: JobCompleted) -> None:
        choice = ChunkChoice(delta=ChatDelta(), finish_reason=finish_of(event.result))
        self._encoded.append(self._event([choice], None))
        if self._wants_usage:
            self._encoded.append(self._event([], ChatUsage.of(event.result)))

    def _chunk(self, delta: ChatDelta) -> bytes:
        return self._event([ChunkChoice(delta=delta)], None)

    def _event(self, choices: list[ChunkChoice], usage: ChatUsage | None) -> bytes:
        chunk = ChatChunk(id=self._name, created=self._created, model=self._model, choices=choices, usage=usage)
        return b"data: " + chunk.model_dump_json().encode() + b"\n\n"


async def _send(send: Send, body: bytes, *, is_last: bool = False) -> None:
    async with asyncio.timeout(SEND_S):
        await send({"type": "http.response.body", "body": body, "more_body": not is_last})


def _stopping() -> OpenAIErrorBody:
    return error_body(HTTPStatus.SERVICE_UNAVAILABLE, "store_unavailable", "the gateway stops; ask again")


def _error(body: OpenAIErrorBody) -> bytes:
    return b"data: " + body.model_dump_json().encode() + b"\n\n"
