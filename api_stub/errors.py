"""What a producer may catch.

    VisionqError
    ├── InvalidSettings     an environment variable has a bad value
    ├── InvalidRequest      the job breaks the contract; nothing was enqueued
    ├── QueueFull           the model's admission limit is reached; try again later
    ├── UnknownJob          no such job (never submitted, not adopted yet, or its record has expired)
    ├── AccessRefused       the gateway does not know the key, or the key may not do this
    ├── StoreUnavailable    Redis, S3 or the gateway did not answer in time; the same call may be repeated
    ├── StorageRefused      S3 answered no: bucket, credentials or permission are wrong
    ├── WrongEventLoop      an AsyncClient was used on another event loop than at first; also a RuntimeError
    ├── StreamRestarted     a new attempt's text differs from what was already yielded
    └── JobFailed           the job ended without a result

Each has a stable `code`. Waiting too long is Python's own TimeoutError.
Celery consumers find JobFailed here too: failed results are stored as this module's exception.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # whoever only meets a failed job needs no pydantic
    from api_stub.contract.error import ErrorDetail


class VisionqError(Exception):
    """Root of everything this package raises on purpose."""

    code: str = "error"


class InvalidSettings(VisionqError):
    """Raised when a setting has a bad value. `str()` names the variable."""

    code = "invalid_settings"


class InvalidRequest(VisionqError):
    """Raised when a job breaks the contract, or its id already belongs to another body."""

    code = "invalid_request"


class QueueFull(VisionqError):
    """Raised when the admission limit of the job's model is reached. Nothing was enqueued.

    `retry_after_s` is a suggestion: how soon it makes sense to ask again.
    """

    code = "queue_full"

    def __init__(self, message: str, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnknownJob(VisionqError):
    """Raised when the ledger has no such job."""

    code = "unknown_job"


class AccessRefused(VisionqError):
    """Raised when a gateway does not know the API key, or the key may not do what was asked."""

    code = "access_refused"


class StoreUnavailable(VisionqError):
    """Raised when Redis, S3 or the gateway did not answer. A submit may be repeated with the same job id."""

    code = "store_unavailable"


class StorageRefused(VisionqError):
    """Raised when S3 answers that the bucket, the credentials or the permission are wrong."""

    code = "storage_refused"


class WrongEventLoop(VisionqError, RuntimeError):
    """Raised when an AsyncClient is used on another event loop than at first: its connections belong to that one."""

    code = "wrong_event_loop"


class StreamRestarted(VisionqError):
    """Raised by `stream()` when a new attempt's text differs from the text already yielded."""

    code = "stream_restarted"


class JobFailed(VisionqError):
    """Raised when a job ended without a result: failed, expired or cancelled.

    `code` is one of the contract's error codes; `retryable` tells whether the same job may succeed later. `details`:
    what is wrong with a data set; Celery consumers get none.
    """

    def __init__(self, code: str, message: str, retryable: bool = False, details: tuple[ErrorDetail, ...] = ()) -> None:
        super().__init__(code, message, retryable)
        self.code = code
        self.message = message
        self.retryable = retryable
        self.details = details

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"
