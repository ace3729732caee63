"""What a client asks of a gateway, as values: method, path, body, and how to read the response. No I/O.

Every request may be sent twice without a double effect. A gateway's problems (RFC 9457) become the errors that a client
through Redis raises.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Generic, NoReturn, TypeVar
from urllib.parse import quote

from api_stub.contract.job import Job
from api_stub.contract.status import JobStatus
from api_stub.contract.view import JobSelection, JobView
from api_stub.errors import (
    AccessRefused,
    InvalidRequest,
    QueueFull,
    StorageRefused,
    StoreUnavailable,
    UnknownJob,
    VisionqError,
)
from api_stub.ledger.rows import Cancelled, CancelledJobs, QueueChange

RETRY_AFTER_S: Final = 5.0
_ACCESS: Final = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})

#: How long one answer may take, the asked-for waiting apart.
ANSWER_S: Final = 30.0
CONNECT_S: Final = 5.0
#: How long a gateway is asked to wait for a job's end at a time.
WAIT_S: Final = 30.0
MIN_WAIT_S: Final = 1.0
#: How much longer the end of all jobs of a queue may take.
MANY_JOBS_S: Final = 120.0


class CutShort(StoreUnavailable):
    """Raised when a proxy did not wait for the gateway's response. A shorter `wait` may come through."""


@dataclass(frozen=True, slots=True)
class ApiResponse:
    """What came back: status, headers by lower-case name, whole body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def is_good(self) -> bool:
        """True for 2xx."""
        return 200 <= self.status < 300


def error_of(response: ApiResponse) -> VisionqError:
    """Return the error that a bad response stands for."""
    problem = _problem(response.body)
    code, detail = str(problem.get("code", "")), str(problem.get("detail") or f"the gateway answered {response.status}")
    if response.status == HTTPStatus.TOO_MANY_REQUESTS:
        return QueueFull(detail, _seconds(response.headers.get("retry-after", "")))
    if code == UnknownJob.code:
        return UnknownJob(detail)
    if code == StorageRefused.code:
        return StorageRefused(detail)
    if response.status == HTTPStatus.GATEWAY_TIMEOUT:
        return CutShort(detail)
    if response.status in _ACCESS:
        return AccessRefused(detail)
    if response.status >= HTTPStatus.INTERNAL_SERVER_ERROR or response.status == HTTPStatus.REQUEST_TIMEOUT:
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


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ApiRequest(Generic[T]):
    """One request. `read` takes a good answer; `wait_s` is how much longer than usual it may take."""

    method: str
    path: str
    read: Callable[[ApiResponse], T]
    body: str | None = None
    wait_s: float = 0.0

    def read_response(self, response: ApiResponse) -> T:
        """Return what a response says. Raises the error that it stands for."""
        if not response.is_good:
            raise error_of(response)
        try:
            return self.read(response)
        except (ValueError, TypeError, KeyError) as error:
            raise StoreUnavailable(f"the gateway's answer cannot be read: {type(error).__name__}") from error


def submit(job_id: str, job: Job) -> ApiRequest[JobView]:
    """Hand a job in."""
    return ApiRequest("PUT", job_path(job_id), _view, job.to_json())


def retry(job_id: str) -> ApiRequest[JobView]:
    """Queue a new job with the body of a finished one."""
    return ApiRequest("POST", f"{job_path(job_id)}/retry", _view)


def view(job_id: str) -> ApiRequest[JobView]:
    """Look at a job."""
    return ApiRequest("GET", job_path(job_id), _view)


def ending(job_id: str, wait_s: float) -> ApiRequest[JobView]:
    """Look at a job once it has ended, or after `wait_s` seconds."""
    return ApiRequest("GET", f"{job_path(job_id)}?wait={wait_s:.3f}", _view, wait_s=wait_s)


def shorter_s(longest_s: float, error: Exception) -> float:
    """Return how long to ask a gateway to wait from now on: less than a proxy in between waits for an answer."""
    return max(longest_s / 2, MIN_WAIT_S) if isinstance(error, CutShort) else longest_s


def cancel(job_id: str) -> ApiRequest[Cancelled]:
    """Ask for the end of a job that was not final a moment ago."""

    def read(response: ApiResponse) -> Cancelled:
        if response.status == HTTPStatus.ACCEPTED:
            return Cancelled.CANCELLING
        return Cancelled.CANCELLED if _view(response).status is JobStatus.CANCELLED else Cancelled.FINAL

    return ApiRequest("POST", f"{job_path(job_id)}/cancel", read)


def cancel_jobs(tenant: str, wanted: JobSelection) -> ApiRequest[CancelledJobs]:
    """Ask for the end of all jobs that are wanted."""

    def read(response: ApiResponse) -> CancelledJobs:
        reply = json.loads(response.body)
        return CancelledJobs(int(reply["cancelled"]), int(reply["cancelling"]))

    fields = json.loads(wanted.to_json()) | ({"metadata": wanted.metadata} if wanted.metadata else {})
    body = fields | ({"tenant": tenant} if tenant else {})
    return ApiRequest("POST", "/v1/jobs/cancel", read, json.dumps(body), wait_s=MANY_JOBS_S)


def delete(job_id: str) -> ApiRequest[None]:
    """Remove a final job."""
    return ApiRequest("DELETE", job_path(job_id), lambda response: None)


def pause(model: str) -> ApiRequest[QueueChange]:
    """Let nobody claim a model's jobs."""
    return _queue(model, "pause", _change)


def resume(model: str) -> ApiRequest[QueueChange]:
    """Let a model's jobs be claimed again."""
    return _queue(model, "resume", _change)


def purge(model: str) -> ApiRequest[int]:
    """End all queued jobs of a model."""
    return _queue(model, "purge", lambda response: int(json.loads(response.body)["cancelled"]))


def _queue(model: str, what: str, read: Callable[[ApiResponse], T]) -> ApiRequest[T]:
    return ApiRequest("POST", f"/v1/queues/{quote(model, safe='')}/{what}", read, wait_s=MANY_JOBS_S)


def _change(response: ApiResponse) -> QueueChange:
    reply = json.loads(response.body)
    return QueueChange(bool(reply["changed"]), int(reply["depth"]), int(reply["num_workers"]))


@dataclass(frozen=True, slots=True)
class PresignedPut:
    """A presigned URL to PUT a file's bytes to, and the headers that were signed."""

    uri: str
    url: str
    headers: dict[str, str]


def presign_put(content_type: str, num_bytes: int) -> ApiRequest[PresignedPut]:
    """Ask for a presigned URL."""

    def read(response: ApiResponse) -> PresignedPut:
        reply = json.loads(response.body)
        return PresignedPut(reply["uri"], reply["url"], dict(reply["headers"]))

    return ApiRequest("POST", "/v1/uploads", read, json.dumps({"content_type": content_type, "num_bytes": num_bytes}))


def job_path(job_id: str) -> str:
    """Return a job's address below the gateway's."""
    return f"/v1/jobs/{quote(job_id, safe='')}"


def redis_only(what: str) -> NoReturn:
    """Refuse what a gateway offers to nobody."""
    raise InvalidRequest(f"{what} is an operator's: it needs a client of Redis itself")


def _view(response: ApiResponse) -> JobView:
    reply = json.loads(response.body)
    return JobView.model_validate_json(
        json.dumps({name: reply[name] for name in JobView.model_fields if name in reply})
    )
