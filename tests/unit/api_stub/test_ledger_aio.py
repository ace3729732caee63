"""The asyncio ledger is the same ledger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import redis
import redis.asyncio

from api_stub.contract import names
from api_stub.contract.event import RetryReason
from api_stub.contract.job import TaskName
from api_stub.contract.status import JobStatus
from api_stub.ledger.aio import AsyncLedger
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Cancelled, Claim, Finished, Hold, JobConflict, LedgerFull, Submission
from api_stub.ledger.settings import LedgerConfig
from tests.unit.api_stub.ledger_kit import answer, delta, event_types, question


@asynccontextmanager
async def opened(redis_url: str, config: LedgerConfig) -> AsyncIterator[AsyncLedger]:
    ledger = AsyncLedger.connect(redis_url, config)
    try:
        yield ledger
    finally:
        await ledger.close()


def test_a_job_lives_its_whole_life_in_asyncio(redis_url: str, redis_client: redis.Redis) -> None:
    async def live() -> None:
        async with opened(redis_url, LedgerConfig()) as ledger:
            assert await ledger.submit("a", question()) is Submission.CREATED
            first = await ledger.claim("a", "worker-1")
            assert isinstance(first, Claim)
            assert await ledger.give_back("a", first.fence, RetryReason.STORAGE)
            [bell] = await ledger.reap()
            assert bell.job_id == "a"
            claim = await ledger.claim("a", "worker-1")
            assert isinstance(claim, Claim)
            assert await ledger.beat("worker-1", "default", [("a", claim.fence)]) == (Hold.HELD,)
            assert await ledger.publish([delta(claim, 1, "re"), delta(claim, 2, "d")]) == (True, True)
            assert await ledger.publish([]) == ()
            assert await ledger.cancel("a") is Cancelled.CANCELLING
            assert await ledger.finish("a", claim.fence, answer(claim)) is Finished.DONE
            view = await ledger.view("a")
            assert view is not None
            assert (view.status, view.num_workers) == (JobStatus.COMPLETED, 1)
            await ledger.leave("worker-1", "default")
            assert await ledger.view("nobody") is None

    asyncio.run(live())
    assert event_types(redis_client, "a") == [
        "job.queued", "job.started", "job.retrying", "job.started", "output.delta", "output.delta", "job.completed",
    ]  # fmt: skip


def test_refusals_are_raised_in_asyncio_too(redis_url: str) -> None:
    async def submit() -> None:
        async with opened(redis_url, LedgerConfig(max_queued=1)) as ledger:
            await ledger.submit("a", question("one"))
            with pytest.raises(JobConflict):
                await ledger.submit("a", question("two"))
            with pytest.raises(LedgerFull):
                await ledger.submit("b", question())
            made = await ledger.adopt("b", task=TaskName.VQA, model="default", job=None, priority=6)
            assert made is Submission.CREATED

    asyncio.run(submit())


def test_many_submissions_at_once_are_all_counted(redis_url: str, redis_client: redis.Redis) -> None:
    async def submit() -> None:
        async with opened(redis_url, LedgerConfig()) as ledger:
            made = await asyncio.gather(*(ledger.submit(f"job-{i % 20}", question()) for i in range(60)))
            assert 0 < made.count(Submission.CREATED) < 20  # the others are held, or were submitted before

    asyncio.run(submit())
    assert redis_client.get(names.depth_key("default")) == "20"


def test_ledgers_refuse_clients_that_answer_in_bytes(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client, pytest.raises(ValueError, match="decode_responses"):
        Ledger(client, LedgerConfig())
    with pytest.raises(ValueError, match="decode_responses"):
        AsyncLedger(redis.asyncio.Redis.from_url(redis_url), LedgerConfig())
