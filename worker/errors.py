"""The worker's errors, in three families that decide what happens to the job next.

    WorkerError
    ├── RequestError          the request is wrong: the job fails at once, for good
    │   ├── InvalidRequest        invalid_request
    │   ├── ModelMismatch         model_mismatch
    │   ├── MediaNotFound         media_not_found
    │   ├── MediaForbidden        media_forbidden
    │   │   └── MediaRefused          media_forbidden; storage may be refusing the worker instead of the object
    │   ├── MediaTooLarge         media_too_large
    │   ├── MediaCorrupt          media_corrupt
    │   ├── MediaUnsupported      media_unsupported
    │   ├── PromptTooLong         prompt_too_long
    │   └── DeadlineExceeded      deadline_exceeded
    ├── TransientError        something is slow or full: the job may be tried again
    │   ├── StorageUnavailable    storage_unavailable
    │   │   ├── StorageRefuses        storage_unavailable: storage refuses this worker, whatever it asks for
    │   │   └── DiskFailed            storage_unavailable: nothing can be written on the worker's disk
    │   ├── OutOfMemory           out_of_memory
    │   │   └── DecoderOutOfMemory    out_of_memory
    │   └── DecoderFailed         internal: a decoder's own program fails
    ├── GenerationFailed      the engine ended one request with an error, which it carries
    ├── Unforeseen            internal: an exception of no class that is expected
    ├── EngineDead            the engine thread is gone: stop and be restarted
    └── CannotStart           a worker that cannot serve refuses to start, naming the setting

An error names the worker's `component` that may be at fault. Whether that component fails every job, or only this one,
worker.jobs.circuit finds out.

Messages name the thing, the limit and the value; never a credential, a signed URL or a stack trace.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from api_stub.contract.error import ErrorCode, ErrorInfo


class Component(StrEnum):
    """A component of the worker whose fault would fail every job. The values are a metric's label."""

    STORAGE = "storage"
    DISK = "disk"
    DECODERS = "decoders"
    ENGINE = "engine"
    PROGRAM = "program"  # the code between the others: any unexpected exception


class WorkerError(Exception):
    """Root of everything the worker raises on purpose.

    code: what the producer sees.
    component: the worker's component that may be at fault; None when the fault is the job's own.
    is_proven: every job would meet this fault.
    """

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL
    component: Component | None = None
    is_proven: bool = False

    def info(self) -> ErrorInfo:
        """Return the error in the form that is stored with the job."""
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
    """Raised when a bucket is not on the worker's allow-list or storage refuses the object and serves others."""

    code = ErrorCode.MEDIA_FORBIDDEN


class MediaRefused(MediaForbidden):
    """Raised when storage refuses an object to a worker that it has not served any object of that bucket yet."""

    component = Component.STORAGE


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
    """Something that the worker depends on is slow or full; the same job may succeed later."""


class StorageUnavailable(TransientError):
    """Raised when storage did not answer, or answered 5xx or 429, also after retries."""

    code = ErrorCode.STORAGE_UNAVAILABLE
    component = Component.STORAGE


class StorageRefuses(StorageUnavailable):
    """Raised when storage refuses the worker what it served it before. `is_proven`: S3's code names the credentials."""

    def __init__(self, message: str, *, is_proven: bool = False) -> None:
        super().__init__(message)
        self.is_proven = is_proven


class DiskFailed(StorageUnavailable):
    """Raised when a job's files cannot be written."""

    component = Component.DISK


class OutOfMemory(TransientError):
    """Raised when one request did not fit into the device's memory."""

    code = ErrorCode.OUT_OF_MEMORY
    component = Component.ENGINE


class DecoderOutOfMemory(OutOfMemory):
    """Raised when no process to decode media can be started, or the system ended one."""

    component = Component.DECODERS


class DecoderFailed(TransientError):
    """Raised when a decoder's own program fails: it does not start, or has a defect."""

    component = Component.DECODERS


class GenerationFailed(WorkerError):
    """Raised when the engine ended one request with an error; carries the engine's own code and message."""

    def __init__(self, error: ErrorInfo) -> None:
        super().__init__(error.message)
        self._error = error
        self.component = Component.ENGINE if error.code in (ErrorCode.INTERNAL, ErrorCode.OUT_OF_MEMORY) else None

    def info(self) -> ErrorInfo:
        """Return the engine's error."""
        return self._error


class Unforeseen(WorkerError):
    """Wraps an unexpected exception."""

    component = Component.PROGRAM


class EngineDead(WorkerError):
    """Raised when the engine thread has ended; the process must be restarted."""


class CannotStart(WorkerError):
    """Raised at boot when a setting or the checkpoint makes serving impossible."""
