"""A gateway's problems (RFC 9457) as the errors that a client through Redis raises."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from api_stub.errors import (
    AccessRefused,
    InvalidRequest,
    QueueFull,
    StorageRefused,
    StoreUnavailable,
    UnknownJob,
    VisionqError,
)

RETRY_AFTER_S: Final = 5.0
_ACCESS: Final = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})


class CutShort(StoreUnavailable):
    """Raised when a proxy did not wait for the gateway's answer. A shorter `wait` may come through."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: status, headers by lower-case name, whole body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def is_good(self) -> bool:
        """True for 2xx."""
        return 200 <= self.status < 300


def refusal(answer: Answer) -> VisionqError:
    """Return the error that a bad answer stands for."""
    problem = _problem(answer.body)
    code, detail = str(problem.get("code", "")), str(problem.get("detail") or f"the gateway answered {answer.status}")
    if answer.status == HTTPStatus.TOO_MANY_REQUESTS:
        return QueueFull(detail, _seconds(answer.headers.get("retry-after", "")))
    if code == UnknownJob.code:
        return UnknownJob(detail)
    if code == StorageRefused.code:
        return StorageRefused(detail)
    if answer.status == HTTPStatus.GATEWAY_TIMEOUT:
        return CutShort(detail)
    if answer.status in _ACCESS:
        return AccessRefused(detail)
    if answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR or answer.status == HTTPStatus.REQUEST_TIMEOUT:
        return StoreUnavailable(detail)
    return InvalidRequest(detail)


def _problem(body: bytes) -> dict[str, Any]:
    try:
        problem = json.loads(body)
    except ValueError:
        return {}
    return problem if isinstance(problem, dict) else {}


def _seconds(retry_after: str) -> float:
    return float(retry_after) if retry_after.isdecimal() else RETRY_AFTER_S
