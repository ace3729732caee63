"""How a request ends badly: one JSON object of RFC 9457, with a stable `code` and the fields that were wrong.

Everything that a route may raise is turned into one here, and only here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Final

import redis
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.responses import Response

from api_stub.connections import unavailable
from api_stub.errors import InvalidRequest, QueueFull, StorageRefused, StoreUnavailable, UnknownJob, VisionqError
from api_stub.gateway.forwarded import path_below
from api_stub.gateway.openai_errors import error_response, speaks_openai

logger = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/problem+json"
#: How soon it makes sense to ask again when Redis or S3 was away.
RETRY_AFTER_S: Final = 2.0

_STATUS: Final[Mapping[type[VisionqError], HTTPStatus]] = {
    InvalidRequest: HTTPStatus.UNPROCESSABLE_ENTITY,
    QueueFull: HTTPStatus.TOO_MANY_REQUESTS,
    UnknownJob: HTTPStatus.NOT_FOUND,
    StoreUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    StorageRefused: HTTPStatus.BAD_GATEWAY,
}


class FieldError(BaseModel):
    """What is wrong with one field of the request. `field` is its path, dotted; empty: the request as a whole."""

    model_config = ConfigDict(frozen=True)

    field: str
    message: str


class ProblemBody(BaseModel):
    """An error as it is sent: RFC 9457, with `code` for programs and `errors` for fields."""

    model_config = ConfigDict(frozen=True)

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: list[FieldError] = []


class Problem(VisionqError):
    """Raised when a request cannot be answered as asked. Carries all that the answer says."""

    def __init__(
        self,
        status: HTTPStatus,
        code: str,
        detail: str,
        *,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.errors = tuple(errors)
        self.headers = dict(headers or {})

    @property
    def body(self) -> ProblemBody:
        """The answer's body."""
        return ProblemBody(
            type=f"urn:visionq:problem:{self.code}",
            title=self.status.phrase,
            status=self.status,
            detail=str(self),
            code=self.code,
            errors=list(self.errors),
        )

    def response(self) -> Response:
        """The answer."""
        content = self.body.model_dump_json(exclude_defaults=True)
        return Response(content, self.status, self.headers, MEDIA_TYPE)


def invalid(field: str, message: str) -> Problem:
    """Return the problem of one wrong field."""
    return wrong_field(HTTPStatus.UNPROCESSABLE_ENTITY, InvalidRequest.code, field, message)


def wrong_field(status: HTTPStatus, code: str, field: str, message: str) -> Problem:
    """Return the problem of one field that a status and a code of its own stand for."""
    return Problem(status, code, f"{field}: {message}", errors=[FieldError(field=field, message=message)])


def too_many(code: str, detail: str, retry_after_s: float) -> Problem:
    """Return the problem of a caller that has to wait."""
    return Problem(HTTPStatus.TOO_MANY_REQUESTS, code, detail, headers=_retry_after(retry_after_s))


def unavailable_now(code: str, detail: str, retry_after_s: float) -> Problem:
    """Return the problem of a caller that may well be answered later."""
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, code, detail, headers=_retry_after(retry_after_s))


def too_large(limit: int) -> Problem:
    """Return the problem of a body above the limit."""
    return Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", f"the body is larger than {limit} bytes")


def problem_of(error: Exception) -> Problem:
    """Return the problem that an exception of a route stands for."""
    if isinstance(error, Problem):
        return error
    refusal = error.__cause__ if isinstance(error, StoreUnavailable) else error
    if isinstance(refusal, redis.RedisError):
        # Whoever speaks to the gateway is told why, not where Redis is: that is in the log.
        return _of_ours(unavailable(refusal, tells_where=False))
    if isinstance(error, VisionqError):
        return _of_ours(error)
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        status = HTTPStatus(error.status_code)
        code = status.phrase.lower().replace(" ", "_").replace("-", "_")
        return Problem(status, code, str(error.detail), headers=error.headers)
    return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", "the gateway made a mistake; its log says more")


def install(app: FastAPI) -> None:
    """Let the app answer every exception with a problem."""
    for kind in (VisionqError, redis.RedisError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer)


async def _answer(request: Request, error: Exception) -> Response:
    problem = problem_of(error)
    request.state.problem = problem.code
    if isinstance(error, StoreUnavailable | redis.RedisError):
        reason = unavailable(error) if isinstance(error, redis.RedisError) else error
        logger.warning("store unavailable", extra={"action": "answer", "reason": str(reason)})
    if speaks_openai(path_below(request.scope)):
        field = problem.errors[0].field if problem.errors else None
        return error_response(problem.status, problem.code, str(problem), field, problem.headers)
    return problem.response()


def _of_ours(error: VisionqError) -> Problem:
    status = _STATUS.get(type(error), HTTPStatus.INTERNAL_SERVER_ERROR)
    headers: dict[str, str] = {}
    if isinstance(error, QueueFull):
        headers = _retry_after(error.retry_after_s)
    elif isinstance(error, StoreUnavailable):
        headers = _retry_after(RETRY_AFTER_S)
    errors = fields_of(str(error)) if isinstance(error, InvalidRequest) else ()
    return Problem(status, error.code, str(error), errors=errors, headers=headers)


def fields_of(message: str) -> list[FieldError]:
    """Take the contract's refusals apart: `field: what is wrong; field: …`."""
    found = []
    for clause in message.split("; "):
        field, colon, text = clause.partition(": ")
        is_named = bool(colon) and " " not in field
        found.append(FieldError(field=field if is_named else "", message=text if is_named else clause))
    return found


def _of_validation(error: RequestValidationError) -> Problem:
    # The first part of a path says where in the request the field is: path, query, header.
    errors = [
        FieldError(field=".".join(str(part) for part in problem["loc"][1:]), message=str(problem["msg"]))
        for problem in error.errors()
    ]
    detail = "; ".join(f"{problem.field}: {problem.message}" for problem in errors)
    return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, InvalidRequest.code, detail, errors=errors)


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}
