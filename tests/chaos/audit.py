"""What became of every job, read from Redis itself once all is quiet, and every way in which that breaks a promise."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import redis

from api_stub.contract import names
from api_stub.contract.event import (
    Event,
    FinalEvent,
    JobCompleted,
    JobRetrying,
    JobStarted,
    OutputDelta,
    parse_event,
)
from api_stub.contract.status import CELERY_STATES, JobStatus
from tests.chaos.workload import Plan, Ticket

#: Ends other than an answer that a plan allows. Storage that is broken for longer than a job's retries ends the job.
_STORAGE: Final = "storage_unavailable"
ALLOWED_CODES: Final[dict[Plan, frozenset[str]]] = {
    Plan.PLAIN: frozenset({_STORAGE}),
    Plan.ORPHAN: frozenset({_STORAGE}),
    Plan.CANCEL_QUEUED: frozenset({_STORAGE, "cancelled"}),
    Plan.CANCEL_RUNNING: frozenset({_STORAGE, "cancelled"}),
    Plan.DEADLINE: frozenset({_STORAGE, "expired", "deadline_exceeded"}),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One job at the end. `events` is its whole stream."""

    ticket: Ticket
    status: str
    code: str
    attempt: int
    losses: int
    events: tuple[Event, ...]

    @property
    def final_at(self) -> float:
        """When it ended, by Redis' clock."""
        return self.events[-1].ts


@dataclass(frozen=True, slots=True)
class Handover:
    """An attempt that ended without a result, and the next: seconds since 1970. `worker` is who had the job before."""

    worker: str
    reason: str
    retrying_at: float
    restarted_at: float


def is_quiet(direct: redis.Redis, job_ids: Iterable[str]) -> bool:
    """Tell whether every known job is final."""
    with direct.pipeline(transaction=False) as asked:
        for job_id in job_ids:
            asked.hget(names.job_key(job_id), "status")
        statuses = asked.execute()
    return all(status is None or JobStatus(status).is_final for status in statuses)


def read_outcomes(direct: redis.Redis, tickets: Sequence[Ticket]) -> tuple[list[Outcome], list[str]]:
    """Return what became of the jobs, and the broken promises."""
    outcomes, problems = [], []
    for ticket in tickets:
        problems += [f"{ticket.job_id}: {problem}" for problem in ticket.problems]
        outcome = _outcome(direct, ticket)
        if outcome is not None:
            outcomes.append(outcome)
            problems += [f"{ticket.job_id} ({ticket.plan.value}): {p}" for p in _broken_promises(direct, outcome)]
        elif ticket.is_submitted:
            problems.append(f"{ticket.job_id} ({ticket.plan.value}): lost, the ledger does not know it")
    return outcomes, problems


def num_known(direct: redis.Redis, job_ids: Iterable[str]) -> int:
    """How many of these the ledger knows."""
    return sum(int(direct.exists(names.job_key(job_id))) for job_id in job_ids)


def events_of(direct: redis.Redis, job_id: str) -> tuple[Event, ...]:
    """Return a job's whole stream."""
    entries: list[tuple[str, dict[str, str]]] = direct.xrange(names.events_key(job_id))  # type: ignore[assignment]
    return tuple(parse_event(fields["event"]) for _, fields in entries)


def _outcome(direct: redis.Redis, ticket: Ticket) -> Outcome | None:
    row = direct.hgetall(names.job_key(ticket.job_id))
    if not row:
        return None
    events = events_of(direct, ticket.job_id)
    final = events[-1] if events and isinstance(events[-1], FinalEvent) else None
    code = "" if final is None or isinstance(final, JobCompleted) else final.error.code.value
    return Outcome(ticket, str(row["status"]), code, int(row["attempt"]), int(row["losses"]), events)


def _broken_promises(direct: redis.Redis, outcome: Outcome) -> list[str]:
    if not JobStatus(outcome.status).is_final:
        return [f"not final but {outcome.status}; events: {[event.type for event in outcome.events][-6:]}"]
    return [
        *_stream_problems(outcome),
        *_result_problems(direct, outcome),
        *_answer_problems(outcome),
        *_reader_problems(outcome),
    ]


