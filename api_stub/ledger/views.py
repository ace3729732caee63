"""The ledger's reads as values: one job, a page of jobs, a job's events. No I/O, and nothing changes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from api_stub.contract.event import FinalEvent, JobCompleted, parse_event
from api_stub.contract.status import JobStatus
from api_stub.contract.view import JobView, paused, unserved
from api_stub.ledger.calls import Call, task_of
from api_stub.ledger.lua import Transition

#: Jobs on one page at most.
MAX_PAGE: Final = 1000
_CURSOR: Final = re.compile(r"[0-9]{1,12}(\.[0-9]{1,9})?")


@dataclass(frozen=True, slots=True)
class JobPage:
    """Some jobs of a tenant, newest first. `next_cursor` is None on the last page.

    A page may hold fewer jobs than asked for, even none, and still have a next one: a page looks at a bounded number of
    jobs for those that match.
    """

    jobs: tuple[JobView, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Replay:
    """A job's events as JSON, oldest first, and how it ended, read in one step.

    `job.queued` is among them also while the stream has not begun, which it does when the job is claimed or ends.

    `is_known` is False when the job has no row: never submitted, not adopted yet, or expired.
    """

    is_known: bool
    ending: FinalEvent | None
    events: tuple[str, ...]


def view(job_id: str) -> Call[JobView | None]:
    """Read a job."""
    return Call(Transition.VIEW, (job_id,), lambda reply: _view(reply) if reply else None)


def list_jobs(
    tenant: str, status: JobStatus | None, model: str | None, cursor: str | None, limit: int
) -> Call[JobPage]:
    """Read a page of a tenant's jobs. Raises ValueError for a cursor that no page gave."""
    if cursor is not None and not _CURSOR.fullmatch(cursor):
        raise ValueError(f"cursor: not one that a page of jobs gave: {cursor[:40]!r}")

    def parse(reply: list[Any]) -> JobPage:
        return JobPage(tuple(_view(row) for row in reply[1:]), reply[0] or None)

    num = min(max(limit, 1), MAX_PAGE)
    return Call(Transition.LIST_JOBS, (tenant, status.value if status else "", model or "", cursor or "", num), parse)


def dead(limit: int) -> Call[tuple[JobView, ...]]:
    """Read the jobs that were given up, newest first."""
    return Call(Transition.DEAD, (limit,), lambda reply: tuple(_view(row) for row in reply))


def replay(job_id: str, after: int | None, limit: int | None = None) -> Call[Replay]:
    """Read a job's events after seq `after` (None: none of them), `limit` at most, and its ending."""

    def parse(reply: list[str]) -> Replay:
        status, final, *events = reply
        return Replay(bool(status), final_event(final) if final else None, tuple(events))

    return Call(Transition.REPLAY, (job_id, "" if after is None else f"{after + 1}-0", limit or ""), parse)


def _view(reply: list[Any]) -> JobView:
    job_id, status, task, model, priority, tenant, attempt, created, *rest = reply
    started, finished, worker, cancel, final, position, num_workers, is_paused = rest
    is_running = status == JobStatus.IN_PROGRESS
    known = JobView(
        job_id=job_id,
        task=task_of(task),
        model=model,
        status=JobStatus(status),
        cancelling=is_running and bool(cancel),
        attempt=int(attempt),
        priority=int(priority),
        tenant=tenant,
        created_at=float(created),
        started_at=float(started) if started else None,
        finished_at=float(finished) if finished else None,
        position=int(position) if position != "" else None,
        num_workers=int(num_workers),
        worker=worker or None,
        warnings=_warnings(model, status == JobStatus.QUEUED and not int(num_workers), bool(is_paused)),
    )
    return _with_ending(known, final_event(final)) if final else known


def _warnings(model: str, is_unserved: bool, is_paused: bool) -> tuple[str, ...] | None:
    warnings: tuple[str, ...] = (unserved(model),) if is_unserved else ()
    return (*warnings, paused(model)) if is_paused else warnings or None


def _with_ending(known: JobView, event: FinalEvent) -> JobView:
    if isinstance(event, JobCompleted):
        return known.model_copy(update={"result": event.result})
    ending = {"error": event.error, "partial_text": event.partial_text, "usage": event.usage}
    return known.model_copy(update=ending)


def final_event(raw: str) -> FinalEvent:
    """Read the final event that a finished job's row keeps as long as its result."""
    event = parse_event(raw)
    if not isinstance(event, FinalEvent):
        raise TypeError(f"not a final event: {event.type}")
    return event
