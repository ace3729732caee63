"""The ledger for asyncio: the same calls as `Ledger`, awaited. One event loop per instance."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TypeVar

import redis
import redis.asyncio

from api_stub.contract.event import FinalBody, RetryReason
from api_stub.contract.job import Job, TaskName
from api_stub.contract.status import JobStatus
from api_stub.contract.view import JobSelection, JobView
from api_stub.ledger import calls, operations, pools, views
from api_stub.ledger.calls import Call
from api_stub.ledger.ledger import MAX_BATCHES, MAX_CONNECTIONS
from api_stub.ledger.lua import Transition, script
from api_stub.ledger.rows import (
    Bell,
    Cancelled,
    CancelledJobs,
    Claim,
    Deleted,
    Finished,
    Hold,
    Publication,
    QueueChange,
    Refusal,
    Submission,
)
from api_stub.ledger.settings import LedgerConfig
from api_stub.ledger.views import JobPage, Replay

T = TypeVar("T")


class AsyncLedger:
    """See `Ledger`: same methods, same meanings, same errors."""

    def __init__(self, client: redis.asyncio.Redis, config: LedgerConfig) -> None:
        if not client.connection_pool.connection_kwargs.get("decode_responses"):
            raise ValueError("the ledger needs a client with decode_responses=True")
        self.client = client
        self.config = config
        self._scripts = {step: client.register_script(script(step, config)) for step in Transition}

    @classmethod
    def connect(cls, url: str, config: LedgerConfig, *, timeout_s: float = 5.0) -> AsyncLedger:
        """Make a ledger with its own connections, opened on first use.

        A silent Redis costs about `timeout_s` per call, then redis.TimeoutError.
        """
        client = pools.async_client(url, timeout_s=timeout_s, max_connections=MAX_CONNECTIONS)
        return cls(client, config)

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()

    async def submit(self, job_id: str, job: Job) -> Submission:
        """See `Ledger.submit`."""
        return await self._run(calls.submit(job_id, job))

    async def adopt(self, job_id: str, *, task: TaskName, model: str, job: Job | None, priority: int) -> Submission:
        """See `Ledger.adopt`."""
        return await self._run(calls.adopt(job_id, task=task, model=model, job=job, priority=priority))

    async def claim(self, job_id: str, worker: str, token: str | None = None) -> Claim | Refusal:
        """See `Ledger.claim`."""
        return await self._run(calls.claim(job_id, worker, token or uuid.uuid4().hex))

    async def beat(self, worker: str, model: str, held: Sequence[tuple[str, int]]) -> tuple[Hold, ...]:
        """See `Ledger.beat`."""
        return await self._run(calls.beat(worker, model, held))

    async def loading(self, model: str) -> None:
        """See `Ledger.loading`."""
        await self._run(calls.loading(model))

    async def known(self, asked: str = "") -> frozenset[str]:
        """See `Ledger.known`."""
        return await self._run(calls.known(asked))

    async def leave(self, worker: str, model: str) -> None:
        """See `Ledger.leave`."""
        await self._run(calls.leave(worker, model))

    async def publish(self, publications: Sequence[Publication]) -> tuple[bool, ...]:
        """See `Ledger.publish`."""
        return await self._run(calls.publish(publications)) if publications else ()

    async def finish(self, job_id: str, fence: int, body: FinalBody) -> Finished:
        """See `Ledger.finish`."""
        return await self._run(calls.finish(job_id, fence, body))

    async def give_back(
        self, job_id: str, fence: int, reason: RetryReason, delay_s: float = 0.0, is_charged: bool = False
    ) -> bool:
        """See `Ledger.give_back`."""
        return await self._run(calls.give_back(job_id, fence, reason, delay_s, is_charged))

    async def cancel(self, job_id: str) -> Cancelled:
        """See `Ledger.cancel`."""
        return await self._run(calls.cancel(job_id))

    async def retry(self, job_id: str) -> str | None:
        """See `Ledger.retry`."""
        return await self._run(calls.retry(job_id, str(uuid.uuid4())))

    async def dead(self, limit: int = 100) -> tuple[JobView, ...]:
        """See `Ledger.dead`."""
        return await self._run(views.dead(limit))

    async def drop(self, job_id: str) -> bool:
        """See `Ledger.drop`."""
        return await self._run(calls.drop(job_id))

    async def ring_again(self, job_ids: Sequence[str]) -> int:
        """See `Ledger.ring_again`."""
        return await self._run(calls.ring_again(job_ids)) if job_ids else 0

    async def pause(self, model: str) -> QueueChange:
        """See `Ledger.pause`."""
        return await self._run(operations.pause(model))

    async def resume(self, model: str) -> QueueChange:
        """See `Ledger.resume`."""
        return await self._run(operations.resume(model))

    async def purge(self, model: str) -> int:
        """See `Ledger.purge`."""
        step = await self._run(operations.purge(model, None))
        num_ended = step.num_ended
        while step.cursor is not None:
            step = await self._run(operations.purge(model, step))
            num_ended += step.num_ended
        return num_ended

    async def cancel_jobs(self, tenant: str, wanted: JobSelection) -> CancelledJobs:
        """See `Ledger.cancel_jobs`."""
        step = await self._run(operations.cancel_jobs(tenant, wanted, None))
        done = step.done
        while step.cursor is not None:
            step = await self._run(operations.cancel_jobs(tenant, wanted, step))
            done += step.done
        return done

    async def delete(self, job_id: str) -> Deleted:
        """See `Ledger.delete`."""
        return await self._run(operations.delete(job_id))

    async def reap(self, pause_s: float = 0.0) -> tuple[Bell, ...]:
        """See `Ledger.reap`."""
        bells: list[Bell] = []
        for number in range(MAX_BATCHES):
            sweep = await self._run(calls.reap(0.0 if number else pause_s))
            bells.extend(sweep.bells)
            if sweep.is_complete:
                break
        return tuple(bells)

    async def view(self, job_id: str) -> JobView | None:
        """See `Ledger.view`."""
        return await self._run(views.view(job_id))

    async def list_jobs(
        self,
        tenant: str = "",
        status: JobStatus | None = None,
        model: str | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> JobPage:
        """See `Ledger.list_jobs`."""
        return await self._run(views.list_jobs(tenant, status, model, cursor, limit))

    async def replay(self, job_id: str, after: int | None = 0, limit: int | None = None) -> Replay:
        """See `Ledger.replay`."""
        return await self._run(views.replay(job_id, after, limit))

    async def _run(self, call: Call[T]) -> T:
        return call.parse(await self._scripts[call.transition](args=call.args))
