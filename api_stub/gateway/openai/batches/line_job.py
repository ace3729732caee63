"""One line of a batch from its text to its answer: submit, again when the queue is full, wait, write down."""

from __future__ import annotations

import asyncio
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from typing import Final

import redis

from api_stub.contract.error import ErrorCode, ErrorInfo
from api_stub.contract.event import FinalEvent, JobCompleted
from api_stub.errors import QueueFull, StoreUnavailable, UnknownJob, VisionqError
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.intake import accept
from api_stub.gateway.openai.batches.lines import (
    BatchLineAnswer,
    BatchLineError,
    BatchLineResponse,
    Line,
    custom_id_of,
    parse_line,
    request_id,
)
from api_stub.gateway.openai.batches.store import BatchOrder
from api_stub.gateway.openai.chat import parse_chat
from api_stub.gateway.openai.chat_draft import ChatDraft
from api_stub.gateway.openai.completions import ending_of
from api_stub.gateway.openai.models import check_model
from api_stub.gateway.openai.shapes import ChatCompletion
from api_stub.gateway.openai_errors import OpenAIErrorBody, error_body, job_error_body, status_for, status_of_job
from api_stub.gateway.problems import invalid, problem_of

#: Lines whose text is in memory, or whose submission waits for room in the queue.
MAX_SUBMITTING: Final = 8
LOOK_S: Final = 15.0
PAUSE_S: Final = 1.0
MAX_PAUSE_S: Final = 5.0
MAX_TRIES: Final = 3
#: Batches stand behind everybody who waits.
PRIORITY: Final = 9


class GatewayStops(Exception):
    """Raised when the process stops; another runner goes on."""


class EarlyEnd(StrEnum):
    """Why a batch ends before its last line."""

    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Answered:
    """A line that is done with. `text` is empty for one that a cancelled batch leaves out."""

    line: Line
    is_completed: bool
    text: bytes


class Lineup:
    """Answers the lines of one batch. One event loop."""

    def __init__(self, gateway: Gateway, order: BatchOrder) -> None:
        self._gateway, self._order = gateway, order
        self._caller = order.caller
        self._models: set[str] = set()
        self._waiting: set[str] = set()
        self._end: EarlyEnd | None = None
        self._has_ended = asyncio.Event()
        self.room = asyncio.Semaphore(MAX_SUBMITTING)

    @property
    def early_end(self) -> EarlyEnd | None:
        """Why the batch ends early; None: it does not."""
        return self._end

    async def end(self, why: EarlyEnd) -> None:
        """Submit nothing more, and cancel what is under way. To be repeated until all lines are answered."""
        self._end = self._end or why
        self._has_ended.set()
        for job_id in tuple(self._waiting):
            await self._gateway.ledger.cancel(job_id)

    async def answer(self, line: Line) -> Answered:
        """Answer a line; `room` was acquired for it. Raises GatewayStops."""
        is_in, name = False, None
        job_id = request_id(self._order.id, line.number)
        try:
            try:
                name = await custom_id_of(line)
                is_in = await self._submitted(line, job_id)
            finally:
                self.room.release()
            return self._written(line, name, await self._ending(job_id) if is_in else None)
        except UnknownJob as error:  # its row was lost
            failure = ErrorInfo.of(ErrorCode.INTERNAL, str(error))
            return self._refused(line, name, status_of_job(failure), job_error_body(failure))
        except VisionqError as error:
            problem = problem_of(error)
            status = status_for(problem.status)
            param = problem.errors[0].field if problem.errors else None
            return self._refused(line, name, status, error_body(status, problem.code, str(problem), param))

    async def _submitted(self, line: Line, job_id: str) -> bool:
        """Hand the line's job in; False when the batch ended before. Raises VisionqError."""
        asked = await parse_line(line)
        request = parse_chat(asked.body)
        if request.stream:
            raise invalid("body.stream", "not in a batch")
        draft = ChatDraft.of(request.with_defaults(PRIORITY, self._order.expires_at - self._order.created_at))
        while self._end is None:
            try:
                await self._check_model(request.model)
                await accept(self._gateway, self._caller, draft, job_id=job_id)
            except (VisionqError, redis.RedisError) as error:
                await self._pause(_retry_after_s(error))
            else:
                self._waiting.add(job_id)
                return True
        return await self._was_submitted(job_id)

    async def _was_submitted(self, job_id: str) -> bool:
        """Find a job that another runner submitted, and see to its end."""
        view = await self._gateway.ledger.view(job_id)
        if view is not None and not view.status.is_final:
            self._waiting.add(job_id)
            await self._gateway.ledger.cancel(job_id)
        return view is not None

    async def _check_model(self, model: str) -> None:
        if model not in self._models:
            await check_model(self._gateway, self._caller, model)
            self._models.add(model)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._has_ended.wait()
        except TimeoutError:
            pass

    async def _ending(self, job_id: str) -> FinalEvent:
        try:
            with closing(await self._gateway.readers.open(job_id, only_final=True)) as reader:
                ending = await ending_of(reader, LOOK_S)
        finally:
            self._waiting.discard(job_id)
        if ending is None:
            raise GatewayStops
        return ending

    def _written(self, line: Line, name: str | None, ending: FinalEvent | None) -> Answered:
        if isinstance(ending, JobCompleted):
            body = ChatCompletion.of(ending.result, ending.ts).model_dump()
            return Answered(line, True, self._response(line, name, HTTPStatus.OK, body))
        if ending is not None and (self._end is None or ending.error.code is not ErrorCode.CANCELLED):
            return self._refused(line, name, status_of_job(ending.error), job_error_body(ending.error))
        if self._end is EarlyEnd.CANCELLED:
            return Answered(line, False, b"")
        error = BatchLineError(code="batch_expired", message="the completion window ended before")
        answer = BatchLineAnswer(id=self._name(line), custom_id=name, error=error)
        return Answered(line, False, answer.encoded())

    def _refused(self, line: Line, name: str | None, status: HTTPStatus, body: OpenAIErrorBody) -> Answered:
        return Answered(line, False, self._response(line, name, status, body.model_dump()))

    def _response(self, line: Line, name: str | None, status: HTTPStatus, body: object) -> bytes:
        job_id = request_id(self._order.id, line.number)
        response = BatchLineResponse(status_code=status, request_id=job_id, body=body)
        return BatchLineAnswer(id=self._name(line), custom_id=name, response=response).encoded()

    def _name(self, line: Line) -> str:
        return f"batch_req_{request_id(self._order.id, line.number)}"


def _retry_after_s(error: VisionqError | redis.RedisError) -> float:
    """Return how long to wait before the line is tried again. Raises the error when that makes no sense."""
    if isinstance(error, QueueFull):
        return min(error.retry_after_s, MAX_PAUSE_S)
    if (
        isinstance(error, StoreUnavailable | redis.RedisError)
        or problem_of(error).status == HTTPStatus.TOO_MANY_REQUESTS
    ):
        return PAUSE_S
    raise error
