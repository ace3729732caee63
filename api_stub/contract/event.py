"""The events of a job's stream, one JSON object each.

A body says what happened; the ledger stamps it with `v, job_id, seq, attempt, ts` in the step that
writes it, so `seq` has no gaps and grows by one per job. An event is an envelope and a body in one flat object.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final, Literal

from pydantic import Field, TypeAdapter

from api_stub.contract.error import ErrorInfo
from api_stub.contract.result import Result, Usage
from api_stub.contract.wire import ReadModel

VERSION: Final = 1
#: Of fine-tuning every checkpoint leaves so many of the newest `job.progress` in the stream, and every other event.
MAX_TRAINING_EVENTS: Final = 2000


class Stage(StrEnum):
    """What a running job is doing."""

    FETCHING = "fetching"
    PREPARING = "preparing"
    PREFILL = "prefill"
    TRAINING = "training"


class RetryReason(StrEnum):
    """Why a job went back to the queue."""

    LOST = "lost"
    GIVEN_BACK = "given_back"
    STORAGE = "storage"
    PREEMPTED = "preempted"
    OUT_OF_MEMORY = "out_of_memory"


class QueuedBody(ReadModel):
    """The job is in the ledger."""

    type: Literal["job.queued"] = "job.queued"
    model: str
    priority: int


class StartedBody(ReadModel):
    """A worker claimed the job; a new attempt begins.

    checkpoint: digest of the weights that will answer, of a base and an adapter joined by `+`. adapter: the one that
    the job asks for.
    """

    type: Literal["job.started"] = "job.started"
    worker: str
    model: str
    checkpoint: str | None = None
    adapter: str | None = None


class ProgressBody(ReadModel):
    """How far a stage is; `total` is 0 when it is not known.

    Of training, `done` and `total` are steps, and `metrics` are its newest figures by name: `loss`, `learning_rate`,
    `examples_per_s`, `eta_s` (seconds left), and the scores of the last evaluation.
    """

    type: Literal["job.progress"] = "job.progress"
    stage: Stage
    done: int
    total: int
    metrics: dict[str, float] | None = None


class DeltaBody(ReadModel):
    """New text. `offset`: Unicode code points of this attempt's text before it. `num_tokens`: tokens it stands for."""

    type: Literal["output.delta"] = "output.delta"
    text: str
    offset: int
    num_tokens: int


class RetryingBody(ReadModel):
    """The attempt ended without a result and the job is queued again; readers drop the attempt's text."""

    type: Literal["job.retrying"] = "job.retrying"
    reason: RetryReason


class CompletedBody(ReadModel):
    """The answer. The last event."""

    type: Literal["job.completed"] = "job.completed"
    result: Result


class _UnansweredBody(ReadModel):
    error: ErrorInfo
    partial_text: str = ""
    usage: Usage = Usage()


class FailedBody(_UnansweredBody):
    """The job has no answer and will not get one. The last event."""

    type: Literal["job.failed"] = "job.failed"


class CancelledBody(_UnansweredBody):
    """The job was cancelled. The last event."""

    type: Literal["job.cancelled"] = "job.cancelled"


class ExpiredBody(_UnansweredBody):
    """The deadline passed in the queue. The last event."""

    type: Literal["job.expired"] = "job.expired"


class GapBody(ReadModel):
    """Made by a gateway for a reader too slow to be whole: events `from` … `to` are missing."""

    type: Literal["stream.gap"] = "stream.gap"
    from_: int = Field(alias="from")
    to: int


class _Envelope(ReadModel):
    v: Literal[1] = VERSION
    job_id: str
    seq: int = Field(ge=1)
    attempt: int = Field(ge=0)
    ts: float


class JobQueued(QueuedBody, _Envelope):
    """`job.queued` as it is read."""


class JobStarted(StartedBody, _Envelope):
    """`job.started` as it is read."""


class JobProgress(ProgressBody, _Envelope):
    """`job.progress` as it is read."""


class OutputDelta(DeltaBody, _Envelope):
    """`output.delta` as it is read."""


class JobRetrying(RetryingBody, _Envelope):
    """`job.retrying` as it is read."""


class JobCompleted(CompletedBody, _Envelope):
    """`job.completed` as it is read."""


class JobFailedEvent(FailedBody, _Envelope):
    """`job.failed` as it is read."""


class JobCancelled(CancelledBody, _Envelope):
    """`job.cancelled` as it is read."""


class JobExpired(ExpiredBody, _Envelope):
    """`job.expired` as it is read."""


class StreamGap(GapBody, _Envelope):
    """`stream.gap` as it is read."""


#: What a worker may publish while it owns an attempt. The ledger itself writes all other events.
RunningBody = ProgressBody | DeltaBody
FinalBody = CompletedBody | FailedBody | CancelledBody | ExpiredBody
FinalEvent = JobCompleted | JobFailedEvent | JobCancelled | JobExpired
Event = JobQueued | JobStarted | JobProgress | OutputDelta | JobRetrying | FinalEvent | StreamGap
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="type")])


def parse_event(raw: str | bytes) -> Event:
    """Read one event. Raises pydantic.ValidationError (a ValueError) when it is none."""
    return _EVENT.validate_json(raw)


def body_fragment(body: RunningBody | FinalBody) -> str:
    """Return the body's JSON without its braces, for the script that puts the envelope in front of it."""
    return body.to_json()[1:-1]
