"""What the routes of OpenAI's API answer. Absent values are null, as its clients expect."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from api_stub.contract.result import FinishReason, Result

ENDPOINT = "/v1/chat/completions"
BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
Finish = Literal["stop", "length"]


class _Shape(BaseModel):
    model_config = ConfigDict(frozen=True)


def _is_absent(value: object) -> bool:
    return value is None


class ChatUsage(_Shape):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, result: Result) -> ChatUsage:
        """Count what a result used."""
        usage = result.usage
        total = usage.prompt_tokens + usage.completion_tokens
        return cls(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens, total_tokens=total)


class ChatAnswer(_Shape):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(_Shape):
    """The one answer."""

    index: int = 0
    message: ChatAnswer
    logprobs: None = None
    finish_reason: Finish


class ChatCompletion(_Shape):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage

    @classmethod
    def of(cls, result: Result, created: float) -> ChatCompletion:
        """Make the answer of a job's result."""
        choice = ChatChoice(message=ChatAnswer(content=result.text), finish_reason=finish_of(result))
        return cls(
            id=completion_id(result.job_id),
            created=int(created),
            model=result.model,
            choices=[choice],
            usage=ChatUsage.of(result),
        )


class ChatDelta(_Shape):
    """New text."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=_is_absent)
    content: str | None = Field(default=None, exclude_if=_is_absent)


class ChunkChoice(_Shape):
    """The piece of the one answer."""

    index: int = 0
    delta: ChatDelta
    logprobs: None = None
    finish_reason: Finish | None = None


class ChatChunk(_Shape):
    """A piece of an answer. The one with `usage` has no choices."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: ChatUsage | None = None


class ModelObject(_Shape):
    """A model that may be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "visionq"


class ModelList(_Shape):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class FileObject(_Shape):
    """A file: the input of a batch, or what came of it."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"


class FileList(_Shape):
    """Files, newest first."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(_Shape):
    """A file that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class BatchError(_Shape):
    """Why a batch as a whole was refused."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(_Shape):
    """All reasons."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class BatchCounts(_Shape):
    """Lines: all, answered, and those in the error file."""

    total: int
    completed: int
    failed: int


class BatchObject(_Shape):
    """A batch. Times are seconds since 1970. One that `failed` has no files, and its jobs under way are cancelled."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    input_file_id: str
    completion_window: str
    status: BatchStatus
    errors: BatchErrors | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: BatchCounts
    metadata: dict[str, str] | None = None


class BatchList(_Shape):
    """Batches, newest first."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def completion_id(job_id: str) -> str:
    """Return what a job's answer is called."""
    return f"chatcmpl-{job_id}"


def finish_of(result: Result) -> Finish:
    """Return why an answer ended, in OpenAI's words."""
    return "length" if result.finish_reason is FinishReason.LENGTH else "stop"
