"""What the ledger's tests share: jobs, endings, readers of what the ledger wrote."""

from __future__ import annotations

import json

import redis

from api_stub.contract import names
from api_stub.contract.error import ErrorCode, ErrorInfo
from api_stub.contract.event import CompletedBody, DeltaBody, Event, FailedBody, parse_event
from api_stub.contract.job import Job, VqaJob
from api_stub.contract.result import FinishReason, Result, Timings, Usage
from api_stub.ledger.census import kind_of
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.lua import Transition, script
from api_stub.ledger.rows import Bell, Claim, Publication
from api_stub.ledger.settings import LedgerConfig
from api_stub.ledger.views import replay
from tests.servers import eventually

#: Leases and graces that are over before the next look.
HASTY = LedgerConfig(lease_s=0.005, grace_s=0.005, max_attempts=2)


_REPLAY = script(Transition.REPLAY, LedgerConfig())


def question(text: str = "What colour is it?", **fields: object) -> Job:
    return VqaJob.model_validate({"question": text} | fields)


def claimed(ledger: Ledger, job_id: str, worker: str = "worker-1") -> Claim:
    claim = ledger.claim(job_id, worker)
    assert isinstance(claim, Claim), claim
    return claim


def started(ledger: Ledger, job_id: str, **fields: object) -> Claim:
    """Submit and claim."""
    ledger.submit(job_id, question(**fields))
    return claimed(ledger, job_id)


def answer(claim: Claim, text: str = "red") -> CompletedBody:
    assert claim.task is not None
    return CompletedBody(
        result=Result(
            job_id=claim.job_id,
            task=claim.task,
            model=claim.model,
            text=text,
            finish_reason=FinishReason.STOP,
            usage=Usage(prompt_tokens=9, completion_tokens=1),
            timings=Timings(queued_s=claim.queued_s),
            attempt=claim.attempt,
        )
    )


def failure(message: str = "it broke") -> FailedBody:
    return FailedBody(error=ErrorInfo.of(ErrorCode.INTERNAL, message))


def delta(claim: Claim, number: int, text: str, offset: int = 0, num_tokens: int = 1) -> Publication:
    return Publication(claim.job_id, claim.fence, number, DeltaBody(text=text, offset=offset, num_tokens=num_tokens))


def events(client: redis.Redis, job_id: str) -> list[Event]:
    """The job's events as a reader gets them; asserts that `seq` starts at 1 without gaps, and all are in the stream.

    Of a job that nobody has claimed yet there is one, and no stream.
    """
    call = replay(job_id, after=0)
    replayed = call.parse(client.register_script(_REPLAY)(args=call.args)).events
    stream = [parse_event(event) for event in replayed]
    assert [event.seq for event in stream] == list(range(1, len(stream) + 1))
    written = [(entry_id, fields["event"]) for entry_id, fields in client.xrange(names.events_key(job_id))]
    assert written == [(f"{seq}-0", event) for seq, event in enumerate(replayed, 1) if len(replayed) > 1]
    assert all(event.job_id == job_id for event in stream)
    return stream


def event_types(client: redis.Redis, job_id: str) -> list[str]:
    return [event.type for event in events(client, job_id)]


def ring_in(client: redis.Redis, model: str = "default", priority: int = 6, num: int = 1) -> None:
    """Put messages into the Celery queue's list, as if doorbells waited there."""
    client.lpush(names.queue_list(model, names.priority_step(priority)), *(f"message {i}" for i in range(num)))


def lose_doorbells(client: redis.Redis, model: str = "default") -> None:
    """Take every message out of a model's lists: whoever had them died before the claim."""
    client.delete(*(names.queue_list(model, step) for step in names.PRIORITY_STEPS))


def doorbells_in(client: redis.Redis, model: str = "default") -> list[str]:
    """Ids of the jobs whose doorbells wait in a model's lists, the next one first."""
    messages: list[str] = []
    for step in names.PRIORITY_STEPS:
        messages += reversed(client.lrange(names.queue_list(model, step), 0, -1))
    return [str(json.loads(message)["headers"]["id"]) for message in messages]


def reap_until_bells(ledger: Ledger) -> tuple[Bell, ...]:
    """Sweep until a sweep asks for doorbells."""
    bells: list[Bell] = []
    eventually(lambda: bells.extend(ledger.reap()) or bells, what="a sweep that rings")
    return tuple(bells)


def lease_ends(client: redis.Redis, *job_ids: str) -> None:
    """Let the leases of running jobs be over, however long they were; the first job's ended first."""
    for score, job_id in enumerate(job_ids):
        client.hset(names.job_key(job_id), "lease", "0")
        client.zadd(names.DUE_KEY, {job_id: score})


def lose(ledger: Ledger, client: redis.Redis, job_id: str) -> tuple[Bell, ...]:
    """Sweep after the lease of `job_id` is over."""
    lease_ends(client, job_id)
    return ledger.reap()


#: Where the ledger keeps times: sorted sets by score, fields of rows and of the watch.
_DATED = ("due", "news", "serving", "leases", "settings", "webhooks", "workers", "jobs")
_DATES = (
    "created",
    "queued_at",
    "deadline",
    "alarm",
    "not_before",
    "started",
    "finished",
    "at",
    "mark",
    "time",
    "older",
)


def set_clock_back(client: redis.Redis, step_s: float) -> None:
    """Leave everything as if Redis' clock had been `step_s` ahead of what it is now; negative: set it forward."""

    def moved(time: str | float) -> float:
        return round(float(time) + step_s, 6)

    for key in client.scan_iter(names.PREFIX + "*"):
        kind = kind_of(key)
        if kind in _DATED:
            for member, score in client.zrange(key, 0, -1, withscores=True):
                client.zadd(key, {member: moved(score)})
        elif kind in ("job", "watch"):
            row = client.hgetall(key)
            for name in row.keys() & set(_DATES):
                client.hset(key, name, f"{moved(row[name]):.6f}")
