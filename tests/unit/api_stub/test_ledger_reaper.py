"""What sweeps do: lost workers, passed deadlines, poison jobs and lost doorbells, on a real Redis."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
import redis

from api_stub.contract import names
from api_stub.contract.error import ErrorCode
from api_stub.contract.event import JobCancelled, JobExpired, JobFailedEvent, JobRetrying, RetryReason
from api_stub.contract.job import TaskName
from api_stub.contract.status import JobStatus
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.reaper import Reaper
from api_stub.ledger.rows import Bell, Finished, Hold
from api_stub.ledger.settings import LedgerConfig
from tests.servers import RedisServer, eventually
from tests.unit.api_stub.ledger_kit import (
    HASTY,
    answer,
    claimed,
    delta,
    doorbells_in,
    event_types,
    events,
    lease_ends,
    lose,
    lose_doorbells,
    question,
    reap_until_bells,
    ring_in,
    started,
)

Connect = Callable[[LedgerConfig], Ledger]
LIST = names.list_id("default", 6)


@pytest.fixture
def connect(redis_url: str) -> Iterator[Connect]:
    """Opens ledgers that are closed after the test."""
    with ExitStack() as opened:
        yield lambda config: opened.enter_context(closing(Ledger.connect(redis_url, config)))


@pytest.fixture
def ledger(connect: Connect) -> Ledger:
    return connect(LedgerConfig())


def grace_ends(client: redis.Redis, job_id: str) -> None:
    """Let the time pass after which a suspect is looked at again."""
    assert client.hexists(names.job_key(job_id), "alarm"), "nobody suspects that its doorbell is lost"
    look_again(client, job_id)


def look_again(client: redis.Redis, job_id: str) -> None:
    """Make the next sweep look at a queued job."""
    client.hset(names.job_key(job_id), "alarm", "1")
    client.zadd(names.DUE_KEY, {job_id: 1})


def deadline_passes(client: redis.Redis, job_id: str) -> None:
    client.hset(names.job_key(job_id), mapping={"created": "1", "deadline": "3"})


@contextmanager
def running(reaper: Reaper) -> Iterator[threading.Thread]:
    """A reaper in a thread of its own; afterwards it has ended."""
    stop = threading.Event()
    thread = threading.Thread(target=reaper.run, args=(stop,))
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive()


def ids(bells: tuple[Bell, ...]) -> list[str]:
    return [bell.job_id for bell in bells]


# lost workers


def test_silent_worker_loses_its_job_after_a_lease(connect: Connect, redis_client: redis.Redis) -> None:
    ledger = connect(HASTY)
    started(ledger, "a", priority=3)
    assert reap_until_bells(ledger) == (Bell("a", TaskName.VQA, "default", 3),)
    retrying = events(redis_client, "a")[-1]
    assert isinstance(retrying, JobRetrying)
    assert (retrying.reason, retrying.attempt) == (RetryReason.LOST, 1)
    view = ledger.view("a")
    assert view is not None
    assert (view.status, view.attempt, view.worker) == (JobStatus.QUEUED, 1, None)
    assert claimed(ledger, "a", "worker-2").attempt == 2
    assert redis_client.hget(names.job_key("a"), "losses") == "1"


def test_job_within_its_lease_is_left_alone(ledger: Ledger) -> None:
    started(ledger, "a")
    assert ledger.reap() == ()
    view = ledger.view("a")
    assert view is not None
    assert view.status is JobStatus.IN_PROGRESS


def test_many_lost_jobs_are_all_taken_in_one_sweep(ledger: Ledger, redis_client: redis.Redis) -> None:
    job_ids = {f"job-{i}" for i in range(450)}
    for job_id in job_ids:
        started(ledger, job_id)
    lease_ends(redis_client, *job_ids)
    bells = ledger.reap()
    assert len(bells) == 450
    assert set(ids(bells)) == job_ids


def test_reapers_at_the_same_time_ring_once(connect: Connect, redis_client: redis.Redis) -> None:
    ledgers = [connect(LedgerConfig()) for _ in range(4)]
    job_ids = [f"job-{i}" for i in range(60)]
    for job_id in job_ids:
        started(ledgers[0], job_id)
    lease_ends(redis_client, *job_ids)
    rung: list[str] = []
    threads = [threading.Thread(target=lambda one=one: rung.extend(ids(one.reap()))) for one in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(rung) == sorted(job_ids)


def test_job_that_keeps_losing_workers_is_given_up(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.submit("a", question())
    for _ in range(2):
        claimed(ledger, "a")
        assert ids(lose(ledger, redis_client, "a")) == ["a"]
    last_claim = claimed(ledger, "a")
    ledger.publish([delta(last_claim, 1, "boo")])
    assert lose(ledger, redis_client, "a") == ()
    last = events(redis_client, "a")[-1]
    assert isinstance(last, JobFailedEvent)
    assert (last.error.code, last.error.retryable, last.partial_text) == (ErrorCode.POISON_JOB, False, "boo")
    assert "3 workers" in last.error.message
    assert redis_client.lrange(names.DEAD_KEY, 0, -1) == ["a"]
    assert json.loads(redis_client.get(names.result_key("a")) or "")["status"] == "FAILURE"
    assert redis_client.ttl(names.job_key("a")) > 0


def test_giving_back_does_not_poison(connect: Connect, redis_client: redis.Redis) -> None:
    ledger = connect(LedgerConfig(max_attempts=2))
    ledger.submit("a", question())
    for _ in range(5):
        ledger.give_back("a", claimed(ledger, "a").fence, RetryReason.GIVEN_BACK)
    claimed(ledger, "a")
    assert ids(lose(ledger, redis_client, "a")) == ["a"]
    assert claimed(ledger, "a").attempt == 7


# nobody could reach Redis


def nobody_spoke(client: redis.Redis, *job_ids: str) -> None:
    """Let an hour pass in which there was neither a beat nor a sweep."""
    seconds, _ = client.time()
    client.hset(names.WATCH_KEY, "at", seconds - 3600)
    for job_id in job_ids:
        client.zadd(names.DUE_KEY, {job_id: seconds - 3600})


def test_outages_longer_than_the_lease_cost_no_worker_its_job(ledger: Ledger, redis_client: redis.Redis) -> None:
    claim = started(ledger, "a")
    for _ in range(5):
        assert ledger.beat("worker-1", "default", [("a", claim.fence)]) == (Hold.HELD,)
        nobody_spoke(redis_client, "a")
        for _ in range(3):
            assert ledger.reap() == ()
    assert redis_client.hget(names.job_key("a"), "losses") == "0"
    assert ledger.finish("a", claim.fence, answer(claim)) is Finished.DONE


def test_outage_before_the_first_sweep_and_the_first_beat_costs_nothing(connect: Connect) -> None:
    ledger = connect(LedgerConfig(lease_s=0.2, max_attempts=1))
    claim = started(ledger, "a")
    over = time.monotonic() + 0.3
    eventually(lambda: time.monotonic() > over)
    assert ledger.reap() == ()
    assert ledger.beat("worker-1", "default", [("a", claim.fence)]) == (Hold.HELD,)


def test_reapers_that_return_together_after_an_outage_spare_the_same_jobs(
    connect: Connect, redis_client: redis.Redis
) -> None:
    ledgers = [connect(LedgerConfig()) for _ in range(4)]
    job_ids = [f"job-{i}" for i in range(20)]
    claims = [started(ledgers[0], job_id) for job_id in job_ids]
    ledgers[0].reap()
    nobody_spoke(redis_client, *job_ids)
    rung: list[str] = []
    threads = [threading.Thread(target=lambda one=one: rung.extend(ids(one.reap()))) for one in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert rung == []
    held = [(claim.job_id, claim.fence) for claim in claims]
    assert set(ledgers[0].beat("worker-1", "default", held)) == {Hold.HELD}


def test_worker_that_died_in_an_outage_is_noticed_within_a_lease_after_it(
    connect: Connect, redis_client: redis.Redis
) -> None:
    ledger = connect(LedgerConfig(lease_s=1.0))
    started(ledger, "a")
    ledger.reap()
    nobody_spoke(redis_client, "a")
    began = time.monotonic()
    assert ids(reap_until_bells(ledger)) == ["a"]
    assert time.monotonic() - began < 1.0 + 1.0  # a lease, and time for a busy machine


def test_a_reaper_that_is_always_late_still_takes_jobs_from_dead_workers(
    ledger: Ledger, redis_client: redis.Redis
) -> None:
    started(ledger, "a")
    bells: list[str] = []
    for _ in range(5):
        bells += ids(ledger.reap())
        nobody_spoke(redis_client, *(() if bells else "a"))
    assert bells == ["a"]


def test_while_somebody_sweeps_or_beats_every_second_counts(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.reap()
    began = float(redis_client.hget(names.WATCH_KEY, "at") or 0)
    for speak in (lambda: ledger.beat("worker-1", "default", []), ledger.reap) * 2:
        pause_s = 7.0  # less than half a lease
        redis_client.hincrbyfloat(names.WATCH_KEY, "at", -pause_s)
        began -= pause_s
        speak()
    last, seconds = (float(field or 0) for field in redis_client.hmget(names.WATCH_KEY, "at", "seconds"))
    assert seconds == pytest.approx(last - began, abs=0.001)


def test_redis_clock_that_is_set_back_takes_no_job(ledger: Ledger, redis_client: redis.Redis) -> None:
    claim = started(ledger, "a")
    redis_client.hset(names.WATCH_KEY, mapping={"at": "99999999999.0", "seconds": "7.5"})
    assert ledger.reap() == ()
    assert ledger.beat("worker-1", "default", [("a", claim.fence)]) == (Hold.HELD,)
    assert float(redis_client.hget(names.WATCH_KEY, "seconds") or 0) == pytest.approx(7.5, abs=5)


# cancel and deadlines


def test_cancelled_job_of_a_lost_worker_ends(ledger: Ledger, redis_client: redis.Redis) -> None:
    started(ledger, "a")
    ledger.cancel("a")
    assert lose(ledger, redis_client, "a") == ()
    assert isinstance(events(redis_client, "a")[-1], JobCancelled)


def test_deadline_with_a_lost_worker_fails_with_the_last_attempts_text(
    ledger: Ledger, redis_client: redis.Redis
) -> None:
    first = started(ledger, "a", deadline_s=60)
    ledger.publish([delta(first, 1, "first attempt")])
    lose(ledger, redis_client, "a")
    second = claimed(ledger, "a")
    ledger.publish([delta(second, 1, "sé", num_tokens=2), delta(second, 2, '"c"😀', offset=2, num_tokens=3)])
    deadline_passes(redis_client, "a")
    assert lose(ledger, redis_client, "a") == ()
    last = events(redis_client, "a")[-1]
    assert isinstance(last, JobFailedEvent)
    assert last.error.code is ErrorCode.DEADLINE_EXCEEDED
    assert (last.partial_text, last.usage.completion_tokens, last.attempt) == ('sé"c"😀', 5, 2)
    view = ledger.view("a")
    assert view is not None
    assert (view.status, view.error, view.partial_text) == (JobStatus.FAILED, last.error, last.partial_text)


def test_passed_deadline_does_not_take_a_job_from_a_beating_worker(ledger: Ledger, redis_client: redis.Redis) -> None:
    started(ledger, "a", deadline_s=60)
    deadline_passes(redis_client, "a")
    assert ledger.reap() == ()
    assert event_types(redis_client, "a")[-1] == "job.started"


def test_deadline_in_the_queue_is_noticed_when_it_passes(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.submit("a", question(deadline_s=0.05))  # the grace is 15 s
    eventually(lambda: (ledger.reap(), event_types(redis_client, "a")[-1])[1] == "job.expired", 5)
    last = events(redis_client, "a")[-1]
    assert isinstance(last, JobExpired)
    assert last.error.code is ErrorCode.EXPIRED


def test_deadline_is_noticed_while_a_given_back_job_waits(ledger: Ledger, redis_client: redis.Redis) -> None:
    claim = started(ledger, "a", deadline_s=0.3)
    ledger.give_back("a", claim.fence, RetryReason.STORAGE, delay_s=60)
    eventually(lambda: (ledger.reap(), event_types(redis_client, "a")[-1])[1] == "job.expired", 5)


# lost doorbells


@pytest.mark.parametrize("priority", [0, 2, 3, 6, 8, 9])
def test_doorbell_missing_from_an_empty_list_is_rung_again_after_a_grace(
    ledger: Ledger, redis_client: redis.Redis, priority: int
) -> None:
    ledger.submit("a", question(priority=priority))
    lose_doorbells(redis_client)
    assert ledger.reap() == ()  # it may still be between list and claim
    assert ledger.reap() == ()
    grace_ends(redis_client, "a")
    assert ledger.reap() == (Bell("a", TaskName.VQA, "default", priority),)
    assert ledger.reap() == ()


@pytest.mark.parametrize("priority", [0, 2, 3, 6, 8, 9])
def test_doorbell_that_waits_for_its_turn_is_never_rung_again(
    ledger: Ledger, redis_client: redis.Redis, priority: int
) -> None:
    for i in range(5):
        ledger.submit(f"job-{i}", question(priority=priority))
    claimed(ledger, "job-0")
    claimed(ledger, "job-1")
    for _ in range(3):
        assert ledger.reap() == ()
    assert set(redis_client.zrange(names.DUE_KEY, 0, -1)) == {"job-0", "job-1"}  # a backlog costs nothing


def test_doorbell_that_later_ones_overtook_is_rung_again(ledger: Ledger, redis_client: redis.Redis) -> None:
    for job_id in ("lost", "next", "last"):
        ledger.submit(job_id, question())
    ring_in(redis_client)  # the list is not empty
    claimed(ledger, "next")
    for _ in range(3):
        assert ledger.reap() == ()
    grace_ends(redis_client, "lost")
    assert ids(ledger.reap()) == ["lost"]
    for _ in range(3):
        look_again(redis_client, "lost")
        assert ledger.reap() == ()  # its new doorbell is behind `last`: no storm
    claimed(ledger, "lost")


def test_claims_from_another_priority_list_overtake_nobody(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.submit("slow", question(priority=9))
    ledger.submit("fast", question(priority=0))
    ring_in(redis_client, priority=9)
    claimed(ledger, "fast")
    assert ledger.reap() == ()
    assert redis_client.zrange(names.DUE_KEY, 0, -1) == ["fast"]


def test_adopted_jobs_overtake_nobody(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.submit("a", question())
    ring_in(redis_client)
    ledger.adopt("b", task=TaskName.VQA, model="default", job=question(), priority=6)
    claimed(ledger, "b")
    assert ledger.reap() == ()
    assert redis_client.zrange(names.DUE_KEY, 0, -1) == ["b"]


def test_rung_job_overtakes_nobody_when_its_old_doorbell_was_only_slow(
    ledger: Ledger, redis_client: redis.Redis
) -> None:
    for job_id in ("a", "b"):
        ledger.submit(job_id, question())
    lose_doorbells(redis_client)
    ledger.reap()  # the list is empty: both are suspects
    grace_ends(redis_client, "a")
    assert ids(ledger.reap()) == ["a"]
    ring_in(redis_client, num=2)  # a worker that was only slow puts the first ones back
    claimed(ledger, "a")
    grace_ends(redis_client, "b")
    assert ledger.reap() == ()
    assert redis_client.zrange(names.waiting_key(LIST), 0, -1) == ["b"]


def test_adopted_job_that_nobody_claimed_is_rung_after_a_grace(connect: Connect, redis_client: redis.Redis) -> None:
    ledger = connect(LedgerConfig(grace_s=0.02))
    ring_in(redis_client)
    ledger.adopt("a", task=TaskName.CAPTION, model="default", job=None, priority=6)
    assert reap_until_bells(ledger) == (Bell("a", TaskName.CAPTION, "default", 6),)


def test_bell_that_is_lost_again_is_rung_again(ledger: Ledger, redis_client: redis.Redis) -> None:
    started(ledger, "a")
    assert ids(lose(ledger, redis_client, "a")) == ["a"]
    lose_doorbells(redis_client)
    ledger.beat("worker-2", "default", [])  # whoever could lose it lives
    assert ledger.reap() == ()
    grace_ends(redis_client, "a")
    assert ids(ledger.reap()) == ["a"]


def test_final_jobs_leave_only_counters_and_keys_that_expire(ledger: Ledger, redis_client: redis.Redis) -> None:
    claim = started(ledger, "a")
    ledger.finish("a", claim.fence, answer(claim))
    ledger.submit("b", question(priority=0))
    ledger.cancel("b")
    ledger.submit("c", question())
    claimed(ledger, "c")
    deadline_passes(redis_client, "c")
    lose(ledger, redis_client, "c")
    lose_doorbells(redis_client)  # workers have taken them
    ledger.reap()
    lasting = {key for key in redis_client.scan_iter() if redis_client.ttl(key) == -1}
    assert lasting == {
        names.FENCE_KEY, names.SUBMITTED_KEY, names.COUNTS_KEY, names.WATCH_KEY, names.depth_key("default"),
    }  # fmt: skip
    assert redis_client.get(names.depth_key("default")) == "0"


# what a sweep costs


def commands_of_a_sweep(ledger: Ledger, client: redis.Redis, pause_s: float = 0.0) -> int:
    """Count the commands that one sweep runs inside Redis."""

    def total() -> int:
        return sum(int(each["calls"]) for each in client.info("commandstats").values())

    before = total()
    ledger.reap(pause_s)
    return total() - before


def test_a_sweep_costs_what_is_due_and_not_what_exists(ledger: Ledger, redis_client: redis.Redis) -> None:
    """Models that nobody serves, with jobs that wait, held ones too: each is looked at once after it came."""
    ledger.submit("a", question(model="served"))
    for _ in range(3):
        ledger.reap()
    alone = commands_of_a_sweep(ledger, redis_client)
    for number in range(300):
        for job in range(2):
            ledger.submit(
                f"{number}-{job}", question(model=f"invented-{number}", tenant=f"tenant-{number // 50}", priority=job)
            )
    for _ in range(5):
        ledger.reap()
    assert commands_of_a_sweep(ledger, redis_client) <= alone + 1
    assert redis_client.zcard(names.NEWS_KEY) == 0
    assert not redis_client.hexists(names.WATCH_KEY, "older")  # processes of this release take none of theirs for older


def test_one_step_of_a_sweep_does_a_bounded_amount_of_work(
    ledger: Ledger, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much is due at once: Redis answers others in between."""
    monkeypatch.setattr("api_stub.ledger.ledger.MAX_BATCHES", 1)
    for number in range(500):
        ledger.submit(f"{number}", question(model=f"invented-{number}", deadline_s=3600))
        redis_client.hset(names.job_key(f"{number}"), "queued_at", "1")
    for number in range(500):
        redis_client.zadd(names.DUE_KEY, {f"{number}": 1})
        redis_client.hset(names.job_key(f"{number}"), "deadline", "1")
    most = max(commands_of_a_sweep(ledger, redis_client) for _ in range(30))
    assert 500 < most < 4000
    assert redis_client.zcard(names.NEWS_KEY) == 0
    assert redis_client.hget(names.job_key("499"), "status") == "expired"


