"""What operators do with many jobs at once, and the removal of one, as values like those of `calls`. No I/O.

Work on many jobs goes in bounded steps: each tells what the next one starts from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from api_stub.contract.status import JobStatus
from api_stub.contract.view import JobSelection
from api_stub.ledger.calls import Call
from api_stub.ledger.lua import Transition
from api_stub.ledger.rows import CancelledJobs, Deleted, QueueChange


@dataclass(frozen=True, slots=True)
class PurgeStep:
    """`first` and `cursor` are for the next step; a `cursor` of None: this was the last one."""

    first: str
    cursor: str | None
    num_ended: int


@dataclass(frozen=True, slots=True)
class CancelStep:
    """`cursor` is for the next step; None: this was the last one."""

    cursor: str | None
    done: CancelledJobs


def pause(model: str) -> Call[QueueChange]:
    """Let nobody claim a model's jobs."""
    return _pause(model, 1)


def resume(model: str) -> Call[QueueChange]:
    """Let a model's jobs be claimed again."""
    return _pause(model, 0)


def _pause(model: str, wanted: int) -> Call[QueueChange]:
    def parse(reply: list[int]) -> QueueChange:
        is_changed, depth, num_workers = reply
        return QueueChange(is_changed == 1, depth, num_workers)

    return Call(Transition.PAUSE, (model, wanted), parse)


def purge(model: str, former: PurgeStep | None) -> Call[PurgeStep]:
    """End some of a model's queued jobs, those that were there at the first step."""

    def parse(reply: list[Any]) -> PurgeStep:
        first, cursor, num_ended = reply
        return PurgeStep(first, cursor or None, num_ended)

    first, cursor = (former.first, former.cursor or "") if former is not None else ("", "")
    return Call(Transition.PURGE, (model, first, cursor), parse)


def cancel_jobs(tenant: str, wanted: JobSelection, former: CancelStep | None) -> Call[CancelStep]:
    """Ask for the end of some of a tenant's jobs that match."""

    def parse(reply: list[Any]) -> CancelStep:
        cursor, num_cancelled, num_cancelling = reply
        return CancelStep(cursor or None, CancelledJobs(num_cancelled, num_cancelling))

    status, metadata = wanted.status, wanted.metadata
    members = json.dumps(metadata, ensure_ascii=False) if metadata else ""
    cursor = former.cursor or "" if former is not None else ""
    where = (tenant, status.value if status else "", wanted.model or "", members)
    return Call(Transition.CANCEL_JOBS, (*where, cursor), parse)


def wish(model: str, former: str, new: str) -> Call[bool]:
    """Replace what operators want of a model's workers; False: it is not `former` any more."""
    return Call(Transition.WISH, (model, former, new), lambda reply: bool(reply == 1))


def delete(job_id: str) -> Call[Deleted]:
    """Remove row, events and result of a final job."""

    def parse(status: str) -> Deleted:
        if not status:
            return Deleted.UNKNOWN
        if status == Deleted.LINKED:
            return Deleted.LINKED
        return Deleted.DELETED if JobStatus(status).is_final else Deleted.UNFINISHED

    return Call(Transition.DELETE, (job_id,), parse)
