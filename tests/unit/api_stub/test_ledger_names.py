"""Model names: which are known, and what becomes of jobs under names that nobody serves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import redis

from api_stub.contract import names
from api_stub.contract.error import ErrorCode
from api_stub.contract.event import JobExpired
from api_stub.contract.status import JobStatus
from api_stub.errors import QueueFull
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import StrangeModel, Submission
from api_stub.ledger.settings import LedgerConfig
from api_stub.submit import submit
from tests.unit.api_stub.ledger_kit import answer, claimed, doorbells_in, event_types, events, question

TTL_S = 100
DAY_S = 86_400


@pytest.fixture
def ledger(redis_url: str) -> Iterator[Ledger]:
    with closing(Ledger.connect(redis_url, LedgerConfig(unserved_ttl_s=TTL_S))) as opened:
        yield opened


def look(ledger: Ledger, client: redis.Redis, *job_ids: str) -> None:
    """Sweep when it is time to look whether anybody serves these jobs."""
    for job_id in job_ids:
        client.zadd(names.UNSERVED_KEY, {job_id: 1}, xx=True)
    ledger.reap()


def age(client: redis.Redis, seconds: float, *job_ids: str) -> None:
    """Let jobs be older than they are."""
    for job_id in job_ids:
        created = float(client.hget(names.job_key(job_id), "created")) - seconds
        client.hset(names.job_key(job_id), "created", f"{created:.6f}")


def served_ago(client: redis.Redis, seconds: float, model: str = "default") -> None:
    """Let a model's last worker have left so long ago."""
    client.delete(names.workers_key(model))
    client.zadd(names.KNOWN_KEY, {model: client.time()[0] - seconds})


def status_of(ledger: Ledger, job_id: str) -> JobStatus:
    view = ledger.view(job_id)
    assert view is not None
    return view.status


def test_a_name_is_known_while_it_is_served_or_loaded_and_for_a_day_after(
    ledger: Ledger, redis_client: redis.Redis
) -> None:
    ledger.submit("a", question(model="typo"))
    ledger.beat("worker-1", "served", [])
    ledger.loading("loading")
    assert ledger.known() == {"served", "loading"}
    ledger.leave("worker-1", "served")
    served_ago(redis_client, DAY_S - 60, "served")
    served_ago(redis_client, DAY_S + 60, "loading")
    assert ledger.known() == {"served"}
    ledger.reap()
    assert redis_client.zrange(names.KNOWN_KEY, 0, -1) == ["served"]  # and the others are forgotten


def test_the_name_of_a_worker_of_the_last_release_is_known_when_it_is_asked_for_or_gets_a_job(
    ledger: Ledger, redis_client: redis.Redis
) -> None:
    now = redis_client.time()[0]
    redis_client.zadd(names.workers_key("old"), {"worker-1": now + 60})
    redis_client.hset(names.WATCH_KEY, mapping={"at": f"{now}.000000", "seconds": "1"})  # it beats without a mark
    assert ledger.known() == frozenset()
    assert ledger.known("old") == {"old"}
    ledger.submit("a", question(model="old"))
    ledger.reap()
    assert ledger.known() == {"old"}


def test_a_job_that_nobody_serves_warns_until_a_worker_is_there(ledger: Ledger) -> None:
    ledger.submit("a", question())
    view = ledger.view("a")
    assert view is not None
    assert (view.num_workers, view.warnings) == (
        0,
        ("no worker serves the model 'default' now; the job waits for one",),
    )
    ledger.beat("worker-1", "default", [])
    view = ledger.view("a")
    assert view is not None
    assert (view.num_workers, view.warnings) == (1, None)
    assert "warnings" not in view.to_json()


def test_a_job_expires_when_nobody_has_served_its_model_for_long_enough(
    ledger: Ledger, redis_client: redis.Redis
) -> None:
    for job_id in ("old", "young"):
        ledger.submit(job_id, question(model="nobodys"))
    age(redis_client, TTL_S - 5, "young")
    age(redis_client, TTL_S, "old")
    look(ledger, redis_client, "old", "young")
    assert (status_of(ledger, "old"), status_of(ledger, "young")) == (JobStatus.EXPIRED, JobStatus.QUEUED)
    ending = events(redis_client, "old")[-1]
    assert isinstance(ending, JobExpired)
    assert (ending.error.code, ending.error.retryable) == (ErrorCode.EXPIRED, True)
    for word in ('"nobodys"', "100 s", "VISIONQ_UNSERVED_TTL_S", "start a worker"):
        assert word in ending.error.message
    assert doorbells_in(redis_client, "nobodys") == ["young"]
    again_at = redis_client.zscore(names.UNSERVED_KEY, "young")
    assert 0 < again_at - redis_client.time()[0] <= 6


def test_a_model_whose_last_worker_left_keeps_its_jobs_as_long_as_a_new_one(
    ledger: Ledger, redis_client: redis.Redis
) -> None:
    ledger.submit("a", question())
    age(redis_client, 10 * TTL_S, "a")
    ledger.beat("worker-1", "default", [])
    look(ledger, redis_client, "a")
    assert status_of(ledger, "a") is JobStatus.QUEUED  # it only waits for its turn
    served_ago(redis_client, TTL_S - 5)
    look(ledger, redis_client, "a")
    assert status_of(ledger, "a") is JobStatus.QUEUED
    served_ago(redis_client, TTL_S)
    look(ledger, redis_client, "a")
    assert status_of(ledger, "a") is JobStatus.EXPIRED


