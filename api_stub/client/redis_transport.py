"""The way through Redis: ledger and event streams; uploads go to S3."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import NoReturn

from api_stub import connections
from api_stub.client.follow import AsyncFollower, Follower
from api_stub.contract.event import Event, FinalEvent, JobCompleted
from api_stub.contract.job import Job
from api_stub.contract.result import Result
from api_stub.contract.view import JobSelection, JobView
from api_stub.cursor import answered
from api_stub.errors import InvalidRequest, UnknownJob
from api_stub.ledger.aio import AsyncLedger
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Cancelled, CancelledJobs, Deleted, QueueChange
from api_stub.settings import ClientSettings
from api_stub.storage import Storage
from api_stub.submit import retried, submit, submit_async, submit_errors


class DirectTransport:
    """Reaches jobs through the ledger in Redis. Connections are opened on first use."""

    def __init__(self, settings: ClientSettings) -> None:
        url = settings.redis_url.get_secret_value()
        self._commands = connections.commands(url)
        self._readers = connections.readers(url)
        self._ledger = Ledger(self._commands, settings.ledger)
        self._follower = Follower(self._ledger, self._readers)
        self._uploads = _Uploads(settings)

    def submit(self, job_id: str, job: Job) -> None:
        """Hand a job in. The same id and body again is the same job."""
        submit(self._ledger, job_id, job)

    def retry(self, job_id: str) -> str:
        """Queue a new job with the body of a finished one; return its id."""
        with submit_errors():
            return retried(job_id, self._ledger.retry(job_id))

    def view(self, job_id: str) -> JobView:
        """Look at a job."""
        with connections.store_errors():
            view = self._ledger.view(job_id)
        return view or _unknown(job_id)

    def cancel(self, job_id: str) -> Cancelled:
        """Ask for a job's end; never answers UNKNOWN."""
        with connections.store_errors():
            answer = self._ledger.cancel(job_id)
        return _unknown(job_id) if answer is Cancelled.UNKNOWN else answer

    def cancel_jobs(self, tenant: str, wanted: JobSelection) -> CancelledJobs:
        """Ask for the end of all jobs of a tenant that are wanted."""
        with connections.store_errors():
            return self._ledger.cancel_jobs(tenant, wanted)

    def delete(self, job_id: str) -> None:
        """Remove a final job, its events and its result."""
        with connections.store_errors():
            answer = self._ledger.delete(job_id)
        _check_deleted(job_id, answer)

    def pause(self, model: str) -> QueueChange:
        """Let nobody claim a model's jobs."""
        with connections.store_errors():
            return self._ledger.pause(model)

    def resume(self, model: str) -> QueueChange:
        """Let a model's jobs be claimed again."""
        with connections.store_errors():
            return self._ledger.resume(model)

    def purge(self, model: str) -> int:
        """End all queued jobs of a model; return how many."""
        with connections.store_errors():
            return self._ledger.purge(model)

    def events(self, job_id: str, after: int, timeout: float | None) -> Generator[Event, None, None]:
        """Yield a job's events above seq `after`, the final one last; `timeout` bounds silence."""
        return self._follower.events(job_id, after, timeout)

    def result(self, job_id: str, timeout: float | None) -> Result:
        """Wait at most `timeout` seconds for a job's answer."""
        return _result(self._follower.ending(job_id, timeout))

    def dead(self, limit: int) -> tuple[JobView, ...]:
        """Return the jobs that were given up, newest first."""
        with connections.store_errors():
            return self._ledger.dead(limit)

    def drop(self, job_id: str) -> bool:
        """Take a job off the list of dead jobs."""
        with connections.store_errors():
            return self._ledger.drop(job_id)

    def upload(self, path: str | Path) -> str:
        """Store a local file and return its URI."""
        return self._uploads.storage().upload(path)

    def close(self) -> None:
        """Close all connections.

        Readers that are still active lose their connections.
        """
        self._commands.close()
        self._readers.close()
        self._uploads.close()


