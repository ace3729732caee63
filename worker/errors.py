"""What can go wrong with a job, in three families that decide what happens next.

    WorkerError
    ├── RequestError          the request is wrong: the job fails at once, for good
    │   ├── InvalidRequest        invalid_request
    │   ├── ModelMismatch         model_mismatch
    │   ├── MediaNotFound         media_not_found
    │   ├── MediaForbidden        media_forbidden
    │   ├── MediaTooLarge         media_too_large
    │   ├── MediaCorrupt          media_corrupt
    │   ├── MediaUnsupported      media_unsupported
    │   ├── PromptTooLong         prompt_too_long
    │   └── DeadlineExceeded      deadline_exceeded
    ├── TransientError        the world is slow: the job may be tried again
    │   ├── StorageUnavailable    storage_unavailable
    │   └── OutOfMemory           out_of_memory
    ├── GenerationFailed      the engine gave one request up, for the reason it carries
    ├── EngineDead            the engine thread is gone: stop and be restarted
    └── CannotStart           a worker that cannot serve refuses to start, naming the setting

Messages name the thing, the limit and the value; never a credential, a signed URL or a stack trace.
"""

from __future__ import annotations

from typing import ClassVar

from api_stub.contract.error import ErrorCode, ErrorInfo


class WorkerError(Exception):
    """Root of everything the worker raises on purpose. `code` is what the producer sees."""

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL

    def info(self) -> ErrorInfo:
        """Return the error as it is stored with the job."""
        return ErrorInfo.of(self.code, str(self))


class RequestError(WorkerError):
    """The request is wrong; trying again would fail the same way."""


class InvalidRequest(RequestError):
    """Raised when a job cannot be understood or asks for what the model cannot do."""

    code = ErrorCode.INVALID_REQUEST


class ModelMismatch(RequestError):
    """Raised when a job's model name is not the one of the queue it came through."""

    code = ErrorCode.MODEL_MISMATCH


class MediaNotFound(RequestError):
    """Raised when the object, its version or its bucket does not exist."""

    code = ErrorCode.MEDIA_NOT_FOUND


class MediaForbidden(RequestError):
    """Raised when a bucket is not on the worker's allow-list or storage refuses the worker's credentials."""

    code = ErrorCode.MEDIA_FORBIDDEN


class MediaTooLarge(RequestError):
    """Raised when bytes, pixels, frames or seconds exceed the policy, before they are decoded."""

    code = ErrorCode.MEDIA_TOO_LARGE


class MediaCorrupt(RequestError):
    """Raised when an object claims to be of a known format and cannot be decoded."""

    code = ErrorCode.MEDIA_CORRUPT


class MediaUnsupported(RequestError):
    """Raised when an object is of no format that jobs may use, or is a clip where an image is due."""

    code = ErrorCode.MEDIA_UNSUPPORTED


class PromptTooLong(RequestError):
    """Raised when prompt and answer do not fit the model's context or the engine's rows."""

    code = ErrorCode.PROMPT_TOO_LONG


class DeadlineExceeded(RequestError):
    """Raised when a job's deadline passes while a worker holds it."""

    code = ErrorCode.DEADLINE_EXCEEDED


class TransientError(WorkerError):
    """The world is slow or full; the same job may succeed later."""


class StorageUnavailable(TransientError):
    """Raised when storage did not answer, or answered 5xx or 429, also after retries."""

    code = ErrorCode.STORAGE_UNAVAILABLE


class OutOfMemory(TransientError):
    """Raised when one request did not fit into the device's memory."""

    code = ErrorCode.OUT_OF_MEMORY


class GenerationFailed(WorkerError):
    """Raised when the engine gave one request up; carries the engine's own code and message."""

    def __init__(self, error: ErrorInfo) -> None:
        super().__init__(error.message)
        self._error = error

    def info(self) -> ErrorInfo:
        """Return the engine's error."""
        return self._error


class EngineDead(WorkerError):
    """Raised when the engine thread has ended; the process must be restarted."""


class CannotStart(WorkerError):
    """Raised at boot when a setting or the checkpoint makes serving impossible."""