def test_one_sweep_counts_for_all_processes_until_its_pause_is_over(
    connect: Connect, redis_client: redis.Redis
) -> None:
    first, second = connect(LedgerConfig()), connect(LedgerConfig())
    for job_id in ("a", "b"):
        started(first, job_id)
    lease_ends(redis_client, "a")
    assert ids(first.reap(pause_s=60)) == ["a"]
    lease_ends(redis_client, "b")
    assert second.reap(pause_s=60) == ()
    assert first.reap(pause_s=60) == ()
    redis_client.delete(names.SWEEP_KEY)  # the pause is over, and the first process is dead
    assert ids(second.reap(pause_s=60)) == ["b"]


def test_a_process_that_sweeps_seldom_keeps_nobody_else_from_it(connect: Connect, redis_client: redis.Redis) -> None:
    seldom, often = connect(LedgerConfig()), connect(LedgerConfig())
    seldom.reap(pause_s=3600)
    started(often, "a")
    lease_ends(redis_client, "a")
    eventually(lambda: ids(often.reap(pause_s=0.05)) == ["a"], timeout_s=5, what="the sweep of the other")


def test_redis_clock_that_is_set_back_stops_no_sweep(ledger: Ledger, redis_client: redis.Redis) -> None:
    """The last sweep's mark lies an hour ahead then, and so does its expiry."""
    started(ledger, "a")
    lease_ends(redis_client, "a")
    redis_client.set(names.SWEEP_KEY, f"{time.time() + 3600:.6f}", ex=3600)
    assert ids(ledger.reap(pause_s=0.75)) == ["a"]
    assert redis_client.pttl(names.SWEEP_KEY) <= 750


