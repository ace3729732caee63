"""The Python API: `Client` for threads, `AsyncClient` for asyncio. Both submit jobs and hand out their handles.

Media are `s3://` URIs. A local file is uploaded first, by `upload`: the client never sends a file on its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from api_stub import connections
from api_stub.contract.job import DEFAULT_NUM_FRAMES, Job, TaskName
from api_stub.contract.view import JobView
from api_stub.follow import AsyncFollower, Follower
from api_stub.handle import AsyncJobHandle, JobHandle
from api_stub.ledger.aio import AsyncLedger
from api_stub.ledger.ledger import Ledger
from api_stub.settings import ClientSettings
from api_stub.storage import Storage
from api_stub.submit import (
    Doorbells,
    JobOptions,
    checked,
    checked_id,
    compose,
    retried,
    submit,
    submit_async,
    submit_errors,
)


class Client:
    """Submits jobs and follows them. Safe to share between threads; connections are opened on first use.

    Settings come from the environment (`VISIONQ_REDIS_URL`, …), from `redis_url`, or whole as `settings`.
    """

    def __init__(self, redis_url: str | None = None, settings: ClientSettings | None = None) -> None:
        self.settings = _settings(redis_url, settings)
        url = self.settings.redis_url.get_secret_value()
        self._commands = connections.commands(url)
        self._readers = connections.readers(url)
        self._ledger = Ledger(self._commands, self.settings.ledger)
        self._follower = Follower(self._ledger, self._readers)
        self._doorbells = Doorbells(url)
        self._uploads = _Uploads(self.settings)

    def caption(
        self, *media: str, prompt: str | None = None, job_id: str | None = None, **options: Unpack[JobOptions]
    ) -> JobHandle:
        """Describe images. Without `prompt` the checkpoint's own caption prompt is used. Raises as `submit` does."""
        return self._submit(compose(TaskName.CAPTION, media, {"prompt": prompt}, options), job_id)

    def vqa(
        self, *media: str, question: str | None = None, job_id: str | None = None, **options: Unpack[JobOptions]
    ) -> JobHandle:
        """Ask a question about images, or about none. Raises as `submit` does."""
        return self._submit(compose(TaskName.VQA, media, {"question": question}, options), job_id)

    def video_qa(
        self,
        *media: str,
        question: str | None = None,
        num_frames: int = DEFAULT_NUM_FRAMES,
        job_id: str | None = None,
        **options: Unpack[JobOptions],
    ) -> JobHandle:
        """Ask a question about clips, of which `num_frames` each are sampled. Raises as `submit` does."""
        words = {"question": question, "num_frames": num_frames}
        return self._submit(compose(TaskName.VIDEO_QA, media, words, options), job_id)

    def submit(self, job: Job | Mapping[str, object], job_id: str | None = None) -> JobHandle:
        """Hand in a job as a contract type or as its JSON fields with `task`.

        The same `job_id` and body again is the same job, so a call may be repeated after StoreUnavailable.
        Raises InvalidRequest (nothing was enqueued), QueueFull, StoreUnavailable.
        """
        return self._submit(checked(job), job_id)

    def job(self, job_id: str) -> JobHandle:
        """Return the handle of a job by its id, without asking whether there is one."""
        return JobHandle(job_id, self._ledger, self._follower)

    def retry(self, job_id: str) -> JobHandle:
        """Queue a new job with the body of a finished one and return its handle; asked twice, the same new job.

        Raises UnknownJob, InvalidRequest (not finished, or never a valid job), QueueFull, StoreUnavailable.
        """
        with submit_errors():
            return self.job(retried(job_id, self._ledger.retry(job_id)))

    def dead(self, limit: int = 100) -> tuple[JobView, ...]:
        """Return the jobs that were given up because their workers kept dying, newest first."""
        with connections.store_errors():
            return self._ledger.dead(limit)

    def drop(self, job_id: str) -> bool:
        """Take a job off the list of dead jobs; False: it is not on it."""
        with connections.store_errors():
            return self._ledger.drop(job_id)

    def upload(self, path: str | Path) -> str:
        """Store a local file in the media bucket and return its `s3://` URI.

        Raises OSError (no such file), StoreUnavailable, StorageRefused.
        """
        return self._uploads.storage().upload(path)

    def close(self) -> None:
        """Close all connections. Readers that are still active lose theirs."""
        self._doorbells.close()
        self._commands.close()
        self._readers.close()
        self._uploads.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, job: Job, job_id: str | None) -> JobHandle:
        job_id = checked_id(job_id)
        submit(self._ledger, self._doorbells, job_id, job)
        return self.job(job_id)


