"""What a finished job leaves: the answer, why it ended, what it used and how long each stage took.

Fine-tuning leaves a checkpoint instead of an answer.

The Celery result backend holds a Result, or `celery_failure`, as the `result` member of the JSON under
`celery-task-meta-<job id>`; the layout around it is a public fact of Celery's Redis backend.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from api_stub.contract.error import ErrorInfo
from api_stub.contract.job_fields import TaskName
from api_stub.contract.wire import ReadModel


class FinishReason(StrEnum):
    """Why generation ended: the model's end token, the token limit, or one of the job's stop strings."""

    STOP = "stop"
    LENGTH = "length"
    STOP_SEQUENCE = "stop_sequence"


class Usage(ReadModel):
    """What the job cost the model. Images count stills only; frames are those sampled from clips.

    `media_tokens`: how many of the prompt's tokens stand for media; told for jobs with `media_options`.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    images: int = 0
    frames: int = 0
    media_tokens: int | None = None


class Timings(ReadModel):
    """Seconds per stage of the attempt that finished the job; `total_s` counts from submit."""

    queued_s: float = 0.0
    fetch_s: float = 0.0
    prepare_s: float = 0.0
    first_token_s: float = 0.0
    generate_s: float = 0.0
    total_s: float = 0.0


class Result(ReadModel):
    """What a completed job leaves: an answer, or, of fine-tuning, the fields of `FinetuneResult` and an empty text.

    `checkpoint`: digest of the weights that answered, of a base and its adapter joined by `+`; of fine-tuning, of those
    that it left.
    """

    job_id: str
    task: TaskName
    model: str
    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    attempt: int
    metadata: dict[str, Any] | None = None
    output_uri: str | None = None
    checkpoint: str | None = None
    metrics: dict[str, float] | None = None
    steps: int | None = None


#: Where a Celery consumer finds the class of a stored failure.
FAILURE_MODULE = "api_stub.errors"
FAILURE_CLASS = "JobFailed"


def celery_failure(error: ErrorInfo) -> dict[str, object]:
    """Return the `result` member of a failed job's Celery meta: Celery rebuilds JobFailed(*exc_message)."""
    return {
        "exc_type": FAILURE_CLASS,
        "exc_module": FAILURE_MODULE,
        "exc_message": [error.code.value, error.message, error.retryable],
    }
