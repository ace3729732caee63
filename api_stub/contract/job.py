"""A job as producers submit it: caption, VQA or video QA about media in S3, or fine-tuning.

`parse_job` is the one way in for JSON from outside; it raises InvalidJob with the field, the limit and the value.
`PromptJob.turns()` gives all but fine-tuning one shape: a conversation of turns with text and media parts in order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from api_stub.contract.conversation import (
    MediaPart,
    Message,
    NumFrames,
    Role,
    TextPart,
    Turn,
    check_messages,
    has_part,
)
from api_stub.contract.error import InvalidJob, explain
from api_stub.contract.finetune import FinetuneJob as FinetuneJob
from api_stub.contract.job_fields import DEFAULT_PRIORITY as DEFAULT_PRIORITY
from api_stub.contract.job_fields import MAX_DEADLINE_S as MAX_DEADLINE_S
from api_stub.contract.job_fields import NO_JSON, DeadlineS, RequestedModel, Tenant, as_json, check_metadata
from api_stub.contract.job_fields import ModelName as ModelName
from api_stub.contract.job_fields import TaskName as TaskName
from api_stub.contract.job_fields import Webhook as Webhook
from api_stub.contract.media import MediaOptions, MediaUri
from api_stub.contract.names import DEFAULT_MODEL_NAME
from api_stub.contract.sampling import SamplingParams
from api_stub.contract.wire import WholeNumber, WireModel, check_depth

MAX_JOB_BYTES = 256 * 1024
MAX_MEDIA = 64
DEFAULT_NUM_FRAMES = 8

Text = Annotated[str, Field(min_length=1)]


class _PromptFields(WireModel):
    """What every kind of job with a prompt may carry. `deadline_s` counts from submit; priority 0 is served first.

    model: `NAME`, or `NAME:ADAPTER` for a LoRA adapter that the model's workers serve.
    """

    model: RequestedModel = DEFAULT_MODEL_NAME
    media: tuple[MediaUri, ...] = Field(default=(), max_length=MAX_MEDIA)
    messages: tuple[Message, ...] | None = None
    sampling: SamplingParams = SamplingParams()
    media_options: MediaOptions | None = None
    deadline_s: DeadlineS | None = None
    priority: WholeNumber = Field(default=DEFAULT_PRIORITY, ge=0, le=9)
    tenant: Tenant = ""
    webhook: Webhook | None = None
    metadata: dict[str, Any] | None = None

    @field_validator("media_options")
    @classmethod
    def _absent_when_empty(cls, options: MediaOptions | None) -> MediaOptions | None:
        return None if options is None or options.are_empty else options

    @model_validator(mode="after")
    def _bounded(self) -> _PromptFields:
        check_metadata(self.metadata)
        if self.messages is not None:
            if self.media:
                raise ValueError("media: not beside messages; put image and video parts into the messages")
            check_messages(self.messages, MAX_MEDIA)
        if (self.sampling.max_new_tokens or self.default_max_new_tokens) < (self.sampling.min_new_tokens or 0):
            raise ValueError("sampling.min_new_tokens: above max_new_tokens")
        return self

    @property
    def default_max_new_tokens(self) -> int:
        """Token limit of this kind of job when the producer names none."""
        return 256

    def _single_turn(self, text: str | None) -> tuple[Turn, ...]:
        media = tuple(MediaPart(uri=uri) for uri in self.media)
        words = (TextPart(text=text),) if text else ()
        return (Turn(role=Role.USER, content=media + words),)

    def _given_turns(self) -> tuple[Turn, ...]:
        return tuple(Turn(role=m.role, content=m.content) for m in self.messages or ())

    def resolved(self, job_id: str) -> PromptJob:
        """Return the job with `max_new_tokens` and `seed` filled in.

        The seed is drawn from the job id, so that submitting the same id and body twice is the same job.
        """
        drawn = int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:8], "big") >> 1
        sampling = self.sampling.model_copy(
            update={
                "max_new_tokens": self.sampling.max_new_tokens or self.default_max_new_tokens,
                "seed": drawn if self.sampling.seed is None else self.sampling.seed,
            }
        )
        return self.model_copy(update={"sampling": sampling})  # type: ignore[return-value]


class CaptionJob(_PromptFields):
    """Describe one or more images. Without `prompt` the checkpoint's own caption prompt is used."""

    task: Literal[TaskName.CAPTION] = TaskName.CAPTION
    prompt: Text | None = None

    @model_validator(mode="after")
    def _complete(self) -> CaptionJob:
        if self.messages is not None:
            raise ValueError("messages: not for captions; use vqa")
        if not self.media:
            raise ValueError("media: a caption needs at least 1 image, got 0")
        return self

    @property
    def default_max_new_tokens(self) -> int:
        return 64

    def turns(self, default_prompt: str) -> tuple[Turn, ...]:
        """Return the conversation; `default_prompt` stands in for an absent prompt."""
        return self._single_turn(self.prompt or default_prompt)


