"""What a client asks of a gateway, as values: method, path, body, and how to read the answer. No I/O.

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


T = TypeVar("T")

#: How long one answer may take, the asked-for waiting apart.
ANSWER_S: Final = 30.0
CONNECT_S: Final = 5.0
#: How long a gateway is asked to wait for a job's end at a time.
WAIT_S: Final = 30.0
MIN_WAIT_S: Final = 1.0
#: How much longer the end of all jobs of a queue may take.
MANY_JOBS_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Ask(Generic[T]):
    """One request. `read` takes a good answer; `wait_s` is how much longer than usual it may take."""

    method: str
    path: str
    read: Callable[[Answer], T]
    body: str | None = None
    wait_s: float = 0.0

    def answered(self, answer: Answer) -> T:
        """Return what the answer says. Raises what it refuses with."""
        if not answer.is_good:
            raise refusal(answer)
        try:
            return self.read(answer)
        except (ValueError, TypeError, KeyError) as error:
            raise StoreUnavailable(f"the gateway's answer cannot be read: {type(error).__name__}") from error


def submit(job_id: str, job: Job) -> Ask[JobView]:
    """Hand a job in."""
    return Ask("PUT", job_path(job_id), _view, job.to_json())


def retry(job_id: str) -> Ask[JobView]:
    """Queue a new job with the body of a finished one."""
    return Ask("POST", f"{job_path(job_id)}/retry", _view)


def view(job_id: str) -> Ask[JobView]:
    """Look at a job."""
    return Ask("GET", job_path(job_id), _view)


def ending(job_id: str, wait_s: float) -> Ask[JobView]:
    """Look at a job once it has ended, or after `wait_s` seconds."""
    return Ask("GET", f"{job_path(job_id)}?wait={wait_s:.3f}", _view, wait_s=wait_s)


def shorter_s(longest_s: float, error: Exception) -> float:
    """Return how long to ask a gateway to wait from now on: less than a proxy in between waits for an answer."""
    return max(longest_s / 2, MIN_WAIT_S) if isinstance(error, CutShort) else longest_s


def cancel(job_id: str) -> Ask[Cancelled]:
    """Ask for the end of a job that was not final a moment ago."""

    def read(answer: Answer) -> Cancelled:
        if answer.status == HTTPStatus.ACCEPTED:
            return Cancelled.CANCELLING
        return Cancelled.CANCELLED if _view(answer).status is JobStatus.CANCELLED else Cancelled.FINAL

    return Ask("POST", f"{job_path(job_id)}/cancel", read)


def cancel_jobs(tenant: str, wanted: JobSelection) -> Ask[CancelledJobs]:
    """Ask for the end of all jobs that are wanted."""

    def read(answer: Answer) -> CancelledJobs:
        said = json.loads(answer.body)
        return CancelledJobs(int(said["cancelled"]), int(said["cancelling"]))

    fields = json.loads(wanted.to_json()) | ({"metadata": wanted.metadata} if wanted.metadata else {})
    body = fields | ({"tenant": tenant} if tenant else {})
    return Ask("POST", "/v1/jobs/cancel", read, json.dumps(body), wait_s=MANY_JOBS_S)


def delete(job_id: str) -> Ask[None]:
    """Remove a final job."""
    return Ask("DELETE", job_path(job_id), lambda answer: None)


def pause(model: str) -> Ask[QueueChange]:
    """Let nobody claim a model's jobs."""
    return _queue(model, "pause", _change)


def resume(model: str) -> Ask[QueueChange]:
    """Let a model's jobs be claimed again."""
    return _queue(model, "resume", _change)


def purge(model: str) -> Ask[int]:
    """End all queued jobs of a model."""
    return _queue(model, "purge", lambda answer: int(json.loads(answer.body)["cancelled"]))


def _queue(model: str, what: str, read: Callable[[Answer], T]) -> Ask[T]:
    return Ask("POST", f"/v1/queues/{quote(model, safe='')}/{what}", read, wait_s=MANY_JOBS_S)


def _change(answer: Answer) -> QueueChange:
    said = json.loads(answer.body)
    return QueueChange(bool(said["changed"]), int(said["depth"]), int(said["num_workers"]))


@dataclass(frozen=True, slots=True)
class Slot:
    """Leave to PUT a file's bytes straight into S3."""

    uri: str
    url: str
    headers: dict[str, str]


def slot(content_type: str, num_bytes: int) -> Ask[Slot]:
    """Ask for leave to upload."""

    def read(answer: Answer) -> Slot:
        said = json.loads(answer.body)
        return Slot(said["uri"], said["url"], dict(said["headers"]))

    return Ask("POST", "/v1/uploads", read, json.dumps({"content_type": content_type, "num_bytes": num_bytes}))


def job_path(job_id: str) -> str:
    """Return a job's address below the gateway's."""
    return f"/v1/jobs/{quote(job_id, safe='')}"


def redis_only(what: str) -> NoReturn:
    """Refuse what a gateway offers to nobody."""
    raise InvalidRequest(f"{what} is an operator's: it needs a client of Redis itself")


def _view(answer: Answer) -> JobView:
    said = json.loads(answer.body)
    return JobView.model_validate_json(json.dumps({name: said[name] for name in JobView.model_fields if name in said}))