class AsyncDirectTransport:
    """Reaches jobs through the ledger in Redis, for asyncio. Connections are opened on first use."""

    def __init__(self, settings: ClientSettings) -> None:
        url = settings.redis_url.get_secret_value()
        self._commands = connections.async_commands(url)
        self._readers = connections.async_readers(url)
        self._ledger = AsyncLedger(self._commands, settings.ledger)
        self._follower = AsyncFollower(self._ledger, self._readers)
        self._uploads = _Uploads(settings)

    async def submit(self, job_id: str, job: Job) -> None:
        """Hand a job in. The same id and body again is the same job."""
        await submit_async(self._ledger, job_id, job)

    async def retry(self, job_id: str) -> str:
        """Queue a new job with the body of a finished one; return its id."""
        with submit_errors():
            return retried(job_id, await self._ledger.retry(job_id))

    async def view(self, job_id: str) -> JobView:
        """Look at a job."""
        with connections.store_errors():
            view = await self._ledger.view(job_id)
        return view or _unknown(job_id)

    async def cancel(self, job_id: str) -> Cancelled:
        """Ask for a job's end; never answers UNKNOWN."""
        with connections.store_errors():
            answer = await self._ledger.cancel(job_id)
        return _unknown(job_id) if answer is Cancelled.UNKNOWN else answer

    async def cancel_jobs(self, tenant: str, wanted: JobSelection) -> CancelledJobs:
        """Ask for the end of all jobs of a tenant that are wanted."""
        with connections.store_errors():
            return await self._ledger.cancel_jobs(tenant, wanted)

    async def delete(self, job_id: str) -> None:
        """Remove a final job, its events and its result."""
        with connections.store_errors():
            answer = await self._ledger.delete(job_id)
        _check_deleted(job_id, answer)

    async def pause(self, model: str) -> QueueChange:
        """Let nobody claim a model's jobs."""
        with connections.store_errors():
            return await self._ledger.pause(model)

    async def resume(self, model: str) -> QueueChange:
        """Let a model's jobs be claimed again."""
        with connections.store_errors():
            return await self._ledger.resume(model)

    async def purge(self, model: str) -> int:
        """End all queued jobs of a model; return how many."""
        with connections.store_errors():
            return await self._ledger.purge(model)

    def events(self, job_id: str, after: int, timeout: float | None) -> AsyncGenerator[Event, None]:
        """Yield a job's events above seq `after`, the final one last; `timeout` bounds silence."""
        return self._follower.events(job_id, after, timeout)

    async def result(self, job_id: str, timeout: float | None) -> Result:
        """Wait at most `timeout` seconds for a job's answer."""
        return _result(await self._follower.ending(job_id, timeout))

    async def dead(self, limit: int) -> tuple[JobView, ...]:
        """Return the jobs that were given up, newest first."""
        with connections.store_errors():
            return await self._ledger.dead(limit)

    async def drop(self, job_id: str) -> bool:
        """Take a job off the list of dead jobs."""
        with connections.store_errors():
            return await self._ledger.drop(job_id)

    async def upload(self, path: str | Path) -> str:
        """Store a local file and return its URI.

        Runs in another thread: boto3 blocks.
        """
        return await asyncio.to_thread(lambda: self._uploads.storage().upload(path))

    async def close(self) -> None:
        """Close all connections."""
        await self._commands.aclose()
        await self._readers.aclose()
        self._uploads.close()


class _Uploads:
    """Opens the storage on first use: boto3 takes a while to start, and most producers have their media in S3."""

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._storage: Storage | None = None

    def storage(self) -> Storage:
        with self._lock:
            if self._storage is None:
                self._storage = Storage(self._settings)
            return self._storage

    def close(self) -> None:
        with self._lock:
            if self._storage is not None:
                self._storage.close()
                self._storage = None


def _result(ending: FinalEvent) -> Result:
    if isinstance(ending, JobCompleted):
        return ending.result
    return answered(None, ending.error)


def _check_deleted(job_id: str, answer: Deleted) -> None:
    if answer is Deleted.UNKNOWN:
        _unknown(job_id)
    if answer is Deleted.UNFINISHED:
        raise InvalidRequest(f"job {job_id!r} has not ended; only a finished job can be deleted")
    if answer is Deleted.LINKED:
        raise InvalidRequest(f"job {job_id!r}: its links are not sent yet; it can be deleted after that")


def _unknown(job_id: str) -> NoReturn:
    raise UnknownJob(f"no job {job_id!r}: never submitted, not adopted yet, or its record has expired")