class VqaJob(_PromptFields):
    """Answer a question about any number of images (none: a text question)."""

    task: Literal[TaskName.VQA] = TaskName.VQA
    question: Text | None = None

    @model_validator(mode="after")
    def _complete(self) -> VqaJob:
        _check_question(self.question, self.messages)
        return self

    def turns(self, default_prompt: str) -> tuple[Turn, ...]:
        """Return the conversation (`default_prompt` is for captions only)."""
        return self._given_turns() if self.messages else self._single_turn(self.question)


class VideoQaJob(_PromptFields):
    """Answer a question about one or more clips, images too."""

    task: Literal[TaskName.VIDEO_QA] = TaskName.VIDEO_QA
    question: Text | None = None
    num_frames: NumFrames = DEFAULT_NUM_FRAMES

    @model_validator(mode="after")
    def _complete(self) -> VideoQaJob:
        _check_question(self.question, self.messages)
        if self.messages is None and not self.media:
            raise ValueError("media: a video question needs at least 1 video, got 0")
        if self.messages is not None and not has_part(self.messages, "video"):
            raise ValueError("messages: a video question needs at least 1 video, got 0")
        return self

    def turns(self, default_prompt: str) -> tuple[Turn, ...]:
        """Return the conversation (`default_prompt` is for captions only)."""
        return self._given_turns() if self.messages else self._single_turn(self.question)


#: A job that a model answers with text.
PromptJob = CaptionJob | VqaJob | VideoQaJob
Job = PromptJob | FinetuneJob
_TAGS = frozenset(task.value for task in TaskName)
_JOB: TypeAdapter[Job] = TypeAdapter(
    Annotated[Job, Field(discriminator="task")], config=ConfigDict(hide_input_in_errors=True)
)


def parse_job(fields: Mapping[str, object] | str | bytes, task: TaskName | None = None) -> Job:
    """Check a job that comes from outside, as JSON text or as decoded fields.

    `task` is the Celery task's name when the fields do not carry it. Raises InvalidJob.
    """
    raw = _raw(fields, task)
    if len(raw) > MAX_JOB_BYTES:
        raise InvalidJob(f"job: {len(raw)} bytes of JSON, the limit is {MAX_JOB_BYTES}")
    try:
        return _JOB.validate_json(raw, strict=True)
    except ValidationError as error:
        raise InvalidJob(explain(error, tags=_TAGS)) from error


def _raw(fields: Mapping[str, object] | str | bytes, task: TaskName | None) -> bytes:
    try:
        if isinstance(fields, bytes):
            return fields
        if isinstance(fields, str):
            return fields.encode()
        given = dict(fields) | ({"task": str(task)} if task is not None else {})
        raw = as_json(given)
    except NO_JSON as error:
        place = "job" if isinstance(fields, str | bytes) else _unwritable(fields)
        raise InvalidJob(f"{place}: cannot be written as JSON: {error}") from error
    try:
        for name, value in given.items():  # of what is JSON, so without cycles
            check_depth(str(name), value)
    except ValueError as error:
        raise InvalidJob(str(error)) from error
    return raw


def _unwritable(fields: Mapping[str, object]) -> str:
    """Return the path of the first field that JSON has no form for."""
    for name, value in fields.items():
        try:
            as_json(value)
        except RecursionError:
            return str(name)
        except NO_JSON:
            return f"{name}.{_unwritable(value)}" if isinstance(value, Mapping) and value is not fields else str(name)
    return "job"


def digest(job: Job) -> str:
    """Return a hash of the job's canonical JSON: the same body gives the same digest.

    A field that is absent is hashed as `earlier_json` has it: a job handed in again after an upgrade is the same.
    """
    named = () if isinstance(job, FinetuneJob) else job.sampling.named_neutral()
    return hashlib.sha256("".join((earlier_json(job), *named)).encode()).hexdigest()


def earlier_json(job: Job) -> str:
    """Return the job's JSON as release 0.1.0 wrote it, which knew no fine-tuning."""
    if isinstance(job, FinetuneJob):
        return job.to_json()
    return job.model_copy(update={"sampling": job.sampling.filled()}).to_json()


def _check_question(question: str | None, messages: tuple[Message, ...] | None) -> None:
    if messages is None and question is None:
        raise ValueError("question: required")
    if messages is not None and question is not None:
        raise ValueError("question: not beside messages")
