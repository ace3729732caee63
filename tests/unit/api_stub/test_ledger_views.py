"""What the ledger tells about many jobs: pages of a tenant's jobs, places in the queue, a stream beside its ending."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing

import pytest
import redis

from api_stub.contract import names
from api_stub.contract.event import JobCompleted, RetryReason
from api_stub.contract.status import JobStatus
from api_stub.ledger.aio import AsyncLedger
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.settings import LedgerConfig
from api_stub.ledger.views import JobPage
from tests.unit.api_stub.ledger_kit import answer, claimed, delta, question, started


@pytest.fixture
def ledger(redis_url: str) -> Iterator[Ledger]:
    with closing(Ledger.connect(redis_url, LedgerConfig())) as opened:
        yield opened


def ids(page: JobPage) -> list[str]:
    return [view.job_id for view in page.jobs]


def position(ledger: Ledger, job_id: str) -> int | None:
    view = ledger.view(job_id)
    assert view is not None
    return view.position


# pages


def test_a_tenant_sees_its_own_jobs_newest_first(ledger: Ledger) -> None:
    for job_id, tenant in (("a", "zoo"), ("b", "park"), ("c", "zoo"), ("d", "")):
        ledger.submit(job_id, question(tenant=tenant))
    assert [ids(ledger.list_jobs(tenant)) for tenant in ("zoo", "park", "", "nobody")] == [["c", "a"], ["b"], ["d"], []]


def test_pages_follow_each_other_without_loss_or_repetition(ledger: Ledger) -> None:
    for i in range(25):
        ledger.submit(f"job-{i:02}", question())
    seen: list[str] = []
    cursor = None
    sizes = []
    while cursor is not None or not seen:
        page = ledger.list_jobs(cursor=cursor, limit=10)
        if not seen:
            ledger.submit("late", question())  # what comes meanwhile moves no page
        seen += ids(page)
        sizes.append(len(page.jobs))
        cursor = page.next_cursor
    assert seen == [f"job-{i:02}" for i in reversed(range(25))]
    assert sizes == [10, 10, 5]


def test_the_last_full_page_says_that_it_is_the_last(ledger: Ledger) -> None:
    for i in range(4):
        ledger.submit(f"job-{i}", question())
    first = ledger.list_jobs(limit=2)
    assert first.next_cursor is not None
    assert ledger.list_jobs(limit=2, cursor=first.next_cursor).next_cursor is None


def test_pages_can_be_filtered_by_status_and_model(ledger: Ledger) -> None:
    claim = started(ledger, "done")
    ledger.finish("done", claim.fence, answer(claim))
    started(ledger, "running")
    ledger.submit("waiting", question())
    ledger.submit("elsewhere", question(model="other"))
    assert ids(ledger.list_jobs(status=JobStatus.COMPLETED)) == ["done"]
    assert ids(ledger.list_jobs(status=JobStatus.QUEUED)) == ["elsewhere", "waiting"]
    assert ids(ledger.list_jobs(status=JobStatus.QUEUED, model="default")) == ["waiting"]
    [view] = ledger.list_jobs(status=JobStatus.COMPLETED).jobs
    assert view == ledger.view("done")


def test_a_rare_match_is_found_page_by_page(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.submit("old", question())
    redis_client.zadd(names.jobs_key(""), {f"gone-{i}": 2e9 + i for i in range(1500)})
    page = ledger.list_jobs()
    assert (ids(page), page.next_cursor is not None) == ([], True)
    page = ledger.list_jobs(cursor=page.next_cursor)
    assert (ids(page), page.next_cursor) == (["old"], None)


@pytest.mark.parametrize("cursor", ["", "x", "-1", "1e9", "+inf", "1 2"])
def test_a_cursor_that_no_page_gave_is_refused(ledger: Ledger, cursor: str) -> None:
    with pytest.raises(ValueError, match="cursor"):
        ledger.list_jobs(cursor=cursor)


def test_expired_jobs_leave_the_index_as_new_ones_come(ledger: Ledger, redis_client: redis.Redis) -> None:
    for i in range(4):
        ledger.submit(f"old-{i}", question())
        redis_client.delete(names.job_key(f"old-{i}"))
        redis_client.zadd(names.jobs_key(""), {f"old-{i}": i})  # as old as a row that has expired
    for i in range(2):
        ledger.submit(f"new-{i}", question())
    assert redis_client.zrange(names.jobs_key(""), 0, -1) == ["new-0", "new-1"]
    assert redis_client.ttl(names.jobs_key("")) > 86_400


def test_pages_are_the_same_in_asyncio(ledger: Ledger, redis_url: str) -> None:
    for i in range(3):
        ledger.submit(f"job-{i}", question(tenant="zoo"))

    async def pages() -> JobPage:
        other = AsyncLedger.connect(redis_url, LedgerConfig())
        try:
            return await other.list_jobs("zoo", limit=2)
        finally:
            await other.close()

    assert asyncio.run(pages()) == ledger.list_jobs("zoo", limit=2)


# places in the queue


def test_position_counts_the_jobs_that_are_served_before(ledger: Ledger) -> None:
    for job_id, priority in (("a", 6), ("b", 6), ("urgent", 0), ("c", 7), ("last", 9)):
        ledger.submit(job_id, question(priority=priority))
    ledger.submit("elsewhere", question(model="other"))
    order = ["urgent", "a", "b", "c", "last"]
    assert [position(ledger, job_id) for job_id in order] == [0, 1, 2, 3, 4]
    assert position(ledger, "elsewhere") == 0
    claim = claimed(ledger, "urgent")
    assert [position(ledger, job_id) for job_id in order] == [None, 0, 1, 2, 3]
    ledger.give_back("urgent", claim.fence, RetryReason.STORAGE, delay_s=60)
    assert position(ledger, "urgent") is None


# replay


def test_replay_reads_events_and_ending_in_one_step(ledger: Ledger) -> None:
    claim = started(ledger, "a")
    ledger.publish([delta(claim, 1, "red")])
    running = ledger.replay("a", after=2)
    assert (running.is_known, running.ending, len(running.events)) == (True, None, 1)
    ledger.finish("a", claim.fence, answer(claim))
    done = ledger.replay("a")
    assert (len(done.events), isinstance(done.ending, JobCompleted)) == (4, True)
    assert ledger.replay("a", after=None).events == ()
    unknown = ledger.replay("nobody")
    assert (unknown.is_known, unknown.ending, unknown.events) == (False, None, ())
