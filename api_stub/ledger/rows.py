"""What goes into the ledger and what comes out of it: plain frozen values, no I/O.

A job's row is written by the Lua scripts only; Python sees these values and never the row itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from api_stub.contract.event import RunningBody
from api_stub.contract.job import TaskName


class JobConflict(Exception):
    """Raised when a job id already belongs to another body."""


class LedgerFull(Exception):
    """Raised when the admission limit of a model is reached. Nothing was written.

    `retry_after_s` is a suggestion: how soon it makes sense to ask again.
    """

    def __init__(self, model: str, limit: int, depth: int, retry_after_s: float) -> None:
        super().__init__(f"model {model!r}: {depth} jobs are queued or running, the limit is {limit}")
        self.model, self.limit, self.depth, self.retry_after_s = model, limit, depth, retry_after_s


class StrangeModel(LedgerFull):
    """Raised for one name too many that no worker has served. Nothing was written."""

    def __init__(self, model: str, tenant: str, limit: int, retry_after_s: float) -> None:
        super().__init__(model, limit, limit, retry_after_s)
        self.args = (
            f"model {model!r}: no worker has served it, and jobs of tenant {tenant!r} wait under {limit} such names, "
            "the limit; check the name",
        )


class CannotRetry(Exception):
    """Raised when no new job can be made of an old one: it is not finished, or it had no valid body."""


class Submission(StrEnum):
    """What `submit` and `adopt` did."""

    CREATED = "created"
    SAME = "same"
    HELD = "held"  # it waits until it is its tenant's turn; only then the ledger rings for it


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that now belongs to one worker, until its lease ends.

    `body` is the job's JSON, empty when the job was adopted without a valid one. `fence` is greater than that of every
    earlier claim that Redis remembers, and equal to none, not even to one that it has forgotten. `deadline_left_s` is
    None for a job without a deadline. `queued_s` counts from the moment the job was last queued, `age_s` from its
    submission. `num_retries`: how often it was given back for a fault that may be
    its own.
    """

    job_id: str
    task: TaskName | None
    model: str
    body: str
    attempt: int
    fence: int
    deadline_left_s: float | None
    queued_s: float
    age_s: float
    num_retries: int = 0


class RefusalReason(StrEnum):
    """Why a doorbell rang for nothing."""

    UNKNOWN = "unknown"  # no such job: never submitted, or its row has expired
    BUSY = "busy"  # another claim holds it, or it was given back and its delay is not over
    FINAL = "final"  # completed or failed
    CANCELLED = "cancelled"
    HELD = "held"  # its queue is paused, or its tenant at its cap; the ledger rings when it is its turn
    APART = "apart"  # it lost workers before and must not run beside others that did; a reaper rings soon
    EXPIRED = "expired"  # the deadline passed in the queue, perhaps just now


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer to a claim that gave no job."""

    reason: RefusalReason


class Hold(StrEnum):
    """What a beat says about one held job."""

    HELD = "held"  # the lease is extended
    LOST = "lost"  # it is not this fence's job any more: stop, publish nothing
    CANCEL = "cancel"  # still held, but asked to stop


@dataclass(frozen=True, slots=True)
class Publication:
    """One event of a running attempt.

    `number` starts at 1 and grows within the attempt; a number that was already written is skipped, so that a call
    whose reply was lost can be repeated.
    """

    job_id: str
    fence: int
    number: int
    body: RunningBody


class Finished(StrEnum):
    """What `finish` did."""

    DONE = "done"
    ALREADY = "already"  # this fence had finished the job before: its first reply was lost
    LOST = "lost"  # the job is not this fence's any more; nothing was written


class Cancelled(StrEnum):
    """What `cancel` did."""

    UNKNOWN = "unknown"
    CANCELLED = "cancelled"  # it was queued and is final now
    CANCELLING = "cancelling"  # it is running and its worker was asked to stop
    FINAL = "final"  # it had ended before


class Deleted(StrEnum):
    """What `delete` did."""

    UNKNOWN = "unknown"
    DELETED = "deleted"
    UNFINISHED = "unfinished"  # it is queued or running; nothing was changed
    LINKED = "linked"  # a worker has yet to send its `link`, `link_error` or the rest of its chain; nothing was changed


@dataclass(frozen=True, slots=True)
class QueueChange:
    """What `pause` and `resume` did: `is_changed` is False when the queue was paused, or not, already.

    `depth`: the model's queued and running jobs. `num_workers`: workers that serve it.
    """

    is_changed: bool
    depth: int
    num_workers: int


@dataclass(frozen=True, slots=True)
class CancelledJobs:
    """What `cancel_jobs` did: `num_cancelled` were queued and have ended, `num_cancelling` run and were told."""

    num_cancelled: int
    num_cancelling: int

    def __add__(self, other: CancelledJobs) -> CancelledJobs:
        """Return the sums."""
        return CancelledJobs(self.num_cancelled + other.num_cancelled, self.num_cancelling + other.num_cancelling)


@dataclass(frozen=True, slots=True)
class Bell:
    """A doorbell that a sweep has written: the job is queued, and no message had announced it."""

    job_id: str
    task: TaskName | None
    model: str
    priority: int


@dataclass(frozen=True, slots=True)
class Sweep:
    """One pass of a reaper. `is_complete` is False when more was due than one pass looks at."""

    bells: tuple[Bell, ...]
    is_complete: bool
