"""Redis' clock is set back, and right again: whatever was due in a moment still is, and nothing is due early."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
import redis
import redis.asyncio

from api_stub.contract import names
from api_stub.contract.event import RetryReason
from api_stub.contract.status import JobStatus
from api_stub.contract.view import JobSelection
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.outbox import Delivery, DeliveryQueue
from api_stub.ledger.rows import CancelledJobs, Claim
from api_stub.ledger.settings import LedgerConfig
from api_stub.ledger.views import JobPage
from tests.servers import eventually
from tests.unit.api_stub.ledger_kit import claimed, question, set_clock_back, started

HOUR_S = 3600.0


@pytest.fixture
def hasty(redis_url: str) -> Iterator[Ledger]:
    """A lease ends soon, and somebody has swept before."""
    ledger = Ledger.connect(redis_url, LedgerConfig(lease_s=0.4))
    ledger.reap()
    yield ledger
    ledger.close()


def status(ledger: Ledger, job_id: str) -> JobStatus:
    view = ledger.view(job_id)
    assert view is not None
    return view.status


def swept_until(ledger: Ledger, condition: Callable[[], object], what: str) -> None:
    eventually(lambda: (ledger.reap(), condition())[1], 10.0, what)


def ahead(client: redis.Redis) -> float:
    return float(client.hget(names.WATCH_KEY, "ahead") or 0)


@pytest.mark.parametrize("is_noticed_first", [True, False])
def test_a_dead_workers_job_is_taken_after_its_lease_not_an_hour_later(
    hasty: Ledger, redis_client: redis.Redis, is_noticed_first: bool
) -> None:
    if is_noticed_first:
        set_clock_back(redis_client, HOUR_S)
    started(hasty, "a")
    if not is_noticed_first:
        set_clock_back(redis_client, HOUR_S)
    swept_until(hasty, lambda: status(hasty, "a") is JobStatus.QUEUED, "it is taken")


def test_a_deadline_passes_when_it_would_have(hasty: Ledger, redis_client: redis.Redis) -> None:
    hasty.submit("a", question(deadline_s=0.4))
    set_clock_back(redis_client, HOUR_S)
    hasty.submit("b", question(deadline_s=0.4))
    hasty.submit("c", question(deadline_s=60))
    for job_id in ("a", "b"):
        swept_until(hasty, lambda job_id=job_id: status(hasty, job_id) is JobStatus.EXPIRED, f"{job_id} expires")  # type: ignore[misc]
    assert status(hasty, "c") is JobStatus.QUEUED


def test_a_job_that_was_given_back_is_due_after_its_delay(hasty: Ledger, redis_client: redis.Redis) -> None:
    claim = started(hasty, "a")
    hasty.give_back("a", claim.fence, RetryReason.STORAGE, 0.4)
    set_clock_back(redis_client, HOUR_S)
    swept_until(hasty, lambda: isinstance(hasty.claim("a", "worker-2"), Claim), "it may be claimed")


def test_a_delivery_is_due_when_it_would_have_been(hasty: Ledger, redis_client: redis.Redis, redis_url: str) -> None:
    hook = {"url": "https://example.org/hook", "events": ["job.queued"]}
    hasty.submit("a", question(webhook=hook))
    set_clock_back(redis_client, HOUR_S)

    async def take() -> tuple[Delivery, ...]:
        async with redis.asyncio.Redis.from_url(redis_url, decode_responses=True) as commands:
            return await DeliveryQueue(commands, LedgerConfig()).take(10, 60)

    swept_until(hasty, lambda: [delivery.job_id for delivery in asyncio.run(take())] == ["a"], "it is taken")


def test_a_clock_that_is_set_right_again_ends_nothing_early(hasty: Ledger, redis_client: redis.Redis) -> None:
    hasty.submit("a", question(deadline_s=60))
    set_clock_back(redis_client, HOUR_S)
    hasty.reap()
    assert ahead(redis_client) == pytest.approx(HOUR_S, abs=5)
    hasty.submit("b", question(deadline_s=60))
    set_clock_back(redis_client, -HOUR_S)
    assert claimed(hasty, "a").deadline_left_s == pytest.approx(60, abs=10)  # before any sweep, too
    hasty.reap()
    assert claimed(hasty, "b").deadline_left_s == pytest.approx(60, abs=10)
    assert ahead(redis_client) == 0.0


def test_time_goes_slower_until_it_is_redis_own_again_and_never_back(hasty: Ledger, redis_client: redis.Redis) -> None:
    seconds, microseconds = redis_client.time()
    redis_client.hset(names.WATCH_KEY, mapping={"ahead": 0.2, "time": f"{seconds + microseconds / 1e6 + 0.2:.6f}"})
    seen: list[float] = []

    def submit() -> float:
        hasty.reap()
        hasty.submit(f"job-{len(seen)}", question())
        seen.append(float(redis_client.hget(names.job_key(f"job-{len(seen)}"), "created") or 0))
        return ahead(redis_client)

    assert 0 < submit() < 0.2
    eventually(lambda: submit() == 0.0, 15.0, "it is Redis' own")
    assert seen == sorted(seen)
    seconds, microseconds = redis_client.time()
    assert seen[-1] <= seconds + microseconds / 1e6


def test_a_clock_that_was_never_set_back_is_not_held_up(hasty: Ledger, redis_client: redis.Redis) -> None:
    """An hour in which nobody swept is an hour."""
    hasty.submit("a", question(deadline_s=60))
    set_clock_back(redis_client, -HOUR_S)
    hasty.reap()
    assert status(hasty, "a") is JobStatus.EXPIRED


def test_jobs_of_a_clock_that_stands_still_are_listed_and_cancelled_all(
    ledger: Ledger, redis_client: redis.Redis
) -> None:
    ledger.reap()
    set_clock_back(redis_client, HOUR_S)
    for number in range(45):
        ledger.submit(f"job-{number}", question())
    listed, page = [], ledger.list_jobs(limit=10)
    while page.jobs:
        listed += [view.job_id for view in page.jobs]
        page = ledger.list_jobs(limit=10, cursor=page.next_cursor) if page.next_cursor else JobPage((), None)
    assert listed == [f"job-{number}" for number in reversed(range(45))]
    assert ledger.cancel_jobs("", JobSelection(status=JobStatus.QUEUED)) == CancelledJobs(45, 0)


def test_a_purge_ends_what_came_after_the_last_sweep_before_the_clock_was_set_back(
    ledger: Ledger, redis_client: redis.Redis
) -> None:
    ledger.reap()
    jobs = [f"job-{number}" for number in range(2 * LedgerConfig().window)]
    for job_id in jobs:
        ledger.submit(job_id, question())
    set_clock_back(redis_client, HOUR_S)
    assert ledger.purge("default") == len(jobs)
