"""What the gateway's own routes take and give, beside the contract's wire types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field
from starlette.responses import Response

from api_stub.contract.job import MAX_MEDIA, ModelName
from api_stub.contract.serving import Serving, read_all_serving
from api_stub.contract.view import JobView, Scalar
from api_stub.contract.wire import WholeNumber, WireModel
from api_stub.contract.wish import Wish

ContentType = Annotated[str, Field(pattern=r"^(image|video)/[A-Za-z0-9][A-Za-z0-9.+-]{0,63}$")]
MAX_FILES = MAX_MEDIA


class JobUrls(WireModel):
    """Where to go on with a job: paths on the host that was asked, to be resolved as a link is."""

    self_: str = Field(alias="self")
    events: str
    cancel: str
    retry: str

    @classmethod
    def of(cls, job_id: str, root_path: str) -> Self:
        """The addresses of a job, below the prefix that its client used."""
        path = job_path(job_id, root_path)
        return cls.model_validate(
            {"self": path, "events": f"{path}/events", "cancel": f"{path}/cancel", "retry": f"{path}/retry"}
        )


class JobReply(JobView):
    """A job as the ledger knows it, and where to go on."""

    urls: JobUrls

    @classmethod
    def of(cls, view: JobView, root_path: str) -> Self:
        """Add the addresses to a view."""
        return cls(**dict(view), urls=JobUrls.of(view.job_id, root_path))


class JobList(WireModel):
    """A page of jobs, newest first. Ask with `next_cursor` for the page after it; absent on the last page."""

    jobs: tuple[JobReply, ...]
    next_cursor: str | None = None


class CancelRequest(WireModel):
    """Which jobs to cancel: those that have all that is given, at least one of status, model and metadata.

    `metadata`: members that a job's metadata must have, equal as JSON; numbers below 2^53. `tenant`: whose; with a key
    always its own.
    """

    status: Literal["queued", "in_progress"] | None = None
    model: ModelName | None = None
    metadata: dict[str, Scalar] | None = None
    tenant: str = Field(default="", max_length=64)


class CancelReply(WireModel):
    """How many jobs were queued and are cancelled now, and how many run and were asked to stop."""

    cancelled: int
    cancelling: int


class QueueReply(WireModel):
    """A queue that was paused or resumed. `changed`: false when it was so before. `depth`: queued and running jobs."""

    model: str
    paused: bool
    changed: bool
    depth: int
    num_workers: int


class WorkerReply(Serving):
    """What one worker serves."""

    worker: str

    @classmethod
    def all_of(cls, told: Mapping[str, str]) -> tuple[Self, ...]:
        """Return what all workers of a model told, by their names."""
        return tuple(cls(worker=worker, **dict(each)) for worker, each in read_all_serving(told).items())


class ModelReply(WireModel):
    """What operators want a model's workers to serve, and what they do serve.

    number: of this wish; a worker that tells it fulfils it. source: as VISIONQ_MODEL would name it, absent: each
    worker's own. problem: why the last wish was given up.
    """

    model: str
    number: int
    source: str | None = None
    adapters: dict[str, str]
    problem: str | None = None
    workers: tuple[WorkerReply, ...]

    @classmethod
    def of(cls, model: str, wish: Wish, serving: Mapping[str, Serving]) -> Self:
        """Put wish and workers together."""
        workers = tuple(WorkerReply(worker=worker, **dict(each)) for worker, each in serving.items())
        return cls(
            model=model,
            number=wish.number,
            source=wish.weights.source or None,
            adapters=dict(wish.adapters),
            problem=wish.problem,
            workers=workers,
        )


class PurgeReply(WireModel):
    """How many queued jobs of a model were cancelled."""

    model: str
    cancelled: int


class UploadRequest(WireModel):
    """A file that is going to be uploaded: exactly so many bytes of exactly this type."""

    content_type: ContentType
    num_bytes: WholeNumber = Field(ge=1, strict=True)


class UploadReply(WireModel):
    """Leave to PUT one object: send exactly `headers` with the body to `url`, then use `uri` in a job."""

    uri: str
    url: str
    method: str = "PUT"
    headers: dict[str, str]
    expires_s: int


class StoredReply(WireModel):
    """An object that the gateway stored."""

    uri: str
    content_type: str


def answer(body: WireModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a body as a response, absent fields left out."""
    return Response(body.to_json(), status, headers, "application/json")


def job_path(job_id: str, root_path: str) -> str:
    """Return a job's address below a prefix. An id of our own needs no quoting, a plain Celery producer's may."""
    return f"{root_path}/v1/jobs/{job_id}"
