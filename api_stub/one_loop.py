"""Keeps an asynchronous transport to the event loop that used it first: its connections belong to that one.

On another loop they would fail somewhere inside, with an error that names neither client nor loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from api_stub.contract.event import Event
from api_stub.contract.job import Job
from api_stub.contract.result import Result
from api_stub.contract.selection import JobSelection
from api_stub.contract.view import JobView
from api_stub.errors import WrongEventLoop
from api_stub.ledger.rows import Cancelled, CancelledJobs, QueueChange
from api_stub.transport import AsyncTransport


class OneLoop:
    """See `AsyncTransport`. Every method raises WrongEventLoop on another loop than the first call's."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport
        self._loop: asyncio.AbstractEventLoop | None = None

    async def submit(self, job_id: str, job: Job) -> None:
        """See `Transport.submit`."""
        await self._here().submit(job_id, job)

    async def retry(self, job_id: str) -> str:
        """See `Transport.retry`."""
        return await self._here().retry(job_id)

    async def view(self, job_id: str) -> JobView:
        """See `Transport.view`."""
        return await self._here().view(job_id)

    async def cancel(self, job_id: str) -> Cancelled:
        """See `Transport.cancel`."""
        return await self._here().cancel(job_id)

    async def cancel_jobs(self, tenant: str, wanted: JobSelection) -> CancelledJobs:
        """See `Transport.cancel_jobs`."""
        return await self._here().cancel_jobs(tenant, wanted)

    async def delete(self, job_id: str) -> None:
        """See `Transport.delete`."""
        await self._here().delete(job_id)

    async def pause(self, model: str) -> QueueChange:
        """See `Transport.pause`."""
        return await self._here().pause(model)

    async def resume(self, model: str) -> QueueChange:
        """See `Transport.resume`."""
        return await self._here().resume(model)

    async def purge(self, model: str) -> int:
        """See `Transport.purge`."""
        return await self._here().purge(model)

    async def events(self, job_id: str, after: int, timeout: float | None) -> AsyncGenerator[Event, None]:
        """See `Transport.events`."""
        async with aclosing(self._here().events(job_id, after, timeout)) as events:
            async for event in events:
                yield event

    async def result(self, job_id: str, timeout: float | None) -> Result:
        """See `Transport.result`."""
        return await self._here().result(job_id, timeout)

    async def dead(self, limit: int) -> tuple[JobView, ...]:
        """See `Transport.dead`."""
        return await self._here().dead(limit)

    async def drop(self, job_id: str) -> bool:
        """See `Transport.drop`."""
        return await self._here().drop(job_id)

    async def upload(self, path: str | Path) -> str:
        """See `Transport.upload`."""
        return await self._here().upload(path)

    async def close(self) -> None:
        """See `Transport.close`."""
        await self._here().close()

    def _here(self) -> AsyncTransport:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            state = "is closed" if self._loop.is_closed() else "is another one"
            raise WrongEventLoop(
                f"this AsyncClient belongs to the event loop that used it first, which {state}:"
                " make one AsyncClient per event loop, inside the coroutine that asyncio.run() runs"
            )
        return self._transport
