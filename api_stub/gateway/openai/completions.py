"""A job's answer as a chat completion, whole or in pieces, and what becomes of the job when its client leaves first.

A stream's job is cancelled. A whole answer's is kept for some seconds, in case the same question comes again. One with
an Idempotency-Key goes on, as any job does that was handed in under one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import redis
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api_stub.contract.event import FinalEvent, JobCompleted
from api_stub.cursor import TextCursor
from api_stub.errors import JobFailed, StoreUnavailable, UnknownJob, VisionqError
from api_stub.gateway.broadcaster import Frame
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.openai.models import NoWorker, ServedOrNot
from api_stub.gateway.openai.shapes import (
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatUsage,
    ChunkChoice,
    completion_id,
    finish_of,
)
from api_stub.gateway.openai_errors import (
    OpenAIErrorBody,
    error_body,
    error_response,
    job_error_response,
    status_for,
)
from api_stub.gateway.problems import Problem, problem_of
from api_stub.gateway.reader import EventReader
from api_stub.gateway.sse import HEARTBEAT, MEDIA_TYPE, SEND_S, leaving

logger = logging.getLogger(__name__)

DONE: Final = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Asked:
    """Whose job it is, and what happens to it when nobody waits for it any more.

    `question`: it is kept for the same one again. `is_keyed`: it has an Idempotency-Key.
    """

    job_id: str
    tenant: str
    question: str | None = None
    is_keyed: bool = False

    async def leave(self, gateway: Gateway) -> None:
        """Deal with a job whose client has left. Raises nothing."""
        if self.is_keyed:
            return
        if self.question is None:
            await gateway.abandoned.cancel(self.job_id)
        else:
            await gateway.abandoned.leave(self.job_id, self.tenant, self.question)


async def whole_answer(request: Request, gateway: Gateway, asked: Asked) -> Response:
    """Wait for a job's end, however long it takes, and return it as a response. Raises StoreUnavailable."""
    try:
        async with _attended(gateway, asked, only_final=True) as reader, leaving(request.receive, reader):
            served = ServedOrNot(gateway, asked.job_id, goes_on=asked.is_keyed)
            ending = await ending_of(reader, gateway.settings.api_heartbeat_s, served)
    except UnknownJob as error:
        raise _lost() from error
    except NoWorker as error:
        return job_error_response(error.info)
    if ending is None:
        raise StoreUnavailable("the gateway stops; ask again")
    if not isinstance(ending, JobCompleted):
        return job_error_response(ending.error)
    completion = ChatCompletion.of(ending.result, ending.ts)
    return Response(completion.model_dump_json(), media_type="application/json")


async def ending_of(reader: EventReader, look_s: float, served: ServedOrNot | None = None) -> FinalEvent | None:
    """Wait for a job's final event; None when the reader left or the gateway stops. Raises UnknownJob, NoWorker."""
    while not reader.is_finished:
        frames = await reader.frames(look_s if served is None else served.left_s(look_s))
        if frames and isinstance(frames[-1].event, FinalEvent):
            return frames[-1].event
        if served is not None:
            await served.look()
    return None


@asynccontextmanager
async def _attended(gateway: Gateway, asked: Asked, *, only_final: bool = False) -> AsyncGenerator[EventReader, None]:
    """Read a job; when the block ends before the job does, its client has left."""
    reader, is_over = None, False
    try:
        reader = await gateway.readers.open(asked.job_id, only_final=only_final)
        yield reader
    except (UnknownJob, NoWorker):
        is_over = True
        raise
    finally:
        if reader is not None:
            reader.close()
        if not is_over and (reader is None or not reader.has_ending):
            await asyncio.shield(asked.leave(gateway))


class ChatStream(Response):
    """Sends an answer as chunks.

    The status waits for the first text, one heartbeat at most: a job that fails before has the status of its error.
    """

    media_type = MEDIA_TYPE

    def __init__(self, gateway: Gateway, asked: Asked, model: str, wants_usage: bool) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._gateway, self._asked = gateway, asked
        self._served = ServedOrNot(gateway, asked.job_id, goes_on=asked.is_keyed)
        self._chunks = _Chunks(completion_id(asked.job_id), model, wants_usage)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            async with _attended(self._gateway, self._asked) as reader, leaving(receive, reader):
                first = await self._first(reader)
                if isinstance(first, Response):
                    await first(scope, receive, send)
                else:
                    await self._send_all(reader, first, send)
        except TimeoutError:
            logger.info(
                "stream ended: its reader is too slow", extra={"action": "follow", "job_id": self._asked.job_id}
            )

    async def _first(self, reader: EventReader) -> bytes | Response:
        """Wait for text, an end, or the time to say that one is alive."""
        until = time.monotonic() + self._gateway.settings.api_heartbeat_s
        try:
            while not self._chunks.has_text and not reader.is_finished and (left_s := until - time.monotonic()) > 0:
                frames = await reader.frames(self._served.left_s(left_s))
                await self._served.look()
                ending = frames[-1].event if frames else None
                if isinstance(ending, FinalEvent) and not isinstance(ending, JobCompleted):
                    return job_error_response(ending.error)
                self._chunks.take(frames)
        except NoWorker as error:
            return job_error_response(error.info)
        except (VisionqError, redis.RedisError) as error:
            problem = _problem_of(error)
            return error_response(problem.status, problem.code, str(problem), headers=problem.headers)
        return self._chunks.opening() + self._chunks.taken()

    async def _send_all(self, reader: EventReader, first: bytes, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await _send(send, first)
        try:
            while not reader.is_finished:
                self._chunks.take(await reader.frames(self._served.left_s(self._gateway.settings.api_heartbeat_s)))
                await self._served.look()
                piece = self._chunks.taken()
                if piece or not reader.is_finished:
                    await _send(send, piece or HEARTBEAT)
            rest = DONE if reader.has_ending else _error(_stopping())
        except JobFailed as error:
            rest = _error(error_body(HTTPStatus.INTERNAL_SERVER_ERROR, error.code, error.message))
        except (VisionqError, redis.RedisError) as error:
            problem = _problem_of(error)
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


def _problem_of(error: VisionqError | redis.RedisError) -> Problem:
    return problem_of(_lost() if isinstance(error, UnknownJob) else error)


def _lost() -> StoreUnavailable:
    """Return the error of a job that vanished while its client waited: the client named no job, so 404 would be no word
    for it, and asking again is right."""
    return StoreUnavailable("the job was lost with Redis' memory, or its record has expired; ask again")


def _stopping() -> OpenAIErrorBody:
    return error_body(HTTPStatus.SERVICE_UNAVAILABLE, "store_unavailable", "the gateway stops; ask again")


def _error(body: OpenAIErrorBody) -> bytes:
    return b"data: " + body.model_dump_json().encode() + b"\n\n"
