"""What every kind of job shares: its task, the name that routes it, its webhook, and the limits of common fields."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field, HttpUrl, field_serializer

from api_stub.contract.names import (
    MODEL_NAME_PATTERN,
    REQUESTED_MODEL_PATTERN,
    TRAINING_MODEL_NAME,
    queue_model,
)
from api_stub.contract.wire import WireModel, check_depth

MAX_METADATA_BYTES = 4 * 1024
DEFAULT_PRIORITY = 6
MAX_DEADLINE_S = 7 * 86_400.0
#: What json raises for values that JSON has no form for: NaN, half a surrogate pair, a set, a cycle.
NO_JSON: Final = (ValueError, TypeError, RecursionError)


def _not_reserved(name: str) -> str:
    if queue_model(name) == TRAINING_MODEL_NAME:
        raise ValueError(f"{name!r} is the queue of fine-tuning; no model can have this name")
    return name


#: The name of a queue: a model's, or `training`.
ModelName = Annotated[str, Field(pattern=MODEL_NAME_PATTERN)]
#: The name under which a model is served.
ServedName = Annotated[ModelName, AfterValidator(_not_reserved)]
#: What a job asks for: a served name, or `NAME:ADAPTER`.
RequestedModel = Annotated[str, Field(pattern=REQUESTED_MODEL_PATTERN), AfterValidator(_not_reserved)]
DeadlineS = Annotated[float, Field(gt=0, le=MAX_DEADLINE_S)]
Tenant = Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9._-]*$")]


class TaskName(StrEnum):
    """The Celery tasks that producers may send. `str(task)` is the Celery task name."""

    CAPTION = "visionq.caption"
    VQA = "visionq.vqa"
    VIDEO_QA = "visionq.video_qa"
    FINETUNE = "visionq.finetune"


class WebhookEvent(StrEnum):
    """The events that a webhook may ask for: those of a job's life. Text and progress are for streams."""

    QUEUED = "job.queued"
    STARTED = "job.started"
    RETRYING = "job.retrying"
    COMPLETED = "job.completed"
    FAILED = "job.failed"
    CANCELLED = "job.cancelled"
    EXPIRED = "job.expired"


_FINAL_EVENTS = (WebhookEvent.COMPLETED, WebhookEvent.FAILED, WebhookEvent.CANCELLED, WebhookEvent.EXPIRED)


class Webhook(WireModel):
    """Where to announce the job's final event (and others that are asked for)."""

    url: HttpUrl
    events: tuple[WebhookEvent, ...] = Field(default=_FINAL_EVENTS, min_length=1, max_length=len(WebhookEvent))

    @field_serializer("url")
    def _plain(self, url: HttpUrl) -> str:
        return str(url)


def check_metadata(metadata: dict[str, Any] | None) -> None:
    """Raise ValueError for metadata that JSON has no form for, that are too large or nested too deep."""
    if metadata is None:
        return
    try:
        num_bytes = len(as_json(metadata))
    except NO_JSON as error:
        raise ValueError(f"metadata: cannot be written as JSON: {error}") from error
    if num_bytes > MAX_METADATA_BYTES:
        raise ValueError(f"metadata: {num_bytes} bytes of JSON, the limit is {MAX_METADATA_BYTES}")
    check_depth("metadata", metadata)


def as_json(value: object) -> bytes:
    """Return compact JSON of decoded fields; wire types and any mappings and sequences are taken. Raises `NO_JSON`."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=_plain)
    return text.encode()


def _plain(value: object) -> object:
    if isinstance(value, WireModel):
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list(value)
    raise TypeError(f"no JSON form for a {type(value).__name__}")
