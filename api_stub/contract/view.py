"""What `status` tells about a job at one moment, and which jobs of a tenant a request means.

`JobSelection` picks jobs by status, model and members of their metadata.
"""

from __future__ import annotations

import json
from typing import Final, Literal, Self

from pydantic import ValidationError, model_validator

from api_stub.contract.error import ErrorInfo, InvalidJob, explain
from api_stub.contract.job_fields import MAX_METADATA_BYTES, ModelName, TaskName
from api_stub.contract.result import Result, Usage
from api_stub.contract.status import JobStatus
from api_stub.contract.wire import ReadModel, WireModel


class JobView(ReadModel):
    """A job as the ledger knows it. Times are Redis' clock in seconds since 1970.

    `position`: how many jobs of the model are served before this one, as far as can be told now; absent for a job that
    is not in the queue or that waits for a delay to pass.
    `num_workers`: workers that serve the job's model right now; 0 means it waits for one to appear.
    `warnings`: what its producer should know while it waits, in words; absent when there is nothing.
    A final job has `result` (completed) or `error`, `partial_text` and `usage` (all other ends).
    """

    job_id: str
    task: TaskName | None = None
    model: str
    status: JobStatus
    cancelling: bool = False
    attempt: int = 0
    priority: int
    tenant: str = ""
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    position: int | None = None
    num_workers: int = 0
    warnings: tuple[str, ...] | None = None
    worker: str | None = None
    result: Result | None = None
    error: ErrorInfo | None = None
    partial_text: str | None = None
    usage: Usage | None = None


def paused(model: str) -> str:
    """Return the warning about a queued job whose model's queue is paused."""
    return f"the queue of the model {model!r} is paused; the job waits until an operator resumes it"


def unserved(model: str) -> str:
    """Return the warning about a queued job whose model no worker serves."""
    return f"no worker serves the model {model!r} now; the job waits for one"


Scalar = str | int | float | bool | None
#: Redis compares numbers as Lua does, as floats: from here on some whole numbers that differ are one.
_NUMBERS_END: Final = 2**53


class JobSelection(WireModel):
    """Jobs that are not final and have all that is given: at least one of these.

    `metadata`: members that a job's metadata must have, equal as JSON: text, numbers below 2^53, true, false or null.
    """

    status: Literal[JobStatus.QUEUED, JobStatus.IN_PROGRESS] | None = None
    model: ModelName | None = None
    metadata: dict[str, Scalar] | None = None

    @model_validator(mode="after")
    def _is_bounded(self) -> Self:
        if self.status is None and self.model is None and not self.metadata:
            raise ValueError("at least one of status, model and metadata is required")
        num_bytes = len(json.dumps(self.metadata, ensure_ascii=False).encode())
        if num_bytes > MAX_METADATA_BYTES:
            raise ValueError(f"metadata: {num_bytes} bytes of JSON, the limit is {MAX_METADATA_BYTES}")
        for name, value in (self.metadata or {}).items():
            if isinstance(value, int | float) and abs(value) >= _NUMBERS_END:
                raise ValueError(f"metadata: {name}: numbers from 2^53 on cannot be told apart; keep them as text")
        return self


def parse_selection(fields: dict[str, object]) -> JobSelection:
    """Check a selection. Raises InvalidJob that names the field."""
    try:
        return JobSelection.model_validate(fields)
    except ValidationError as error:
        raise InvalidJob(explain(error)) from error