def test_jobs_of_a_model_whose_last_worker_fell_silent_are_looked_at_once_more(
    ledger: Ledger, redis_client: redis.Redis
) -> None:
    """It had taken a message off the list and not claimed the job yet; nobody is there to notice."""
    ledger.beat("worker-1", "default", [])
    ledger.submit("a", question())
    ledger.reap()
    lose_doorbells(redis_client)
    ledger.reap()
    assert not redis_client.hexists(names.job_key("a"), "alarm")
    redis_client.zadd(names.SERVING_KEY, {"default": 1})
    ledger.reap()
    assert redis_client.hexists(names.job_key("a"), "alarm")
    assert redis_client.zcard(names.SERVING_KEY) == 0


def test_lists_are_looked_at_for_workers_whose_release_does_not_ask_for_it(
    connect: Connect, redis_client: redis.Redis
) -> None:
    """Workers of 0.1.0 sign on without it, and this sweep takes from them the set that their own sweeps read."""
    ledger = connect(LedgerConfig(lease_s=0.2, grace_s=0.005))
    redis_client.zadd(names.workers_key("default"), {"of-0.1.0": time.time() + 60})
    ledger.submit("a", question())
    ledger.reap()
    lose_doorbells(redis_client)
    redis_client.delete(names.workers_key("default"))  # it took the message, died, and its lease is over
    assert reap_until_bells(ledger)[0].job_id == "a"
    assert redis_client.zcard(names.SERVING_KEY) == 0


