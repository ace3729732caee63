"""The Python API: `Client` for threads, `AsyncClient` for asyncio. Both submit jobs and hand out their handles.

They speak to Redis, or over HTTP to a gateway when their URL is an http:// or https:// one: same methods, same errors.
Media are `s3://` URIs. A local file is uploaded first, by `upload`: the client never sends a file on its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from api_stub.client.choice import async_transport_of, settings_of, transport_of
from api_stub.client.handle import AsyncJobHandle, JobHandle
from api_stub.client.transport import OneLoop
from api_stub.contract.job import DEFAULT_NUM_FRAMES, Job, TaskName
from api_stub.contract.status import JobStatus
from api_stub.contract.view import JobView
from api_stub.ledger.rows import CancelledJobs, QueueChange
from api_stub.settings import ClientSettings
from api_stub.submit import (
    FinetuneSettings,
    JobOptions,
    checked,
    checked_id,
    checked_model,
    checked_selection,
    compose,
    compose_finetune,
)


class Client:
    """Submits jobs and follows them. Safe to share between threads; connections are opened on first use.

    Settings come from the environment (`VISIONQ_REDIS_URL`; `VISIONQ_API_URL` and `VISIONQ_API_KEY` where that one is
    not set), from `url` and `api_key`, or whole as `settings`. Raises InvalidSettings.
    """

    def __init__(
        self, url: str | None = None, settings: ClientSettings | None = None, *, api_key: str | None = None
    ) -> None:
        self.settings = settings_of(url, settings, api_key)
        self._transport = transport_of(url, self.settings)

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

    def finetune(
        self,
        base: str,
        *,
        dataset: str,
        output: str,
        job_id: str | None = None,
        **settings: Unpack[FinetuneSettings],
    ) -> JobHandle:
        """Fine-tune a model on a data set in S3; checkpoints go to `output`. Options of training go flat.

        `base` is the name of a model that the trainer knows, or `s3://bucket/prefix/`. The result has `output_uri`,
        `checkpoint`, `metrics` and `steps`. Raises as `submit` does.
        """
        return self._submit(compose_finetune(base, dataset, output, settings), job_id)

    def submit(self, job: Job | Mapping[str, object], job_id: str | None = None) -> JobHandle:
        """Hand in a job as a contract type or as its JSON fields with `task`.

        The same `job_id` and body again is the same job, so a call may be repeated after StoreUnavailable. A gateway
        takes UUIDs only, of a version other than 5.
        Raises InvalidRequest (nothing was enqueued), QueueFull, StoreUnavailable.
        """
        return self._submit(checked(job), job_id)

    def job(self, job_id: str) -> JobHandle:
        """Return the handle of a job by its id, without asking whether there is one."""
        return JobHandle(job_id, self._transport)

    def retry(self, job_id: str) -> JobHandle:
        """Queue a new job with the body of a finished one and return its handle; asked twice, the same new job.

        Raises UnknownJob, InvalidRequest (not finished, or never a valid job), QueueFull, StoreUnavailable.
        """
        return self.job(self._transport.retry(job_id))

    def cancel_jobs(
        self,
        *,
        status: JobStatus | str | None = None,
        model: str | None = None,
        metadata: Mapping[str, object] | None = None,
        tenant: str = "",
    ) -> CancelledJobs:
        """Cancel all jobs of a tenant that are queued or in progress and have what is given, at least one of the three.

        `metadata`: members that a job's own must have, equal. A gateway's key has its own tenant. The newest 100 000
        jobs of the tenant are looked at. Raises InvalidRequest, StoreUnavailable.
        """
        return self._transport.cancel_jobs(tenant, checked_selection(status, model, metadata))

    def pause(self, model: str) -> QueueChange:
        """Let nobody claim a model's jobs until `resume`: running jobs end, submits are taken, deadlines count.

        For operators: a gateway's key needs `role=operator`, else AccessRefused. Raises InvalidRequest (no model name),
        StoreUnavailable.
        """
        return self._transport.pause(checked_model(model))

    def resume(self, model: str) -> QueueChange:
        """Let a model's jobs be claimed again, in their order. Raises as `pause` does."""
        return self._transport.resume(checked_model(model))

    def purge(self, model: str) -> int:
        """End all queued jobs of a model, of all tenants, as cancelled; return how many. Raises as `pause` does."""
        return self._transport.purge(checked_model(model))

    def dead(self, limit: int = 100) -> tuple[JobView, ...]:
        """Return the jobs that were given up because their workers kept dying, newest first."""
        return self._transport.dead(limit)

    def drop(self, job_id: str) -> bool:
        """Take a job off the list of dead jobs; False: it is not on it."""
        return self._transport.drop(job_id)

    def upload(self, path: str | Path) -> str:
        """Store a local file in the media bucket and return its `s3://` URI.

        Raises OSError (no such file), StoreUnavailable, StorageRefused.
        """
        return self._transport.upload(path)

    def close(self) -> None:
        """Close all connections. Readers that are still active lose theirs."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, job: Job, job_id: str | None) -> JobHandle:
        job_id = checked_id(job_id)
        self._transport.submit(job_id, job)
        return self.job(job_id)


class AsyncClient:
    """`Client` for asyncio: the same methods, awaited. One event loop per instance."""

    def __init__(
        self, url: str | None = None, settings: ClientSettings | None = None, *, api_key: str | None = None
    ) -> None:
        self.settings = settings_of(url, settings, api_key)
        self._transport = OneLoop(async_transport_of(url, self.settings))

    async def caption(
        self, *media: str, prompt: str | None = None, job_id: str | None = None, **options: Unpack[JobOptions]
    ) -> AsyncJobHandle:
        """Describe images. Without `prompt` the checkpoint's own caption prompt is used. Raises as `submit` does."""
        return await self._submit(compose(TaskName.CAPTION, media, {"prompt": prompt}, options), job_id)

    async def vqa(
        self, *media: str, question: str | None = None, job_id: str | None = None, **options: Unpack[JobOptions]
    ) -> AsyncJobHandle:
        """Ask a question about images, or about none. Raises as `submit` does."""
        return await self._submit(compose(TaskName.VQA, media, {"question": question}, options), job_id)

    async def video_qa(
        self,
        *media: str,
        question: str | None = None,
        num_frames: int = DEFAULT_NUM_FRAMES,
        job_id: str | None = None,
        **options: Unpack[JobOptions],
    ) -> AsyncJobHandle:
        """Ask a question about clips, of which `num_frames` each are sampled. Raises as `submit` does."""
        words = {"question": question, "num_frames": num_frames}
        return await self._submit(compose(TaskName.VIDEO_QA, media, words, options), job_id)

    async def finetune(
        self,
        base: str,
        *,
        dataset: str,
        output: str,
        job_id: str | None = None,
        **settings: Unpack[FinetuneSettings],
    ) -> AsyncJobHandle:
        """Fine-tune a model. Raises as `Client.finetune` does."""
        return await self._submit(compose_finetune(base, dataset, output, settings), job_id)

    async def submit(self, job: Job | Mapping[str, object], job_id: str | None = None) -> AsyncJobHandle:
        """Hand in a job as a contract type or as its JSON fields with `task`. Raises as `Client.submit` does."""
        return await self._submit(checked(job), job_id)

    def job(self, job_id: str) -> AsyncJobHandle:
        """Return the handle of a job by its id, without asking whether there is one."""
        return AsyncJobHandle(job_id, self._transport)

    async def retry(self, job_id: str) -> AsyncJobHandle:
        """Queue a new job with the body of a finished one and return its handle. Raises as `Client.retry` does."""
        return self.job(await self._transport.retry(job_id))

    async def cancel_jobs(
        self,
        *,
        status: JobStatus | str | None = None,
        model: str | None = None,
        metadata: Mapping[str, object] | None = None,
        tenant: str = "",
    ) -> CancelledJobs:
        """Cancel all jobs that have a status, a model or metadata. Raises as `Client.cancel_jobs` does."""
        return await self._transport.cancel_jobs(tenant, checked_selection(status, model, metadata))

    async def pause(self, model: str) -> QueueChange:
        """Let nobody claim a model's jobs until `resume`: running jobs end, submits are taken, deadlines count.

        For operators: a gateway's key needs `role=operator`, else AccessRefused. Raises InvalidRequest (no model name),
        StoreUnavailable.
        """
        return await self._transport.pause(checked_model(model))

    async def resume(self, model: str) -> QueueChange:
        """Let a model's jobs be claimed again, in their order. Raises as `pause` does."""
        return await self._transport.resume(checked_model(model))

    async def purge(self, model: str) -> int:
        """End all queued jobs of a model, of all tenants, as cancelled; return how many. Raises as `pause` does."""
        return await self._transport.purge(checked_model(model))

    async def dead(self, limit: int = 100) -> tuple[JobView, ...]:
        """Return the jobs that were given up because their workers kept dying, newest first."""
        return await self._transport.dead(limit)

    async def drop(self, job_id: str) -> bool:
        """Take a job off the list of dead jobs; False: it is not on it."""
        return await self._transport.drop(job_id)

    async def upload(self, path: str | Path) -> str:
        """Store a local file in the media bucket and return its `s3://` URI.

        Raises OSError (no such file), StoreUnavailable, StorageRefused.
        """
        return await self._transport.upload(path)

    async def close(self) -> None:
        """Close all connections. Readers that are still active lose theirs."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _submit(self, job: Job, job_id: str | None) -> AsyncJobHandle:
        job_id = checked_id(job_id)
        await self._transport.submit(job_id, job)
        return self.job(job_id)
