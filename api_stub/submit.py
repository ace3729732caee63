"""Hand a job in: first its entry in the ledger, then its doorbell through Celery.

The entry is the job; the doorbell only saves the worker a look. When the entry is written and the doorbell fails, the
job is safe: a reaper rings for it. `compose` makes a checked job of a call's arguments.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, TypedDict

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from api_stub.connections import store_errors
from api_stub.contract import names
from api_stub.contract.conversation import Message
from api_stub.contract.job import Job, TaskName, Webhook, parse_job
from api_stub.contract.media_options import MediaOptions
from api_stub.contract.sampling import SamplingParams
from api_stub.contract.wire import WireModel
from api_stub.errors import InvalidRequest, QueueFull, UnknownJob
from api_stub.ledger import link
from api_stub.ledger.aio import AsyncLedger
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Bell, CannotRetry, JobConflict, LedgerFull, Submission

logger = logging.getLogger(__name__)

SOCKET_TIMEOUT_S: Final = 2.0
MAX_CONNECTIONS: Final = 10
_JOB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
#: What a broker that is away makes kombu raise; it passes some of redis-py's errors on unchanged.
_BROKER_ERRORS: Final = (OperationalError, redis.RedisError, OSError)


class JobOptions(TypedDict, total=False):
    """What every kind of job takes besides its media and its text. Sampling goes flat or as `sampling`."""

    messages: Sequence[Message | Mapping[str, object]] | None
    model: str | None
    sampling: SamplingParams | Mapping[str, object] | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    stop: Sequence[str] | None
    media_options: MediaOptions | Mapping[str, object] | None
    deadline_s: float | None
    priority: int | None
    tenant: str | None
    webhook: Webhook | Mapping[str, object] | None
    metadata: Mapping[str, object] | None


class Doorbells:
    """Rings through Celery: a message without arguments that tells a worker to look at a job. Safe between threads."""

    def __init__(self, redis_url: str) -> None:
        self._app = Celery("visionq-producer", broker=redis_url, set_as_current=False)
        self._app.conf.update(
            task_serializer="json",
            accept_content=["json"],
            task_ignore_result=True,
            broker_connection_timeout=SOCKET_TIMEOUT_S,
            broker_transport_options={**link.queue_options(SOCKET_TIMEOUT_S), "retry_on_timeout": False},
            broker_use_ssl=link.tls_options(redis_url),
            task_publish_retry_policy={"max_retries": 1, "interval_start": 0, "interval_max": 0.2},
        )
        # The URL is named here: CELERY_BROKER_URL, set for another Celery of this process, would beat the app's.
        self._pool = self._app.connection_for_write(redis_url).Pool(limit=MAX_CONNECTIONS)

    def ring(self, bell: Bell) -> None:
        """Send one doorbell. Raises kombu's and redis' errors when the broker is away, after at most about 5 s."""
        with self._pool.acquire(block=True, timeout=SOCKET_TIMEOUT_S) as connection:
            self._app.send_task(
                str(bell.task or TaskName.VQA),
                task_id=bell.job_id,
                queue=names.queue(bell.model),
                priority=bell.priority,
                headers={names.DOORBELL_HEADER: 1},
                ignore_result=True,
                add_to_parent=False,
                connection=connection,
            )

    def close(self) -> None:
        """Close the connections."""
        self._pool.force_close_all()
        self._app.close()


def submit(ledger: Ledger, doorbells: Doorbells, job_id: str, job: Job) -> None:
    """Hand a job in. The same id and body again is the same job.

    Raises InvalidRequest (the id belongs to another body), QueueFull, StoreUnavailable.
    """
    with submit_errors():
        submission = ledger.submit(job_id, job)
    if submission is not Submission.HELD:
        announce(doorbells, Bell(job_id, job.task, job.model, job.priority))


async def submit_async(ledger: AsyncLedger, doorbells: Doorbells, job_id: str, job: Job) -> None:
    """`submit` for asyncio. kombu publishes synchronously, so the doorbell is rung from another thread."""
    with submit_errors():
        submission = await ledger.submit(job_id, job)
    if submission is not Submission.HELD:
        await asyncio.to_thread(announce, doorbells, Bell(job_id, job.task, job.model, job.priority))


def announce(doorbells: Doorbells, bell: Bell) -> None:
    """Ring for a job that is in the ledger. An absent broker is logged: a reaper rings later. Blocks its thread."""
    try:
        doorbells.ring(bell)
    except _BROKER_ERRORS as error:
        facts = {"action": "ring", "job_id": bell.job_id, "model": bell.model, "error": type(error).__name__}
        logger.warning("doorbell failed, a reaper will ring", extra=facts)


@contextmanager
def submit_errors() -> Iterator[None]:
    """Translate what a ledger's `submit` and `retry` raise."""
    with store_errors():
        try:
            yield
        except JobConflict as error:
            raise InvalidRequest(str(error)) from error
        except CannotRetry as error:
            raise InvalidRequest(str(error)) from error
        except LedgerFull as error:
            raise QueueFull(str(error), error.retry_after_s) from error


def retried(job_id: str, new_id: str | None) -> str:
    """Return the new id that a ledger's `retry` answered with. Raises UnknownJob."""
    if new_id is None:
        raise UnknownJob(f"no job {job_id!r}: never submitted, not adopted yet, or its record has expired")
    return new_id


def compose(task: TaskName, media: Sequence[str], words: Mapping[str, object], options: JobOptions) -> Job:
    """Make a job of a call's arguments; None counts as absent. Raises InvalidRequest."""
    for uri in media:
        if "://" not in str(uri):
            raise InvalidRequest(f"media: {uri!s} is no s3:// URI; upload a local file first, with `upload`")
    fields = {name: value for name, value in options.items() if value is not None}
    flat = {name: fields.pop(name) for name in SamplingParams.model_fields if name in fields}
    if flat and "sampling" in fields:
        raise InvalidRequest(f"sampling: given as `sampling` and as {', '.join(sorted(flat))}")
    given = {name: value for name, value in words.items() if value is not None}
    return checked({"task": task.value, "sampling": flat, **({"media": media} if media else {}), **given, **fields})


def checked(job: Job | Mapping[str, object]) -> Job:
    """Return the job as a worker will read it. Raises InvalidRequest with the field, the limit and the value."""
    try:
        return parse_job(job.to_json() if isinstance(job, WireModel) else job)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


def checked_id(job_id: str | None) -> str:
    """Return the id, or a new one for None. Raises InvalidRequest."""
    if job_id is None:
        return str(uuid.uuid4())
    if not _JOB_ID.fullmatch(job_id):
        raise InvalidRequest(f"job_id: 1 to 128 letters, digits and . _ : - are allowed, got {job_id[:80]!r}")
    return job_id