def test_nothing_is_kept_of_a_model_without_jobs(ledger: Ledger, redis_client: redis.Redis) -> None:
    claim = started(ledger, "a", model="once", priority=0)
    ledger.finish("a", claim.fence, answer(claim))
    lose_doorbells(redis_client, "once")
    kept = [key for key in redis_client.scan_iter("*once*") if redis_client.ttl(key) == -1]
    assert kept == [names.depth_key("once")]
    assert not redis_client.exists(names.LISTS_KEY, names.NEWS_KEY)


# the loop


def test_reaper_rings_until_it_is_stopped(connect: Connect) -> None:
    ledger = connect(HASTY)
    started(ledger, "a")
    lose_doorbells(ledger.client)
    with running(Reaper(ledger, sweep_s=0.01)):
        eventually(lambda: doorbells_in(ledger.client), what="the bell is rung")
    assert doorbells_in(ledger.client)[0] == "a"


def test_reaper_outlives_an_absent_redis(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = RedisServer(tmp_path, "--appendfsync", "always")
    with closing(Ledger.connect(server.url, HASTY)) as ledger:
        started(ledger, "a")
        lose_doorbells(ledger.client)
        server.kill()
        with running(Reaper(ledger, sweep_s=0.01)):
            eventually(lambda: any(record.getMessage() == "sweep failed" for record in caplog.records))
            server.start()
            what = "the append-only file brought the job back and it is rung"
            eventually(lambda: doorbells_in(ledger.client), what=what)
    server.stop()


def test_a_task_of_another_release_breaks_no_reader_and_no_sweep(ledger: Ledger, redis_client: redis.Redis) -> None:
    for job_id in ("newer", "a"):
        started(ledger, job_id)
    redis_client.hset(names.job_key("newer"), "task", "visionq.of-tomorrow")
    lease_ends(redis_client, "newer", "a")
    assert {(bell.job_id, bell.task) for bell in ledger.reap()} == {("newer", None), ("a", TaskName.VQA)}
    assert ledger.view("newer") in ledger.list_jobs().jobs
    assert claimed(ledger, "newer").task is None


def test_reaper_outlives_what_it_cannot_read(connect: Connect, redis_client: redis.Redis) -> None:
    ledger = connect(HASTY)
    started(ledger, "odd")
    redis_client.hset(names.job_key("odd"), "priority", "urgent")
    lease_ends(redis_client, "odd")
    with running(Reaper(ledger, sweep_s=0.01)):
        eventually(lambda: "odd" in doorbells_in_text(redis_client), what="the sweep that met it")
        started(ledger, "a")
        eventually(lambda: '"a"' in doorbells_in_text(redis_client), what="a later sweep rings")


def doorbells_in_text(client: redis.Redis) -> str:
    lists = (names.queue_list("default", step) for step in names.PRIORITY_STEPS)
    return "".join("".join(client.lrange(key, 0, -1)) for key in lists)
