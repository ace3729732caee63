"""The audit can fail: each broken promise is made by hand and must be found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import closing

import pytest
import redis

from api_stub.contract import names
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.settings import LedgerConfig
from tests.chaos import audit, leaks
from tests.chaos.workload import Plan, Request, Ticket
from tests.unit.api_stub.ledger_kit import answer, delta, lose_doorbells, started

JOB = "a"
Harm = Callable[[redis.Redis, Ticket], object]


@pytest.fixture
def ticket(redis_url: str) -> Ticket:
    """A job that was answered and read as it should be."""
    with closing(Ledger.connect(redis_url, LedgerConfig())) as ledger:
        claim = started(ledger, JOB)
        ledger.publish([delta(claim, 1, "red")])
        ledger.finish(JOB, claim.fence, answer(claim, "red"))
        ledger.reap()
    return Ticket(
        Request("a question", {}, "red"), Plan.PLAIN, {}, JOB, is_submitted=True, num_visits=1, read_text="red"
    )


def problems(client: redis.Redis, ticket: Ticket) -> str:
    return "\n".join(audit.read_outcomes(client, [ticket])[1])


def events_key() -> str:
    return names.events_key(JOB)


def repeat_last_event(client: redis.Redis, ticket: Ticket) -> None:
    last = audit.events_of(client, JOB)[-1]
    again = last.model_copy(update={"seq": last.seq + 1})
    client.xadd(events_key(), {"event": again.to_json()}, id=f"{again.seq}-0")


def change_result(client: redis.Redis, ticket: Ticket) -> None:
    meta = json.loads(str(client.get(names.result_key(JOB))))
    meta["result"]["text"] = "green"
    client.set(names.result_key(JOB), json.dumps(meta))


def set_on(target: str, name: str, value: object) -> Harm:
    if target == "row":
        return lambda client, ticket: client.hset(names.job_key(JOB), name, str(value))
    return lambda client, ticket: setattr(ticket, name, value)


HARMS: dict[str, tuple[Harm, str]] = {
    "lost": (lambda client, _: client.delete(names.job_key(JOB)), "lost"),
    "not final": (set_on("row", "status", "queued"), "not final but queued"),
    "another end": (set_on("row", "status", "failed"), "its last event is job.completed"),
    "two ends": (repeat_last_event, "2 final events"),
    "a gap": (lambda client, _: client.xdel(events_key(), "2-0"), "gaps"),
    "no result": (lambda client, _: client.delete(names.result_key(JOB)), "no Celery result"),
    "two texts": (change_result, "different texts"),
    "lost text": (lambda client, _: client.xdel(events_key(), "3-0"), "its deltas say ''"),
    "wrong answer": (set_on("ticket", "request", Request("a question", {}, "blue")), "wrong answer 'red'"),
    "wrong reading": (set_on("ticket", "read_text", "re"), "its reader has 're'"),
    "no reading": (set_on("ticket", "read_text", None), "never came to an end"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_broken_promise_is_found(redis_client: redis.Redis, ticket: Ticket, harm: str) -> None:
    assert problems(redis_client, ticket) == ""
    break_it, told = HARMS[harm]
    break_it(redis_client, ticket)
    assert told in problems(redis_client, ticket)


def test_counters_and_publications_are_compared(redis_client: redis.Redis, ticket: Ticket) -> None:
    outcomes, _ = audit.read_outcomes(redis_client, [ticket])
    assert audit.count_problems(redis_client, outcomes, Counter({JOB: 1}), 0) == []
    assert len(audit.count_problems(redis_client, outcomes, Counter({JOB: 2}), 1)) == 3


def test_leaks_are_found(redis_client: redis.Redis, ticket: Ticket) -> None:
    lose_doorbells(redis_client)  # a worker has taken them
    assert leaks.key_problems(redis_client) == []
    redis_client.persist(events_key())
    redis_client.incr(names.depth_key(leaks.MODEL))
    redis_client.hset("unacked", "tag", json.dumps([{"headers": {"id": "nobody"}}, "", ""]))
    assert len(leaks.key_problems(redis_client)) == 2
    assert len(leaks.message_problems(redis_client)) == 2
    assert len(leaks.message_problems(redis_client, {"nobody"})) == 1
