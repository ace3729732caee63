"""Hand a job in: its entry in the ledger and its doorbell, in one step. `compose` makes a checked job of arguments."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, TypedDict

from api_stub.connections import store_errors
from api_stub.contract.conversation import Message
from api_stub.contract.finetune import FinetuneMethod, FinetuneOptions, FinetuneRecipe
from api_stub.contract.job import Job, TaskName, Webhook, parse_job
from api_stub.contract.media import MediaOptions
from api_stub.contract.names import is_model_name
from api_stub.contract.sampling import SamplingParams
from api_stub.contract.view import JobSelection, parse_selection
from api_stub.contract.wire import WireModel
from api_stub.errors import InvalidRequest, QueueFull, UnknownJob
from api_stub.ledger.aio import AsyncLedger
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import CannotRetry, JobConflict, LedgerFull

_JOB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


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


def submit(ledger: Ledger, job_id: str, job: Job) -> None:
    """Hand a job in. The same id and body again is the same job.

    Raises InvalidRequest (the id belongs to another body), QueueFull, StoreUnavailable.
    """
    with submit_errors():
        ledger.submit(job_id, job)


async def submit_async(ledger: AsyncLedger, job_id: str, job: Job) -> None:
    """`submit` for asyncio."""
    with submit_errors():
        await ledger.submit(job_id, job)


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


class FinetuneSettings(TypedDict, total=False):
    """What fine-tuning takes besides base, data and output. Options go flat, as `FinetuneOptions` names them."""

    method: FinetuneMethod | str | None
    recipe: FinetuneRecipe | str | None
    epochs: float | None
    max_steps: int | None
    learning_rate: float | None
    batch_size: int | None
    gradient_accumulation: int | None
    gradient_checkpointing: bool | None
    freeze_vision: bool | None
    warmup_steps: int | None
    weight_decay: float | None
    max_grad_norm: float | None
    eval_every: int | None
    eval_examples: int | None
    max_new_tokens: int | None
    save_total_limit: int | None
    seed: int | None
    loader_workers: int | None
    lora_rank: int | None
    lora_alpha: float | None
    lora_dropout: float | None
    resume: bool | str | None
    deadline_s: float | None
    priority: int | None
    tenant: str | None
    webhook: Webhook | Mapping[str, object] | None
    metadata: Mapping[str, object] | None


def compose_finetune(base: str, dataset: str, output: str, given: FinetuneSettings) -> Job:
    """Make a fine-tuning job of a call's arguments; None counts as absent. Raises InvalidRequest."""
    fields = {name: value for name, value in given.items() if value is not None}
    options = {name: fields.pop(name) for name in FinetuneOptions.model_fields if name in fields}
    places = {"base": base, "dataset": dataset, "output": output}
    return checked({"task": TaskName.FINETUNE.value, **places, "options": options, **fields})


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


def checked_model(name: str) -> str:
    """Return the model name. Raises InvalidRequest."""
    if not is_model_name(name):
        raise InvalidRequest(f"model: not a model name: {name[:80]!r}")
    return name


def checked_selection(status: str | None, model: str | None, metadata: Mapping[str, object] | None) -> JobSelection:
    """Return which jobs are meant. Raises InvalidRequest."""
    given = {"status": status, "model": model, "metadata": dict(metadata) if metadata else None}
    try:
        return parse_selection({name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
