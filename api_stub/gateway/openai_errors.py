"""Errors in OpenAI's shape, for the addresses that its clients use; they know no 422."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from api_stub.contract.error import ErrorCode, ErrorInfo

PREFIXES: Final = ("/v1/chat/", "/v1/models", "/v1/files", "/v1/batches")
#: For operators, below an address of OpenAI's.
_OUR_OWN: Final = ("/promote", "/rollback")
_KINDS: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_STATUS: Final = {
    ErrorCode.STORAGE_UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.OUT_OF_MEMORY: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
    ErrorCode.EXPIRED: HTTPStatus.GATEWAY_TIMEOUT,
    ErrorCode.NO_WORKER: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.QUEUE_FULL: HTTPStatus.TOO_MANY_REQUESTS,
    ErrorCode.QUEUE_PAUSED: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.POISON_JOB: HTTPStatus.INTERNAL_SERVER_ERROR,
    ErrorCode.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
}


class OpenAIError(BaseModel):
    """What went wrong. `param` is the field of the request, `code` for programs."""

    model_config = ConfigDict(frozen=True)

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorBody(BaseModel):
    """An error as it is sent."""

    model_config = ConfigDict(frozen=True)

    error: OpenAIError


def speaks_openai(path: str) -> bool:
    """Tell whether an address is one of OpenAI's API."""
    return path.startswith(PREFIXES) and not path.endswith(_OUR_OWN)


def status_for(status: int) -> HTTPStatus:
    """Return the status that OpenAI's clients know for one of ours."""
    return HTTPStatus.BAD_REQUEST if status == HTTPStatus.UNPROCESSABLE_ENTITY else HTTPStatus(status)


def error_body(status: int, code: str, message: str, param: str | None = None) -> OpenAIErrorBody:
    """Make the body of an error."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return OpenAIErrorBody(error=OpenAIError(message=message, type=kind, param=param or None, code=code))


def error_response(
    status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an error as a response."""
    known = status_for(status)
    body = error_body(known, code, message, param)
    return Response(body.model_dump_json(), known, headers, "application/json")


def status_of_job(error: ErrorInfo) -> HTTPStatus:
    """Return the status of a job that has no answer."""
    return _STATUS.get(error.code, HTTPStatus.BAD_REQUEST)


def job_error_body(error: ErrorInfo) -> OpenAIErrorBody:
    """Make the body of the error of a job that has no answer."""
    return error_body(status_of_job(error), error.code.value, error.message)


def job_error_response(error: ErrorInfo) -> Response:
    """Return the error of a job that has no answer. OpenAI's clients repeat a 5xx unless they are told not to."""
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    return error_response(status_of_job(error), error.code.value, error.message, headers=headers)
