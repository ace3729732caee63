"""The ledger's transitions as values: which script to run, with which arguments, and how to read its reply.

No I/O: `Ledger` and `AsyncLedger` execute the same calls. Every call may be repeated after a lost reply.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from api_stub.contract.error import ErrorInfo
from api_stub.contract.event import (
    CompletedBody,
    FinalBody,
    RetryReason,
    body_fragment,
)
from api_stub.contract.job import Job, TaskName, digest, earlier_json
from api_stub.contract.names import list_id, priority_step, queue_model, split_model
from api_stub.contract.result import celery_failure
from api_stub.contract.status import JobStatus
from api_stub.ledger.lua import Transition
from api_stub.ledger.rows import (
    Bell,
    Cancelled,
    CannotRetry,
    Claim,
    Finished,
    Hold,
    JobConflict,
    LedgerFull,
    Publication,
    Refusal,
    RefusalReason,
    StrangeModel,
    Submission,
    Sweep,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One script run. `parse` reads Redis' reply (text replies) and may raise what the transition raises."""

    transition: Transition
    args: tuple[str | int | float, ...]
    parse: Callable[[Any], T]


def task_of(name: str) -> TaskName | None:
    """Return the task that a row or a reply names; None without one, or for one that another release has added."""
    return TaskName(name) if name in set(TaskName) else None


#: What a producer that was turned away is told to wait.
RETRY_AFTER_S: Final = 5.0


def submit(job_id: str, job: Job) -> Call[Submission]:
    """Write a new job and its doorbell. Raises JobConflict, LedgerFull, StrangeModel."""
    return _create(job_id, job.resolved(job_id), job.task, queue_model(job.model), job.priority, "client")


def adopt(
    job_id: str, *, task: TaskName, model: str, job: Job | None, priority: int, links: str = ""
) -> Call[Submission]:
    """Write the job of a plain Celery message that was just delivered. Raises JobConflict."""
    return _create(job_id, job and job.resolved(job_id), task, model, min(max(priority, 0), 9), "broker", links)


def _create(
    job_id: str, job: Job | None, task: TaskName, model: str, priority: int, origin: str, links: str = ""
) -> Call[Submission]:
    def parse(reply: list[str]) -> Submission:
        if reply[0] == "conflict":
            raise JobConflict(f"job {job_id!r} exists with another body")
        if reply[0] == "full":
            raise LedgerFull(model, int(reply[1]), int(reply[2]), RETRY_AFTER_S)
        if reply[0] == "strange":
            raise StrangeModel(model, tenant, int(reply[1]), RETRY_AFTER_S)
        return Submission(reply[0])

    body, mark = (job.to_json(), digest(job)) if job else ("", "")
    former = hashlib.sha1(earlier_json(job).encode(), usedforsecurity=False).hexdigest() if job else ""
    tenant, deadline_s = (job.tenant, job.deadline_s) if job else ("", None)
    _, adapter = split_model(job.model) if job else ("", "")
    where = list_id(model, priority_step(priority))
    return Call(
        Transition.SUBMIT,
        (
            job_id,
            mark,
            body,
            task.value,
            model,
            priority,
            where,
            tenant,
            deadline_s or "",
            origin,
            *_hook(job),
            former,
            links,
            adapter,
        ),
        parse,
    )


def _hook(job: Job | None) -> tuple[str, str]:
    """Return a webhook's address and its events as the scripts look them up: each between commas."""
    if job is None or job.webhook is None:
        return "", ""
    return str(job.webhook.url), f",{','.join(job.webhook.events)},"


def claim(
    job_id: str, worker: str, token: str, checkpoint: str = "", adapters: Mapping[str, str] | None = None
) -> Call[Claim | Refusal]:
    """Take a queued job. `token` is new for each delivery of a doorbell; a repeated call carries the same.

    checkpoint: digest of the weights that will answer, for `job.started`. adapters: digests of the adapters, by name.
    """

    def parse(reply: list[str]) -> Claim | Refusal:
        if reply[0] != "claimed":
            return Refusal(RefusalReason(reply[0]))
        _, task, model, body, attempt, fence, left_s, queued_s, age_s, retries = reply
        return Claim(
            job_id=job_id,
            task=task_of(task),
            model=model,
            body=body,
            attempt=int(attempt),
            fence=int(fence),
            deadline_left_s=float(left_s) if left_s else None,
            queued_s=float(queued_s),
            age_s=float(age_s),
            num_retries=int(retries),
        )

    pairs = (text for pair in (adapters or {}).items() for text in pair)
    return Call(Transition.CLAIM, (job_id, worker, token, checkpoint, *pairs), parse)