def test_a_running_job_never_expires_unserved(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.submit("a", question())
    claim = claimed(ledger, "a")
    age(redis_client, 10 * TTL_S, "a")
    served_ago(redis_client, 10 * TTL_S)
    look(ledger, redis_client, "a")
    assert status_of(ledger, "a") is JobStatus.IN_PROGRESS
    assert redis_client.zscore(names.UNSERVED_KEY, "a") > redis_client.time()[0]
    ledger.finish("a", claim.fence, answer(claim))
    assert redis_client.zcard(names.UNSERVED_KEY) == 0


def test_no_job_of_a_paused_queue_expires_unserved(ledger: Ledger, redis_client: redis.Redis) -> None:
    """Who scales to zero while it is paused finds the jobs afterwards, and has the whole time to start a worker."""
    ledger.submit("a", question())
    ledger.pause("default")
    age(redis_client, 10 * TTL_S, "a")
    served_ago(redis_client, 10 * TTL_S)
    look(ledger, redis_client, "a")
    assert status_of(ledger, "a") is JobStatus.QUEUED
    ledger.resume("default")
    look(ledger, redis_client, "a")
    assert status_of(ledger, "a") is JobStatus.QUEUED
    served_ago(redis_client, TTL_S)
    look(ledger, redis_client, "a")
    assert status_of(ledger, "a") is JobStatus.EXPIRED


def test_held_jobs_of_an_unserved_model_expire_with_the_rest_and_leave_nothing(
    ledger: Ledger, redis_client: redis.Redis
) -> None:
    jobs = [f"job-{i}" for i in range(3 * LedgerConfig().window)]
    for job_id in jobs:
        ledger.submit(job_id, question(model="nobodys", tenant=f"tenant-{job_id[-1]}"))
    age(redis_client, TTL_S, *jobs)
    look(ledger, redis_client, *jobs)
    assert {status_of(ledger, job_id) for job_id in jobs} == {JobStatus.EXPIRED}
    assert event_types(redis_client, "job-0") == ["job.queued", "job.expired"]
    assert doorbells_in(redis_client, "nobodys") == []
    assert list(redis_client.scan_iter("*nobodys*")) == []


@pytest.mark.parametrize("end", ["cancel", "purge", "deadline"])
def test_queued_jobs_of_a_name_that_nobody_served_leave_nothing_however_they_end(
    end: str, ledger: Ledger, redis_client: redis.Redis
) -> None:
    jobs = [f"job-{i}" for i in range(3 * LedgerConfig().window)]
    for job_id in jobs:
        ledger.submit(job_id, question(model="nobodys", tenant=f"tenant-{job_id[-1]}", deadline_s=1000))
    redis_client.lpush(names.queue_list("nobodys", names.PRIORITY_STEPS[-1]), "somebody else's")
    if end == "cancel":
        for job_id in jobs:
            ledger.cancel(job_id)
    elif end == "purge":
        ledger.purge("nobodys")
    else:
        for job_id in jobs:
            redis_client.hset(names.job_key(job_id), "deadline", 1)
            redis_client.zadd(names.DUE_KEY, {job_id: 1})
        ledger.reap()
    assert {status_of(ledger, job_id).is_final for job_id in jobs} == {True}
    (left,) = redis_client.scan_iter("*nobodys*")
    assert redis_client.lrange(left, 0, -1) == ["somebody else's"]


def test_a_list_of_another_type_stops_no_sweep(ledger: Ledger, redis_client: redis.Redis) -> None:
    for model in ("broken", "whole"):
        ledger.submit(model, question(model=model))
        ledger.beat("worker-1", model, ())
    for model in ("broken", "whole"):
        redis_client.delete(names.queue_list(model, names.priority_step(6)))
    redis_client.set(names.queue_list("broken", names.priority_step(6)), "no list")
    ledger.reap()
    assert redis_client.hexists(names.job_key("whole"), "alarm")


def test_a_row_that_somebody_broke_stops_one_sweep(ledger: Ledger, redis_client: redis.Redis) -> None:
    for job_id in ("broken", "a"):
        ledger.submit(job_id, question(model="nobodys"))
    age(redis_client, TTL_S, "a")
    redis_client.hdel(names.job_key("broken"), "created")
    with pytest.raises(redis.ResponseError):
        look(ledger, redis_client, "broken", "a")
    ledger.reap()
    assert status_of(ledger, "a") is JobStatus.EXPIRED


def test_a_job_whose_row_is_gone_is_looked_at_once(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.submit("a", question())
    redis_client.delete(names.job_key("a"))
    look(ledger, redis_client, "a")
    assert redis_client.zcard(names.UNSERVED_KEY) == 0


def test_a_tenant_has_jobs_under_a_bounded_number_of_names_that_nobody_served(
    ledger: Ledger, redis_client: redis.Redis
) -> None:
    for i in range(100):
        ledger.submit(f"job-{i}", question(model=f"typo-{i}", tenant="a"))
    before = redis_client.dbsize()
    with pytest.raises(StrangeModel, match=r"'typo-100'.*tenant 'a' wait under 100 such names"):
        ledger.submit("more", question(model="typo-100", tenant="a"))
    with pytest.raises(QueueFull, match="check the name"):
        submit(ledger, "more", question(model="typo-100", tenant="a"))
    assert redis_client.dbsize() == before
    ledger.loading("served")
    assert ledger.submit("served", question(model="served", tenant="a")) is Submission.CREATED
    assert ledger.submit("same name", question(model="typo-7", tenant="a")) is Submission.CREATED
    assert ledger.submit("other", question(model="typo-100", tenant="b")) is Submission.CREATED
    ledger.cancel("job-3")
    assert ledger.submit("more", question(model="typo-100", tenant="a")) is Submission.CREATED
    assert not redis_client.exists(names.depth_key("typo-3"))