class AsyncClient:
    """`Client` for asyncio: the same methods, awaited. One event loop per instance."""

    def __init__(self, redis_url: str | None = None, settings: ClientSettings | None = None) -> None:
        self.settings = _settings(redis_url, settings)
        url = self.settings.redis_url.get_secret_value()
        self._commands = connections.async_commands(url)
        self._readers = connections.async_readers(url)
        self._ledger = AsyncLedger(self._commands, self.settings.ledger)
        self._follower = AsyncFollower(self._ledger, self._readers)
        self._doorbells = Doorbells(url)
        self._uploads = _Uploads(self.settings)

    async def caption(
        self, *media: str, prompt: str | None = None, job_id: str | None = None, **options: Unpack[JobOptions]
    ) -> AsyncJobHandle:
        """See `Client.caption`."""
        return await self._submit(compose(TaskName.CAPTION, media, {"prompt": prompt}, options), job_id)

    async def vqa(
        self, *media: str, question: str | None = None, job_id: str | None = None, **options: Unpack[JobOptions]
    ) -> AsyncJobHandle:
        """See `Client.vqa`."""
        return await self._submit(compose(TaskName.VQA, media, {"question": question}, options), job_id)

    async def video_qa(
        self,
        *media: str,
        question: str | None = None,
        num_frames: int = DEFAULT_NUM_FRAMES,
        job_id: str | None = None,
        **options: Unpack[JobOptions],
    ) -> AsyncJobHandle:
        """See `Client.video_qa`."""
        words = {"question": question, "num_frames": num_frames}
        return await self._submit(compose(TaskName.VIDEO_QA, media, words, options), job_id)

    async def submit(self, job: Job | Mapping[str, object], job_id: str | None = None) -> AsyncJobHandle:
        """See `Client.submit`."""
        return await self._submit(checked(job), job_id)

    def job(self, job_id: str) -> AsyncJobHandle:
        """See `Client.job`."""
        return AsyncJobHandle(job_id, self._ledger, self._follower)

    async def retry(self, job_id: str) -> AsyncJobHandle:
        """See `Client.retry`."""
        with submit_errors():
            return self.job(retried(job_id, await self._ledger.retry(job_id)))

    async def dead(self, limit: int = 100) -> tuple[JobView, ...]:
        """See `Client.dead`."""
        with connections.store_errors():
            return await self._ledger.dead(limit)

    async def drop(self, job_id: str) -> bool:
        """See `Client.drop`."""
        with connections.store_errors():
            return await self._ledger.drop(job_id)

    async def upload(self, path: str | Path) -> str:
        """See `Client.upload`. Runs in another thread: boto3 blocks."""
        return await asyncio.to_thread(lambda: self._uploads.storage().upload(path))

    async def close(self) -> None:
        """See `Client.close`."""
        await asyncio.to_thread(self._doorbells.close)
        await self._commands.aclose()
        await self._readers.aclose()
        self._uploads.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _submit(self, job: Job, job_id: str | None) -> AsyncJobHandle:
        job_id = checked_id(job_id)
        await submit_async(self._ledger, self._doorbells, job_id, job)
        return self.job(job_id)


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


def _settings(redis_url: str | None, settings: ClientSettings | None) -> ClientSettings:
    if settings is None:
        return ClientSettings.load(redis_url)
    if redis_url is not None:
        raise TypeError("give redis_url or settings, not both")
    return settings
