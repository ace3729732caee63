"""Sending for jobs that are over, whoever ended them, to real lists of Celery's."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
import redis
from pydantic import SecretStr

from api_stub.contract import names
from api_stub.contract.error import ErrorCode, ErrorInfo
from api_stub.contract.event import CancelledBody, FailedBody, FinalBody
from api_stub.contract.job import TaskName, VqaJob
from api_stub.contract.result import Usage
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.outbox import LinkedJobs
from api_stub.ledger.rows import Claim, Deleted
from api_stub.ledger.settings import LedgerConfig
from tests.unit.api_stub.ledger_kit import answer, lease_ends
from worker.broker.link_sender import LinkSender, make_sender
from worker.jobs.links import Links
from worker.settings import WorkerSettings

LINKS = Links(
    callbacks=({"task": "done", "args": ["mine"]},),
    errbacks=({"task": "failed", "kwargs": {"key": 1}, "options": {"queue": "errors", "priority": 3}},),
    chain=({"task": "last", "options": {"task_id": "z"}}, {"task": "next", "options": {"task_id": "y"}}),
    root_id="root",
)
CONFIG = LedgerConfig(max_attempts=1)


@pytest.fixture
def ledger(redis_url: str) -> Ledger:
    return Ledger.connect(redis_url, CONFIG)


@pytest.fixture
def raw(ledger: Ledger) -> redis.Redis:
    return ledger.client


@pytest.fixture
def sender(redis_url: str, ledger: Ledger) -> LinkSender:
    return LinkSender(make_sender(WorkerSettings(redis_url=SecretStr(redis_url))), ledger)


def claimed(ledger: Ledger, job_id: str, links: Links = LINKS, **fields: Any) -> Claim:
    adopted(ledger, job_id, links, **fields)
    claim = ledger.claim(job_id, "worker-1")
    assert isinstance(claim, Claim)
    return claim


def adopted(ledger: Ledger, job_id: str, links: Links = LINKS, **fields: Any) -> None:
    job = VqaJob(question="hello", **fields)
    ledger.adopt(job_id, task=TaskName.VQA, model="default", job=job, priority=6, links=links.to_json())


def without_answer(body: type[FailedBody | CancelledBody], code: ErrorCode) -> FinalBody:
    return body(error=ErrorInfo.of(code, "why"), partial_text="", usage=Usage())


def sent(raw: redis.Redis, queue: str = "celery") -> list[dict[str, Any]]:
    """The messages in a queue, oldest first: what they ask for, and where they come from."""
    messages = [json.loads(entry) for entry in reversed(raw.lrange(queue, 0, -1))]
    found = []
    for message in messages:
        args, kwargs, embed = json.loads(base64.b64decode(message["body"]))
        headers = message["headers"]
        about = {name: headers[name] for name in ("task", "id", "parent_id", "root_id")}
        found.append(about | {"args": args, "kwargs": kwargs, "chain": embed["chain"]})
    return found


def is_settled(raw: redis.Redis, job_id: str) -> bool:
    return not raw.exists(names.LINKED_KEY) and not raw.hexists(names.job_key(job_id), "links")


def test_a_completed_job_sends_its_result_to_callbacks_and_to_the_next_task_with_the_rest_of_the_chain(
    ledger: Ledger, raw: redis.Redis, sender: LinkSender
) -> None:
    claim = claimed(ledger, "job")
    sender.send_due()
    assert sent(raw) == [], "it is not over yet"
    ledger.finish("job", claim.fence, answer(claim))
    sender.send_due()
    result = json.loads(raw.get(names.result_key("job")) or "")["result"]
    done, after = sent(raw)
    assert (done["task"], done["args"], done["parent_id"], done["root_id"]) == ("done", [result, "mine"], "job", "root")
    assert (after["task"], after["id"], after["args"]) == ("next", "y", [result])
    assert [signature["task"] for signature in after["chain"]] == ["last"]
    assert sent(raw, "errors") == []
    assert is_settled(raw, "job")


def test_a_failed_job_sends_its_id_to_errbacks_and_fails_the_tasks_behind_it_in_the_chain(
    ledger: Ledger, raw: redis.Redis, sender: LinkSender
) -> None:
    claim = claimed(ledger, "job")
    raw.set(names.result_key("z"), "its own")
    ledger.finish("job", claim.fence, without_answer(FailedBody, ErrorCode.MEDIA_NOT_FOUND))
    sender.send_due()
    assert sent(raw) == []
    assert raw.llen("errors\x06\x163") == 1
    (failed,) = sent(raw, "errors\x06\x163")
    assert (failed["task"], failed["args"], failed["kwargs"]) == ("failed", ["job"], {"key": 1})
    metas = [json.loads(raw.get(names.result_key(name)) or "") for name in ("job", "y")]
    assert [meta["result"] for meta in metas] == [metas[0]["result"]] * 2
    assert [meta["status"] for meta in metas] == ["FAILURE"] * 2
    assert raw.get(names.result_key("z")) == "its own"
    assert raw.ttl(names.result_key("y")) > 0
    assert is_settled(raw, "job")


def test_a_follower_that_is_a_job_already_keeps_its_own_ending(
    ledger: Ledger, raw: redis.Redis, sender: LinkSender
) -> None:
    claim = claimed(ledger, "job")
    ledger.submit("y", VqaJob(question="hello"))
    ledger.finish("job", claim.fence, without_answer(FailedBody, ErrorCode.INTERNAL))
    sender.send_due()
    assert not raw.exists(names.result_key("y"))


def test_a_cancelled_job_sends_nothing(ledger: Ledger, raw: redis.Redis, sender: LinkSender) -> None:
    claim = claimed(ledger, "job")
    ledger.finish("job", claim.fence, without_answer(CancelledBody, ErrorCode.CANCELLED))
    sender.send_due()
    assert raw.keys("celery*") == [names.result_key("job")]
    assert raw.keys("errors*") == []
    assert is_settled(raw, "job")


def test_jobs_that_a_sweep_ends_send_their_errbacks(ledger: Ledger, raw: redis.Redis, sender: LinkSender) -> None:
    claimed(ledger, "lost")
    lease_ends(raw, "lost")
    adopted(ledger, "late", deadline_s=60)
    raw.hset(names.job_key("late"), "deadline", 1)
    raw.zadd(names.DUE_KEY, {"late": 1})
    ledger.reap()
    sender.send_due()
    assert sorted(message["args"][0] for message in sent(raw, "errors\x06\x163")) == ["late", "lost"]


def test_a_sender_that_dies_between_taking_and_settling_leaves_the_job_to_another(
    ledger: Ledger, raw: redis.Redis, sender: LinkSender
) -> None:
    claim = claimed(ledger, "job")
    ledger.finish("job", claim.fence, answer(claim))
    dying = LinkedJobs(raw, CONFIG)
    assert [linked.job_id for linked in dying.take(10, 60)] == ["job"]
    sender.send_due()
    assert sent(raw) == [], "its lease lasts"
    raw.zadd(names.LINKED_KEY, {"job": 0})
    sender.send_due()
    assert [message["task"] for message in sent(raw)] == ["done", "next"]


def test_what_is_sent_again_has_the_same_task_ids(ledger: Ledger, raw: redis.Redis, sender: LinkSender) -> None:
    claim = claimed(ledger, "job")
    ledger.finish("job", claim.fence, answer(claim))
    sender.send_due()
    raw.hset(names.job_key("job"), "links", LINKS.to_json())
    raw.zadd(names.LINKED_KEY, {"job": 0})
    sender.send_due()
    first, second = [message["id"] for message in sent(raw)[:2]], [message["id"] for message in sent(raw)[2:]]
    assert first == second
    assert len(set(first)) == 2


def test_a_queue_that_takes_nothing_delays_its_own_jobs_only(
    ledger: Ledger, raw: redis.Redis, sender: LinkSender
) -> None:
    refused = Links(callbacks=({"task": "done", "options": {"queue": "no-list"}},))
    raw.set("no-list", "a text")
    for job_id, links in (("stuck", refused), ("job", LINKS)):
        claim = claimed(ledger, job_id, links)
        ledger.finish(job_id, claim.fence, answer(claim))
    sender.send_due()
    assert [message["parent_id"] for message in sent(raw)] == ["job", "job"]
    assert raw.zrange(names.LINKED_KEY, 0, -1) == ["stuck"]
    raw.delete("no-list")
    raw.zadd(names.LINKED_KEY, {"stuck": 0})
    sender.send_due()
    assert [message["task"] for message in sent(raw, "no-list")] == ["done"]


def test_one_refused_message_holds_no_other_of_its_job_back_and_has_none_sent_again(
    ledger: Ledger, raw: redis.Redis, sender: LinkSender
) -> None:
    raw.set("no-list", "a string")
    callbacks = [{"task": "first"}, {"task": "stuck", "options": {"queue": "no-list"}}, {"task": "last"}]
    claim = claimed(ledger, "job", Links(callbacks=tuple(callbacks)))
    ledger.finish("job", claim.fence, answer(claim))
    for _ in range(3):
        raw.zadd(names.LINKED_KEY, {"job": 1})  # the lease is over
        sender.send_due()
    assert [message["task"] for message in sent(raw)] == ["first", "last"]
    raw.delete("no-list")
    raw.zadd(names.LINKED_KEY, {"job": 1})
    sender.send_due()
    assert [message["task"] for message in sent(raw, "no-list")] == ["stuck"]
    assert [message["task"] for message in sent(raw)] == ["first", "last"]
    assert raw.zcard(names.LINKED_KEY) == 0


def test_a_job_without_links_leaves_nothing_to_look_at(ledger: Ledger, raw: redis.Redis, sender: LinkSender) -> None:
    ledger.adopt("job", task=TaskName.VQA, model="default", job=VqaJob(question="hello"), priority=6)
    claim = ledger.claim("job", "worker-1")
    assert isinstance(claim, Claim)
    ledger.finish("job", claim.fence, answer(claim))
    assert is_settled(raw, "job")


def test_a_job_is_deleted_only_after_its_links_are_sent(ledger: Ledger, raw: redis.Redis, sender: LinkSender) -> None:
    claim = claimed(ledger, "a")
    ledger.finish("a", claim.fence, answer(claim))
    assert ledger.delete("a") is Deleted.LINKED
    sender.send_due()
    assert [message["task"] for message in sent(raw)] == ["done", "next"]
    assert ledger.delete("a") is Deleted.DELETED


def test_a_job_whose_row_has_expired_is_forgotten(ledger: Ledger, raw: redis.Redis, sender: LinkSender) -> None:
    claimed(ledger, "job")
    raw.delete(names.job_key("job"))
    raw.zadd(names.LINKED_KEY, {"job": 0})
    sender.send_due()
    assert is_settled(raw, "job")
