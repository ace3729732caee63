"""How a client reaches the queue: over Redis or through a gateway. Handles know nothing else.

Both raise the same errors: InvalidRequest, QueueFull, UnknownJob, StoreUnavailable, StorageRefused, JobFailed and
TimeoutError. `OneLoop` keeps an asynchronous transport to the event loop that used it first: its connections belong to
that one, and on another loop they would fail with an error that names neither client nor loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing
from pathlib import Path
from typing import Protocol

from api_stub.contract.event import Event
from api_stub.contract.job import Job
from api_stub.contract.result import Result
from api_stub.contract.view import JobSelection, JobView
from api_stub.errors import WrongEventLoop
from api_stub.ledger.rows import Cancelled, CancelledJobs, QueueChange


class Transport(Protocol):
    """For threads; safe to share between them."""

    def submit(self, job_id: str, job: Job) -> None:
        """Hand a job in. The same id and body again is the same job."""

    def retry(self, job_id: str) -> str:
        """Queue a new job with the body of a finished one; return its id."""

    def view(self, job_id: str) -> JobView:
        """Look at a job."""

    def cancel(self, job_id: str) -> Cancelled:
        """Ask for a job's end; never answers UNKNOWN."""

    def cancel_jobs(self, tenant: str, wanted: JobSelection) -> CancelledJobs:
        """Ask for the end of all jobs of a tenant that are wanted."""

    def delete(self, job_id: str) -> None:
        """Remove a final job, its events and its result."""

    def pause(self, model: str) -> QueueChange:
        """Let nobody claim a model's jobs."""

    def resume(self, model: str) -> QueueChange:
        """Let a model's jobs be claimed again."""

    def purge(self, model: str) -> int:
        """End all queued jobs of a model; return how many."""

    def events(self, job_id: str, after: int, timeout: float | None) -> Generator[Event, None, None]:
        """Yield a job's events above seq `after`, the final one last; `timeout` bounds silence."""

    def result(self, job_id: str, timeout: float | None) -> Result:
        """Wait at most `timeout` seconds for a job's answer."""

    def dead(self, limit: int) -> tuple[JobView, ...]:
        """Return the jobs that were given up, newest first."""

    def drop(self, job_id: str) -> bool:
        """Take a job off the list of dead jobs."""

    def upload(self, path: str | Path) -> str:
        """Store a local file and return its URI."""

    def close(self) -> None:
        """Close all connections."""


class AsyncTransport(Protocol):
    """For one event loop."""

    async def submit(self, job_id: str, job: Job) -> None:
        """Hand a job in. The same id and body again is the same job."""

    async def retry(self, job_id: str) -> str:
        """Queue a new job with the body of a finished one; return its id."""

    async def view(self, job_id: str) -> JobView:
        """Look at a job."""

    async def cancel(self, job_id: str) -> Cancelled:
        """Ask for a job's end; never answers UNKNOWN."""

    async def cancel_jobs(self, tenant: str, wanted: JobSelection) -> CancelledJobs:
        """Ask for the end of all jobs of a tenant that are wanted."""

    async def delete(self, job_id: str) -> None:
        """Remove a final job, its events and its result."""

    async def pause(self, model: str) -> QueueChange:
        """Let nobody claim a model's jobs."""

    async def resume(self, model: str) -> QueueChange:
        """Let a model's jobs be claimed again."""

    async def purge(self, model: str) -> int:
        """End all queued jobs of a model; return how many."""

    def events(self, job_id: str, after: int, timeout: float | None) -> AsyncGenerator[Event, None]:
        """Yield a job's events above seq `after`, the final one last; `timeout` bounds silence."""

    async def result(self, job_id: str, timeout: float | None) -> Result:
        """Wait at most `timeout` seconds for a job's answer."""

    async def dead(self, limit: int) -> tuple[JobView, ...]:
        """Return the jobs that were given up, newest first."""

    async def drop(self, job_id: str) -> bool:
        """Take a job off the list of dead jobs."""

    async def upload(self, path: str | Path) -> str:
        """Store a local file and return its URI."""

    async def close(self) -> None:
        """Close all connections."""


class OneLoop:
    """An `AsyncTransport` of one event loop: methods raise WrongEventLoop on another loop than the first call's."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport
        self._loop: asyncio.AbstractEventLoop | None = None

    async def submit(self, job_id: str, job: Job) -> None:
        """Hand a job in. The same id and body again is the same job."""
        await self._here().submit(job_id, job)

    async def retry(self, job_id: str) -> str:
        """Queue a new job with the body of a finished one; return its id."""
        return await self._here().retry(job_id)

    async def view(self, job_id: str) -> JobView:
        """Look at a job."""
        return await self._here().view(job_id)

    async def cancel(self, job_id: str) -> Cancelled:
        """Ask for a job's end; never answers UNKNOWN."""
        return await self._here().cancel(job_id)

    async def cancel_jobs(self, tenant: str, wanted: JobSelection) -> CancelledJobs:
        """Ask for the end of all jobs of a tenant that are wanted."""
        return await self._here().cancel_jobs(tenant, wanted)

    async def delete(self, job_id: str) -> None:
        """Remove a final job, its events and its result."""
        await self._here().delete(job_id)

    async def pause(self, model: str) -> QueueChange:
        """Let nobody claim a model's jobs."""
        return await self._here().pause(model)

    async def resume(self, model: str) -> QueueChange:
        """Let a model's jobs be claimed again."""
        return await self._here().resume(model)

    async def purge(self, model: str) -> int:
        """End all queued jobs of a model; return how many."""
        return await self._here().purge(model)

    async def events(self, job_id: str, after: int, timeout: float | None) -> AsyncGenerator[Event, None]:
        """Yield a job's events above seq `after`, the final one last; `timeout` bounds silence."""
        async with aclosing(self._here().events(job_id, after, timeout)) as events:
            async for event in events:
                yield event

    async def result(self, job_id: str, timeout: float | None) -> Result:
        """Wait at most `timeout` seconds for a job's answer."""
        return await self._here().result(job_id, timeout)

    async def dead(self, limit: int) -> tuple[JobView, ...]:
        """Return the jobs that were given up, newest first."""
        return await self._here().dead(limit)

    async def drop(self, job_id: str) -> bool:
        """Take a job off the list of dead jobs."""
        return await self._here().drop(job_id)

    async def upload(self, path: str | Path) -> str:
        """Store a local file and return its URI."""
        return await self._here().upload(path)

    async def close(self) -> None:
        """Close all connections."""
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
