"""Error codes and the error value that results, events and HTTP carry.

A message names the thing, the limit and the value; never a credential, a signed URL or a stack trace.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from pydantic import ValidationError

from api_stub.contract.wire import ReadModel


class ErrorCode(StrEnum):
    """Why a job has no answer. Stable: programs branch on these."""

    INVALID_REQUEST = "invalid_request"
    MEDIA_NOT_FOUND = "media_not_found"
    MEDIA_FORBIDDEN = "media_forbidden"
    MEDIA_TOO_LARGE = "media_too_large"
    MEDIA_CORRUPT = "media_corrupt"
    MEDIA_UNSUPPORTED = "media_unsupported"
    STORAGE_UNAVAILABLE = "storage_unavailable"
    PROMPT_TOO_LONG = "prompt_too_long"
    MODEL_MISMATCH = "model_mismatch"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    QUEUE_FULL = "queue_full"
    QUEUE_PAUSED = "queue_paused"
    NO_WORKER = "no_worker"
    OUT_OF_MEMORY = "out_of_memory"
    POISON_JOB = "poison_job"
    INTERNAL = "internal"


#: Codes for which the same job, submitted again later, may well succeed.
RETRYABLE_CODES: Final = frozenset(
    {
        ErrorCode.STORAGE_UNAVAILABLE,
        ErrorCode.DEADLINE_EXCEEDED,
        ErrorCode.EXPIRED,
        ErrorCode.QUEUE_FULL,
        ErrorCode.QUEUE_PAUSED,
        ErrorCode.NO_WORKER,
        ErrorCode.OUT_OF_MEMORY,
        ErrorCode.INTERNAL,
    }
)


#: Fields whose values may hold credentials, signed URLs or whatever a producer keeps there.
_SECRETIVE: Final = frozenset({"webhook", "media", "uri", "metadata"})
#: Problems whose input is not the value of a known field.
_UNKNOWN: Final = frozenset({"extra_forbidden", "json_invalid"})


#: Details of one error.
MAX_DETAILS: Final = 100


class ErrorDetail(ReadModel):
    """One fault of a data set: its file, the line (from 1) if it is about one, and what is wrong."""

    file: str
    line: int | None = None
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.message}"


class ErrorInfo(ReadModel):
    """A coded error. `retryable`: the same job may succeed when it is submitted again.

    `details`: what is wrong with a data set, at most MAX_DETAILS; absent for other errors.
    """

    code: ErrorCode
    message: str
    retryable: bool
    details: tuple[ErrorDetail, ...] | None = None

    @classmethod
    def of(cls, code: ErrorCode, message: str) -> ErrorInfo:
        """Make the error for `code`, with the code's usual `retryable`."""
        return cls(code=code, message=message, retryable=code in RETRYABLE_CODES)


class InvalidJob(ValueError):
    """Raised when a job breaks the contract. `str()` names the field, the limit and the value."""


def explain(error: ValidationError, *, tags: frozenset[str] = frozenset(), max_problems: int = 5) -> str:
    """Return one clause per problem of a pydantic error: field, what was wrong, the value unless it may be secret.

    `tags` are the union discriminators that pydantic puts into its paths and no producer wrote.
    """
    problems = []
    for problem in error.errors(include_url=False)[:max_problems]:
        field = ".".join(_shortened(str(part)) for part in problem["loc"] if part not in tags)
        if problem["type"] == "value_error":
            text = str(problem["ctx"]["error"])
        elif problem["type"] == "missing":
            text = "required"
        else:
            text = problem["msg"]
            if _may_be_shown(problem["loc"], problem["type"], problem["input"]):
                text += f" (got {_brief(problem['input'])})"
        problems.append(f"{field}: {text}" if field else text)
    left_out = error.error_count() - len(problems)
    return "; ".join(problems) + (f"; and {left_out} more" if left_out > 0 else "")


def _may_be_shown(place: tuple[int | str, ...], kind: str, value: object) -> bool:
    """Say whether a message may repeat a value: a scalar of a known field in which no secret is expected."""
    if kind in _UNKNOWN or not _SECRETIVE.isdisjoint(place):
        return False
    return value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and "://" not in value)


def _brief(value: object) -> str:
    return _shortened(repr(value))


def _shortened(text: str, max_chars: int = 80) -> str:
    """A producer's own field names are part of paths, and as long as it likes."""
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"
