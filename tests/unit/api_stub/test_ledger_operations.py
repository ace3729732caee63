"""What operators do, on the ledger itself: pause, resume, purge, cancel many, delete. On a real Redis."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import TypeVar

import pytest
import redis

from api_stub.contract import names
from api_stub.contract.error import InvalidJob
from api_stub.contract.event import RetryReason
from api_stub.contract.job import TaskName
from api_stub.contract.status import JobStatus
from api_stub.contract.view import JobSelection, parse_selection, paused
from api_stub.ledger import calls
from api_stub.ledger.calls import Call
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.lua import Transition
from api_stub.ledger.rows import CancelledJobs, Claim, Deleted, Finished, Refusal, RefusalReason, Submission
from api_stub.ledger.settings import LedgerConfig
from tests.unit.api_stub.broker_kit import Broker, leftovers
from tests.unit.api_stub.ledger_kit import (
    answer,
    claimed,
    doorbells_in,
    event_types,
    events,
    lose,
    lose_doorbells,
    question,
    ring_in,
    started,
)

T = TypeVar("T")
HELD = Refusal(RefusalReason.HELD)


@pytest.fixture
def broker(ledger: Ledger) -> Broker:
    return Broker(ledger)


@pytest.fixture
def capped(redis_url: str) -> Iterator[Ledger]:
    """A ledger where a tenant runs one job at a time."""
    with closing(Ledger.connect(redis_url, LedgerConfig(tenant_max_running=1, window=2))) as opened:
        yield opened


def status_of(ledger: Ledger, job_id: str) -> JobStatus:
    view = ledger.view(job_id)
    assert view is not None
    return view.status


def postpone(ledger: Ledger, job_id: str, **fields: object) -> None:
    """Submit a job and give it back for an hour."""
    claim = started(ledger, job_id, **fields)
    assert ledger.give_back(job_id, claim.fence, RetryReason.STORAGE, 3600.0)


# pause and resume


def test_a_paused_queue_takes_jobs_and_gives_none_away(ledger: Ledger, broker: Broker) -> None:
    running = started(ledger, "running")
    ledger.submit("rung", question())
    assert ledger.pause("default").is_changed
    assert not ledger.pause("default").is_changed
    assert ledger.submit("late", question()) is Submission.HELD
    ledger.adopt("plain", task=TaskName.VQA, model="default", job=question(), priority=6)
    assert ledger.claim("rung", "worker-1") == HELD
    assert ledger.claim("plain", "worker-1") == HELD
    assert ledger.finish("running", running.fence, answer(running)) is Finished.DONE
    ledger.beat("worker-1", "default", [])
    ledger.reap()
    assert doorbells_in(ledger.client) == ["running", "rung"]  # written before the pause
    assert [status_of(ledger, job_id) for job_id in ("rung", "late", "plain")] == [JobStatus.QUEUED] * 3
    lose_doorbells(ledger.client)
    change = ledger.resume("default")
    assert (change.is_changed, change.depth, change.num_workers) == (True, 3, 1)
    assert broker.work(9) == ["rung", "late", "plain"]
    assert not ledger.resume("default").is_changed
    assert leftovers(ledger.client) == set()


def test_other_queues_go_on_beside_a_paused_one(ledger: Ledger) -> None:
    ledger.pause("other")
    assert ledger.submit("a", question()) is Submission.CREATED
    assert isinstance(ledger.claim("a", "worker-1"), Claim)


def test_deadlines_count_in_a_paused_queue(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.pause("default")
    ledger.submit("swept", question(deadline_s=3600.0))
    ledger.submit("claimed", question(deadline_s=3600.0))
    for job_id in ("swept", "claimed"):
        redis_client.hset(names.job_key(job_id), "deadline", "1")
    redis_client.zadd(names.DUE_KEY, {"swept": 1})
    assert ledger.claim("claimed", "worker-1") == Refusal(RefusalReason.EXPIRED)
    ledger.reap()
    assert event_types(redis_client, "swept") == event_types(redis_client, "claimed") == ["job.queued", "job.expired"]


def test_whatever_comes_back_to_a_paused_queue_is_held(ledger: Ledger, redis_client: redis.Redis) -> None:
    """Lost workers, retries that are due, lost doorbells: a sweep rings for none, and a resume for all."""
    started(ledger, "lost")
    postpone(ledger, "later")
    ledger.submit("unheard", question())
    ledger.pause("default")
    assert lose(ledger, redis_client, "lost") == ()
    redis_client.hset(names.job_key("later"), mapping={"alarm": "1", "not_before": "1"})
    redis_client.zadd(names.DUE_KEY, {"later": 1})
    lose_doorbells(redis_client)
    ledger.reap()
    redis_client.hset(names.job_key("unheard"), "alarm", "1")
    redis_client.zadd(names.DUE_KEY, {"unheard": 1})
    assert ledger.reap() == ()
    assert doorbells_in(redis_client) == []
    assert redis_client.hgetall(names.NUM_HELD_KEY) == {"default:6": "3"}
    ledger.resume("default")
    assert doorbells_in(redis_client) == ["lost", "later", "unheard"]


def test_a_job_that_waits_long_is_not_let_in_front_of_a_paused_queue(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.submit("old", question(priority=9))
    ring_in(redis_client, priority=9)
    redis_client.hset(names.job_key("old"), "queued_at", "1")
    ledger.pause("default")
    ledger.reap()
    assert redis_client.hget(names.job_key("old"), "list") == "default:9"


def test_doorbells_that_a_draining_worker_leaves_are_not_written_for_what_is_held(
    ledger: Ledger, redis_client: redis.Redis
) -> None:
    for job_id in ("unheard", "claimed"):
        ledger.submit(job_id, question())
    lose_doorbells(redis_client)
    ledger.pause("default")
    assert ledger.claim("claimed", "worker-1") == HELD
    assert ledger.ring_again(["claimed", "unheard"]) == 0
    assert doorbells_in(redis_client) == []
    assert redis_client.hgetall(names.NUM_HELD_KEY) == {"default:6": "2"}
    ledger.resume("default")
    assert doorbells_in(redis_client) == ["unheard", "claimed"]


def test_a_view_says_that_its_queue_is_paused(ledger: Ledger) -> None:
    ledger.beat("worker-1", "default", [])
    started(ledger, "running")
    ledger.submit("queued", question())
    ledger.pause("default")
    running, queued = ledger.view("running"), ledger.view("queued")
    assert queued is not None
    assert running is not None
    assert queued.warnings == (paused("default"),)
    assert running.warnings is None
    ledger.resume("default")
    resumed = ledger.view("queued")
    assert resumed is not None
    assert "warnings" not in resumed.to_json()


# purge


def test_a_purge_ends_what_waits_what_is_held_and_what_is_postponed(capped: Ledger, redis_client: redis.Redis) -> None:
    for i in range(300):
        capped.submit(f"postponed-{i}", question(priority=(0, 3, 6, 9)[i % 4]))
        claim = claimed(capped, f"postponed-{i}")
        capped.give_back(f"postponed-{i}", claim.fence, RetryReason.STORAGE, 3600.0)
    capped.adopt("plain", task=TaskName.VQA, model="default", job=question(), priority=6)
    runs = [claimed_new(capped, f"run-{tenant}", tenant) for tenant in ("zoo", "")]
    for i in range(1700):
        tenant, deadline_s = ("", "zoo", "park", "moor")[i % 4], 3600.0 if i % 3 else None
        capped.submit(f"job-{i}", question(tenant=tenant, priority=i % 10, deadline_s=deadline_s))
    capped.submit("other", question(model="other"))
    ids = ["plain", *(f"postponed-{i}" for i in range(300)), *(f"job-{i}" for i in range(1700))]

    assert capped.purge("default") == len(ids)

    assert {status_of(capped, job_id) for job_id in ids} == {JobStatus.CANCELLED}
    assert event_types(redis_client, "job-7") == ["job.queued", "job.cancelled"]
    ending = events(redis_client, "job-7")[-1]
    assert ending.type == "job.cancelled"
    assert "purged" in ending.error.message
    assert status_of(capped, "other") is JobStatus.QUEUED
    for claim in runs:
        assert capped.finish(claim.job_id, claim.fence, answer(claim)) is Finished.DONE
    capped.cancel("other")
    assert leftovers(redis_client) == set()
    assert redis_client.get(names.depth_key("default")) == "0"


def claimed_new(ledger: Ledger, job_id: str, tenant: str) -> Claim:
    ledger.submit(job_id, question(tenant=tenant))
    return claimed(ledger, job_id)


class Meddled(Ledger):
    """After every step of a purge somebody submits one more job."""

    num_steps = 0

    def _run(self, call: Call[T]) -> T:
        reply = super()._run(call)
        if call.transition is Transition.PURGE:
            tenant = ("", "zoo")[self.num_steps % 2]
            super()._run(calls.submit(f"new-{self.num_steps}", question(tenant=tenant, priority=self.num_steps % 10)))
            self.num_steps += 1
        return reply


def test_a_purge_works_in_short_steps_and_spares_what_comes_meanwhile(redis_url: str) -> None:
    with closing(Meddled.connect(redis_url, LedgerConfig())) as ledger:
        for i in range(1000):
            ledger.submit(f"old-{i}", question(tenant=f"tenant-{i % 7}"))
        assert ledger.purge("default") == 1000
        assert {status_of(ledger, f"old-{i}") for i in range(1000)} == {JobStatus.CANCELLED}
        assert ledger.num_steps >= 10
        assert {status_of(ledger, f"new-{i}") for i in range(ledger.num_steps)} == {JobStatus.QUEUED}


def test_a_purge_finds_jobs_that_move_while_it_looks(ledger: Ledger, redis_client: redis.Redis) -> None:
    """Sweeps ring for postponed ones and workers give theirs back, all the time."""
    num = 300
    for i in range(num):
        postpone(ledger, f"job-{i}")
    is_over = threading.Event()

    def move() -> None:
        while not is_over.is_set():
            for i in range(num):
                key = names.job_key(f"job-{i}")
                if redis_client.hget(key, "status") == "queued" and redis_client.hexists(key, "alarm"):
                    redis_client.hset(key, mapping={"alarm": "1", "not_before": "1"})
                    redis_client.zadd(names.DUE_KEY, {f"job-{i}": 1}, xx=True)
            ledger.reap()
            lose_doorbells(redis_client)  # the next sweep gives those that wait an alarm

    mover = threading.Thread(target=move)
    mover.start()
    try:
        ledger.purge("default")
        found = [status_of(ledger, f"job-{i}") for i in range(num)]
    finally:
        is_over.set()
        mover.join()
    assert set(found) == {JobStatus.CANCELLED}


def test_a_purge_ends_nothing_of_other_models_and_of_none(ledger: Ledger) -> None:
    postpone(ledger, "a", model="other")
    ledger.submit("b", question(model="other"))
    assert ledger.purge("default") == 0
    assert [status_of(ledger, job_id) for job_id in ("a", "b")] == [JobStatus.QUEUED] * 2


def test_a_purge_gets_over_rows_that_somebody_removed(ledger: Ledger, redis_client: redis.Redis) -> None:
    for i in range(20):
        ledger.submit(f"job-{i}", question(tenant="zoo"))
    redis_client.delete(names.job_key("job-1"), names.job_key("job-19"))
    assert ledger.purge("default") == 18
    assert redis_client.hgetall(names.NUM_HELD_KEY) == {}


# cancelling many


def test_many_are_cancelled_by_status_model_and_metadata(ledger: Ledger) -> None:
    running = started(ledger, "running", metadata={"run": 7, "who": "ann"})
    postpone(ledger, "later", metadata={"run": 7})
    for i in range(250):
        ledger.submit(f"job-{i}", question(metadata={"run": i % 2, "who": "bob"}))
    ledger.submit("other", question(model="other", metadata={"run": 7}))
    ledger.submit("theirs", question(tenant="zoo", metadata={"run": 7}))
    ledger.submit("text", question(metadata={"run": "7"}))
    ledger.submit("none", question())

    def cancel(**wanted: object) -> CancelledJobs:
        return ledger.cancel_jobs("", JobSelection.model_validate(wanted))

    assert cancel(metadata={"run": 7}, model="default") == CancelledJobs(1, 1)
    assert ledger.beat("worker-1", "default", [("running", running.fence)])[0].value == "cancel"
    assert cancel(metadata={"run": 7}, status="queued") == CancelledJobs(1, 0)
    assert status_of(ledger, "other") is JobStatus.CANCELLED
    assert cancel(metadata={"run": 1, "who": "ann"}) == CancelledJobs(0, 0)
    assert cancel(metadata={"run": 1, "who": "bob"}) == CancelledJobs(125, 0)
    assert cancel(status="queued") == CancelledJobs(127, 0)
    assert cancel(status="in_progress") == CancelledJobs(0, 1)
    assert status_of(ledger, "theirs") is JobStatus.QUEUED


@pytest.mark.parametrize("value", ["a", '"', "é😀\x7f", 0, -3, 2.5, True, False, None, ""])
def test_metadata_is_equal_as_json_is(ledger: Ledger, value: object) -> None:
    ledger.submit("it", question(metadata={"key": value, "more": [1, {"key": "x"}]}))
    ledger.submit("absent", question(metadata={"other": value}))
    ledger.submit("nested", question(metadata={"more": {"key": value}}))
    wanted = JobSelection.model_validate({"metadata": {"key": value}})
    assert ledger.cancel_jobs("", wanted) == CancelledJobs(1, 0)
    assert status_of(ledger, "it") is JobStatus.CANCELLED


@pytest.mark.parametrize("number", [2**53, -(2**53), 1e19])
def test_numbers_that_the_ledger_cannot_tell_apart_select_nothing(ledger: Ledger, number: float) -> None:
    ledger.submit("neighbour", question(metadata={"id": int(number) + (1 if number > 0 else -1)}))
    with pytest.raises(InvalidJob, match=r"metadata: id: .* as text"):
        ledger.cancel_jobs("", parse_selection({"metadata": {"id": number}}))
    assert status_of(ledger, "neighbour") is JobStatus.QUEUED
    number = 2**53 - 1
    ledger.submit("exact", question(metadata={"id": number}))
    assert ledger.cancel_jobs("", parse_selection({"metadata": {"id": number}})) == CancelledJobs(1, 0)
    assert status_of(ledger, "exact") is JobStatus.CANCELLED


# delete


def test_a_deleted_job_is_gone_without_a_trace(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.loading("default")
    claim = started(ledger, "a", tenant="zoo")
    assert ledger.delete("a") is Deleted.UNFINISHED
    ledger.finish("a", claim.fence, answer(claim))
    assert ledger.delete("a") is Deleted.DELETED
    assert ledger.delete("a") is Deleted.UNKNOWN
    assert ledger.view("a") is None
    assert not ledger.replay("a").is_known
    assert ledger.list_jobs("zoo").jobs == ()
    assert ledger.finish("a", claim.fence, answer(claim)) is Finished.LOST
    assert ledger.claim("a", "worker-1") == Refusal(RefusalReason.UNKNOWN)
    assert not [key for key in redis_client.scan_iter() if key.endswith(("a", "zoo"))]
    assert ledger.submit("a", question("Another one?", tenant="zoo")) is Submission.CREATED


def test_a_job_whose_retry_was_deleted_is_tried_again(ledger: Ledger) -> None:
    claim = started(ledger, "a")
    ledger.finish("a", claim.fence, answer(claim))
    first = ledger.retry("a")
    assert first is not None
    ledger.cancel(first)
    assert ledger.retry("a") == first
    ledger.delete(first)
    second = ledger.retry("a")
    assert second not in (None, first)
    assert status_of(ledger, str(second)) is JobStatus.QUEUED
    assert ledger.retry("a") == second


def test_deleting_a_dead_job_takes_it_off_the_list(redis_url: str, redis_client: redis.Redis) -> None:
    with closing(Ledger.connect(redis_url, LedgerConfig(max_attempts=1))) as ledger:
        started(ledger, "a")
        lose(ledger, redis_client, "a")
        assert [view.job_id for view in ledger.dead()] == ["a"]
        assert ledger.delete("a") is Deleted.DELETED
        assert redis_client.llen(names.DEAD_KEY) == 0


def test_the_webhook_of_a_deleted_jobs_end_is_not_sent(ledger: Ledger, redis_client: redis.Redis) -> None:
    for job_id in ("kept", "deleted"):
        hook = {"url": "https://example.org/hook", "events": ["job.started", "job.completed"]}
        claim = started(ledger, job_id, webhook=hook)
        ledger.finish(job_id, claim.fence, answer(claim))
    assert redis_client.zcard(names.DELIVERIES_KEY) == 4
    ledger.delete("deleted")
    left = [redis_client.hmget(names.delivery_key(delivery), "job_id", "type") for delivery in pending(redis_client)]
    assert sorted(left) == [["deleted", "job.started"], ["kept", "job.completed"], ["kept", "job.started"]]
    assert len(list(redis_client.scan_iter(names.delivery_key("*")))) == 3


def pending(client: redis.Redis) -> list[str]:
    """Ids of the deliveries to go."""
    return [str(delivery) for delivery in client.zrange(names.DELIVERIES_KEY, 0, -1)]