def beat(worker: str, model: str, held: Sequence[tuple[str, int]], serves: str = "") -> Call[tuple[Hold, ...]]:
    """Prove that a worker lives and extend the leases of the (job id, fence) pairs it holds.

    serves: JSON of what it serves, for `names.serves_key`; empty: nothing to tell.
    """
    pairs = (field for pair in held for field in pair)
    return Call(Transition.BEAT, (worker, model, serves, *pairs), lambda reply: tuple(Hold(answer) for answer in reply))


def loading(model: str) -> Call[None]:
    """Make a model's name known before a worker has served it."""
    return Call(Transition.LOADING, (model,), lambda reply: None)


def known(asked: str = "") -> Call[frozenset[str]]:
    """Read the names that workers serve or did in the last day; one that is asked for is looked at by itself, too."""
    return Call(Transition.KNOWN, (asked,), lambda reply: frozenset(map(str, reply)))


def leave(worker: str, model: str) -> Call[None]:
    """Take a worker off the list of those that serve a model."""
    return Call(Transition.LEAVE, (worker, model), lambda reply: None)


def publish(publications: Sequence[Publication]) -> Call[tuple[bool, ...]]:
    """Write one step's events, in order; False for those whose job is not this fence's any more."""
    rows = (field for p in publications for field in (p.job_id, p.fence, p.number, body_fragment(p.body)))
    return Call(Transition.PUBLISH, tuple(rows), lambda reply: tuple(answer == 1 for answer in reply))


def finish(job_id: str, fence: int, body: FinalBody) -> Call[Finished]:
    """End a job: row, Celery result and final event."""
    status = JobStatus(body.type.removeprefix("job."))
    outcome = body.result.to_json() if isinstance(body, CompletedBody) else _failure_json(body.error)
    return Call(Transition.FINISH, (job_id, fence, status.value, body_fragment(body), outcome), Finished)


def give_back(job_id: str, fence: int, reason: RetryReason, delay_s: float, is_charged: bool) -> Call[bool]:
    """Queue a held job again, to be rung after `delay_s`."""
    args = (job_id, fence, reason.value, delay_s, int(is_charged))
    return Call(Transition.GIVE_BACK, args, lambda reply: bool(reply == 1))


def keep(job_id: str, fence: int, step: int) -> Call[bool]:
    """Note that training can go on from a step."""
    return Call(Transition.KEEP, (job_id, fence, step), lambda reply: bool(reply == 1))


def cancel(job_id: str) -> Call[Cancelled]:
    """End a queued job, or ask a running one to stop."""
    return Call(Transition.CANCEL, (job_id,), Cancelled)


def retry(job_id: str, new_id: str) -> Call[str | None]:
    """Make a new job of a finished one; None when the job is unknown. Raises CannotRetry, LedgerFull."""

    def parse(reply: list[Any]) -> str | None:
        answer, *rest = reply
        if answer == "unfinished":
            raise CannotRetry(f"job {job_id!r} is {rest[0]}; only a finished job can be tried again")
        if answer == "invalid":
            raise CannotRetry(f"job {job_id!r} had no valid body")
        if answer == "full":
            raise LedgerFull(str(rest[0]), int(rest[1]), int(rest[2]), RETRY_AFTER_S)
        return str(rest[0]) if rest else None

    return Call(Transition.RETRY, (job_id, new_id), parse)


def drop(job_id: str) -> Call[bool]:
    """Take a job off the dead list."""
    return Call(Transition.DROP, (job_id,), lambda reply: bool(reply > 0))


def ring_again(job_ids: Sequence[str]) -> Call[int]:
    """Write the doorbells of waiting jobs again, taken by a worker that will not answer them."""
    return Call(Transition.RING_AGAIN, tuple(job_ids), int)


def reap(pause_s: float = 0.0) -> Call[Sweep]:
    """Sweep once, unless another sweep that passed a pause is younger than `pause_s`."""

    def parse(reply: list[Any]) -> Sweep:
        fields = [str(field) for field in reply[1:]]
        bells = (
            Bell(job_id, task_of(task), model, int(priority))
            for job_id, task, model, priority in zip(*[iter(fields)] * 4, strict=True)
        )
        return Sweep(bells=tuple(bells), is_complete=reply[0] == 0)

    return Call(Transition.REAP, (pause_s,), parse)


def _failure_json(error: ErrorInfo) -> str:
    return json.dumps(celery_failure(error), ensure_ascii=False)