def _stream_problems(outcome: Outcome) -> list[str]:
    problems = []
    events = outcome.events
    if [event.seq for event in events] != list(range(1, len(events) + 1)):
        problems.append("the numbers of its events have gaps or repeat")
    if (count := sum(isinstance(event, FinalEvent) for event in events)) != 1:
        problems.append(f"{count} final events")
    elif not isinstance(events[-1], FinalEvent) or events[-1].type != f"job.{outcome.status}":
        problems.append(f"it is {outcome.status} and its last event is {events[-1].type}")
    if any(before.attempt > after.attempt for before, after in pairwise(events)):
        problems.append("an older attempt spoke after a newer one")
    return problems


def _result_problems(direct: redis.Redis, outcome: Outcome) -> list[str]:
    raw = direct.get(names.result_key(outcome.ticket.job_id))
    if raw is None:
        return ["no Celery result"]
    meta = json.loads(raw)
    if meta["status"] != CELERY_STATES[JobStatus(outcome.status)].value:
        return [f"it is {outcome.status} and its Celery result is {meta['status']}"]
    final = outcome.events[-1]
    if isinstance(final, JobCompleted) and meta["result"]["text"] != final.result.text:
        return ["Celery's result and the final event have different texts"]
    return []


def _answer_problems(outcome: Outcome) -> list[str]:
    final, plan = outcome.events[-1], outcome.ticket.plan
    if not isinstance(final, JobCompleted):
        return [] if outcome.code in ALLOWED_CODES[plan] else [f"ended with {outcome.code}: {final!r:.300}"]
    text = final.result.text
    said = "".join(e.text for e in outcome.events if isinstance(e, OutputDelta) and e.attempt == outcome.attempt)
    problems = [] if said == text else [f"its deltas say {said!r:.80} and its result {text!r:.80}"]
    has_known_answer = plan in (Plan.PLAIN, Plan.ORPHAN, Plan.CANCEL_QUEUED)
    if has_known_answer and text != outcome.ticket.request.text:
        problems.append(f"wrong answer {text!r:.80}, without faults it is {outcome.ticket.request.text!r:.80}")
    return problems


def _reader_problems(outcome: Outcome) -> list[str]:
    ticket, final = outcome.ticket, outcome.events[-1]
    if not ticket.num_visits:
        return []  # nobody was to read it
    if ticket.read_text is None and ticket.read_code is None:
        return [] if ticket.problems else ["its reader never came to an end"]
    if isinstance(final, JobCompleted):
        return [] if ticket.read_text == final.result.text else [f"its reader has {ticket.read_text!r:.80}"]
    return (
        [] if ticket.read_code == outcome.code else [f"it ended with {outcome.code}, its reader saw {ticket.read_code}"]
    )


def count_problems(
    direct: redis.Redis, outcomes: Sequence[Outcome], published: Counter[str], num_before: int, num_adopted: int = 0
) -> list[str]:
    """Compare the ledger's own counters and the published results with the jobs there are.

    `num_adopted` were made of plain messages: they end as others do and nobody has submitted them.
    """
    counts = {name: int(value) for name, value in direct.hgetall(names.COUNTS_KEY).items()}
    ended = sum(counts.get(status.value, 0) for status in JobStatus if status.is_final)
    expected = len(outcomes) + num_before
    problems = [f"{published[job]} results were published for {job}" for job in published if published[job] > 1]
    if counts.get("submitted", 0) != expected:
        problems.append(f"the ledger counts {counts.get('submitted', 0)} submitted jobs, there are {expected}")
    if ended != expected + num_adopted:
        problems.append(f"the ledger counts {ended} ended jobs, there are {expected + num_adopted}")
    return problems


def handovers(outcomes: Iterable[Outcome]) -> list[Handover]:
    """Return every change of a job from one attempt to the next."""
    found = []
    for outcome in outcomes:
        worker, retrying = "", None
        for event in outcome.events:
            if isinstance(event, JobRetrying):
                retrying = event
            elif isinstance(event, JobStarted):
                if retrying is not None:
                    found.append(Handover(worker, retrying.reason.value, retrying.ts, event.ts))
                worker, retrying = event.worker, None
    return found
