"""What `status` tells about a job at one moment."""

from __future__ import annotations

from api_stub.contract.error import ErrorInfo
from api_stub.contract.job import TaskName
from api_stub.contract.result import Result, Usage
from api_stub.contract.status import JobStatus
from api_stub.contract.wire import ReadModel


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
