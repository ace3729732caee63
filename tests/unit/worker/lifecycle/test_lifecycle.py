"""Leases, stops and drains against a real ledger."""

from __future__ import annotations

import threading
import uuid

import pytest
import redis

from api_stub.contract import names
from api_stub.contract.event import RetryReason
from api_stub.contract.job import VqaJob
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Claim
from api_stub.ledger.settings import LedgerConfig
from tests.servers import eventually
from worker.jobs.attempt import Attempt, Attempts, Stopped, StopReason
from worker.lifecycle.drain import Drain
from worker.lifecycle.heartbeat import Heartbeat


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ledger(redis_url: str) -> Ledger:
    return Ledger.connect(redis_url, LedgerConfig(lease_s=15.0))


def claim(ledger: Ledger, deadline_s: float | None = None) -> Claim:
    job_id = str(uuid.uuid4())
    ledger.submit(job_id, VqaJob(question="hello", deadline_s=deadline_s).resolved(job_id))
    claim = ledger.claim(job_id, "worker-1")
    assert isinstance(claim, Claim)
    return claim


def heartbeat(ledger: Ledger, attempts: Attempts, clock: Clock | None = None, beat_s: float = 60.0) -> Heartbeat:
    return Heartbeat(
        ledger, ledger.client, attempts, worker="worker-1", model="default", beat_s=beat_s, lease_s=15.0,
        **({"clock": clock} if clock else {}),
    )  # fmt: skip


def test_a_beat_tells_that_redis_is_full_and_keeps_the_leases(ledger: Ledger, redis_client: redis.Redis) -> None:
    beats = heartbeat(ledger, Attempts())
    beats.beat()
    assert beats.refusal is None
    redis_client.config_set("maxmemory", 1)
    try:
        before = beats.last_beat_at
        beats.beat()
        assert (beats.refusal, beats.last_beat_at > before) == ("redis is full (OOM)", True)
    finally:
        redis_client.config_set("maxmemory", 0)
    beats.beat()
    assert beats.refusal is None


def test_the_first_reason_to_stop_stands_unless_the_lease_is_lost(ledger: Ledger) -> None:
    attempt = Attempt(claim(ledger))
    attempt.check()
    attempt.stop(StopReason.CANCELLED)
    attempt.stop(StopReason.DRAINED)
    with pytest.raises(Stopped, match="cancelled"):
        attempt.check()
    attempt.stop(StopReason.LOST)
    with pytest.raises(Stopped, match="lost"):
        attempt.check()
    assert attempt.stream.is_lost


def test_whoever_asks_late_is_told_at_once_that_the_attempt_is_stopped(ledger: Ledger) -> None:
    told: list[str] = []
    attempt = Attempt(claim(ledger))
    attempt.when_stopped(lambda: told.append("while running"))
    attempt.stop(StopReason.CANCELLED)
    attempt.stop(StopReason.LOST)
    assert told == ["while running"]
    attempt.when_stopped(lambda: told.append("late"))
    assert told == ["while running", "late"]


def test_a_deadline_stops_the_attempt_by_the_local_monotonic_clock(ledger: Ledger) -> None:
    clock = Clock()
    attempt = Attempt(claim(ledger, deadline_s=30.0), clock)
    attempt.check()
    clock.now += 29.0
    attempt.check()
    clock.now += 2.0
    with pytest.raises(Stopped, match="deadline"):
        attempt.check()


def test_a_beat_tells_an_attempt_that_its_job_went_to_another(ledger: Ledger) -> None:
    attempts = Attempts()
    mine, given_away = Attempt(claim(ledger)), Attempt(claim(ledger))
    attempts.add(mine)
    attempts.add(given_away)
    ledger.give_back(given_away.claim.job_id, given_away.claim.fence, RetryReason.GIVEN_BACK)
    heartbeat(ledger, attempts).beat()
    assert mine.stop_reason is None
    assert given_away.stop_reason is StopReason.LOST


def test_an_attempt_fences_itself_when_beats_are_not_answered(ledger: Ledger) -> None:
    clock = Clock()
    attempts = Attempts()
    attempt = Attempt(claim(ledger), clock)
    attempts.add(attempt)
    dead = Ledger.connect("redis://127.0.0.1:1/0", LedgerConfig(), timeout_s=0.2)
    beat = heartbeat(dead, attempts, clock)
    clock.now += 13.0
    beat.beat()
    assert attempt.stop_reason is None
    clock.now += 1.0
    beat.beat()
    assert attempt.stop_reason is StopReason.UNCONFIRMED
    assert not attempt.stream.is_lost, "it may still be ours: the ledger decides when it answers again"


def test_a_cancel_reaches_a_running_attempt_between_two_beats(ledger: Ledger, redis_client: redis.Redis) -> None:
    attempts = Attempts()
    attempt, bystander = Attempt(claim(ledger)), Attempt(claim(ledger))
    attempts.add(attempt)
    attempts.add(bystander)
    beat = heartbeat(ledger, attempts, beat_s=60.0)
    beat.start()
    try:
        eventually(
            lambda: dict(redis_client.pubsub_numsub(names.CANCEL_CHANNEL)).get(names.CANCEL_CHANNEL), 10, "subscribed"
        )
        ledger.cancel(attempt.claim.job_id)
        eventually(lambda: attempt.stop_reason is StopReason.CANCELLED, 5, "cancelled")
        assert bystander.stop_reason is None
    finally:
        beat.stop(5)


def test_a_worker_is_listed_while_it_beats_and_gone_after_it_leaves(ledger: Ledger, redis_client: redis.Redis) -> None:
    beat = heartbeat(ledger, Attempts())
    beat.start()
    assert redis_client.zrange(names.workers_key("default"), 0, -1) == ["worker-1"]
    beat.stop(5)
    assert redis_client.zcard(names.workers_key("default")) == 0


def test_a_drain_lets_jobs_run_for_its_time_and_then_stops_them(ledger: Ledger) -> None:
    attempts = Attempts()
    attempt = Attempt(claim(ledger))
    attempts.add(attempt)
    patient = Drain(attempts, drain_s=60.0)
    assert not patient.is_draining
    patient.begin()
    patient.begin()
    assert patient.is_draining
    assert attempt.stop_reason is None
    assert [thread.name for thread in threading.enumerate()].count("drain") == 1
    Drain(attempts, drain_s=0.0).begin()
    eventually(lambda: attempt.stop_reason is StopReason.DRAINED, 5, "drained")
    late = Attempt(claim(ledger))
    attempts.add(late)
    assert late.stop_reason is StopReason.DRAINED, "a job that was claimed while the drain ended is given back too"
