"""Jobs over HTTP: hand in, look, list, wait, cancel, retry, delete, and a job's events as server-sent events."""

from __future__ import annotations

import re
import time
from contextlib import closing
from http import HTTPStatus
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Path, Query, Request, Response
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from api_stub.contract.error import InvalidJob
from api_stub.contract.job import ModelName
from api_stub.contract.status import JobStatus
from api_stub.contract.view import JobView, parse_selection
from api_stub.errors import InvalidRequest, UnknownJob
from api_stub.gateway.access import CallerHere, GatewayHere, RootPathHere
from api_stub.gateway.api_examples import problem_example
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.intake import accept, read_job, retry
from api_stub.gateway.keys import Caller
from api_stub.gateway.problems import MEDIA_TYPE as PROBLEM_TYPE
from api_stub.gateway.problems import Problem, invalid
from api_stub.gateway.schemas import CancelReply, CancelRequest, JobList, JobReply, answer, job_path
from api_stub.gateway.sse import EventStream, leaving
from api_stub.ledger.rows import Cancelled, Deleted

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

JobId = Annotated[str, Path(min_length=1, max_length=255, description="Id of the job.")]
_OWN_ID: Final = re.compile(
    r"^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-46-9a-fA-F][0-9a-fA-F]{3}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$"
)

_PROBLEM: Final = {"schema": {"$ref": "#/components/schemas/Problem"}}
_BODY_PROBLEMS: Final = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    HTTPStatus.BAD_GATEWAY,
)
#: The request of a route is read by hand, so its body must be told to the document.
_JOB_SCHEMA: Final = {"application/json": {"schema": {"$ref": "#/components/schemas/Job"}}}
_WAIT: Final = re.compile(r"wait\s*=\s*\"?(\d{1,6})\"?")
#: Redis counts the entries of a stream in 64 bits.
_SEQ_DIGITS: Final = 18


def _checked_own(job_id: str) -> str:
    if not _OWN_ID.fullmatch(job_id):
        # Whoever guesses another's Idempotency-Key could take its job's id otherwise.
        message = "a UUID of a version other than 5 is required; those of version 5 belong to Idempotency-Key"
        raise PydanticCustomError("job_id", message)
    return job_id


OwnJobId = Annotated[
    str,
    AfterValidator(_checked_own),
    Path(
        description="Id of the new job: a UUID, of a version other than 5.",
        json_schema_extra={"format": "uuid", "pattern": _OWN_ID.pattern},
    ),
]
WaitFor = Annotated[float, Query(ge=0, description="Seconds to wait for the job's end; more than 50 are 50.")]
SUBMITS_A_JOB: Final[dict[str, Any]] = {
    "responses": {
        int(status): {
            "description": status.phrase,
            "content": {PROBLEM_TYPE: _PROBLEM | {"example": problem_example(status)}},
        }
        for status in _BODY_PROBLEMS
    },
    "openapi_extra": {"requestBody": {"required": True, "content": _JOB_SCHEMA}},
}


@router.post("", status_code=HTTPStatus.ACCEPTED, response_model=JobReply)
async def submit_job(
    request: Request,
    gateway: GatewayHere,
    caller: CallerHere,
    root_path: RootPathHere,
    idempotency_key: Annotated[
        str | None, Header(alias="Idempotency-Key", description="The same key and job again is the same job.")
    ] = None,
    prefer: Annotated[
        str | None, Header(description="`wait=N`: answer when the job is done, if that takes ≤ N s.")
    ] = None,
) -> Response:
    """Hand in a job: JSON, or a form with the job's JSON as `job` and files as `media`. Media may be data URLs."""
    try:
        job_id = await accept(gateway, caller, await read_job(request), idempotency_key)
    finally:
        await request.close()  # a form's files
    wait_s = _preferred_wait_s(prefer, gateway)
    headers = {"Location": job_path(job_id, root_path)}
    if wait_s is not None:
        headers["Preference-Applied"] = f"wait={wait_s:g}"
        await wait_for_end(request, gateway, job_id, wait_s)
    view = await visible(gateway, caller, job_id)
    is_done = wait_s is not None and view.status.is_final
    return answer(JobReply.of(view, root_path), HTTPStatus.OK if is_done else HTTPStatus.ACCEPTED, headers)


@router.put("/{job_id}", status_code=HTTPStatus.ACCEPTED, response_model=JobReply, **SUBMITS_A_JOB)
async def submit_named_job(
    request: Request, gateway: GatewayHere, caller: CallerHere, root_path: RootPathHere, job_id: OwnJobId
) -> Response:
    """Hand in a job under an id of the client's own making. The same id and job again is the same job."""
    try:
        job_id = await accept(gateway, caller, await read_job(request), job_id=job_id)
    finally:
        await request.close()
    view = await visible(gateway, caller, job_id)
    return answer(JobReply.of(view, root_path), HTTPStatus.ACCEPTED, {"Location": job_path(job_id, root_path)})


@router.get("", response_model=JobList)
async def list_jobs(
    gateway: GatewayHere,
    caller: CallerHere,
    root_path: RootPathHere,
    status: JobStatus | None = None,
    model: ModelName | None = None,
    cursor: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    tenant: Annotated[str, Query(max_length=64, description="Whose jobs; with a key always its own.")] = "",
) -> Response:
    """List the caller's jobs, newest first. A page may hold fewer than `limit` and still have a next one."""
    try:
        page = await gateway.ledger.list_jobs(_tenant(caller, tenant), status, model, cursor, limit)
    except ValueError as error:
        raise invalid("cursor", "not one that a page of jobs gave") from error
    return answer(JobList(jobs=tuple(JobReply.of(view, root_path) for view in page.jobs), next_cursor=page.next_cursor))


@router.get("/{job_id}", response_model=JobReply)
async def show_job(
    request: Request,
    gateway: GatewayHere,
    caller: CallerHere,
    root_path: RootPathHere,
    job_id: JobId,
    wait: WaitFor = 0,
) -> Response:
    """Tell where a job is: status, place in the queue, workers, and the result or the error once it is final."""
    view = await visible(gateway, caller, job_id)
    if wait > 0 and not view.status.is_final:
        await wait_for_end(request, gateway, job_id, min(wait, gateway.settings.api_max_wait_s))
        view = await visible(gateway, caller, job_id)
    return answer(JobReply.of(view, root_path))


@router.delete("/{job_id}", status_code=HTTPStatus.NO_CONTENT)
async def delete_job(gateway: GatewayHere, caller: CallerHere, job_id: JobId) -> None:
    """Remove a final job, its events and its result; what was uploaded stays. 409 for one that has not ended."""
    await visible(gateway, caller, job_id)
    deleted = await gateway.ledger.delete(job_id)
    if deleted is Deleted.UNFINISHED:
        raise Problem(HTTPStatus.CONFLICT, "unfinished", f"job {job_id!r} has not ended; cancel it first")
    if deleted is Deleted.LINKED:
        raise Problem(HTTPStatus.CONFLICT, "unfinished", f"job {job_id!r}: its links are not sent yet; delete it then")
    await gateway.limits.release(caller, job_id)


@router.post("/cancel", response_model=CancelReply)
async def cancel_jobs(gateway: GatewayHere, caller: CallerHere, wanted: CancelRequest) -> Response:
    """Cancel all of the caller's jobs that have a status, a model or certain metadata; may be repeated.

    Looks at the jobs that `GET /v1/jobs` lists. Jobs that are handed in meanwhile stay.
    """
    try:
        selection = parse_selection(wanted.model_dump(exclude={"tenant"}, exclude_none=True))
    except InvalidJob as error:
        raise InvalidRequest(str(error)) from error
    done = await gateway.ledger.cancel_jobs(_tenant(caller, wanted.tenant), selection)
    return answer(CancelReply(cancelled=done.num_cancelled, cancelling=done.num_cancelling))


@router.post("/{job_id}/cancel", response_model=JobReply)
async def cancel_job(gateway: GatewayHere, caller: CallerHere, root_path: RootPathHere, job_id: JobId) -> Response:
    """Ask for a job's end; may be repeated. 202 while a worker still has to stop, else 200."""
    await visible(gateway, caller, job_id)
    is_stopping = await gateway.ledger.cancel(job_id) is Cancelled.CANCELLING
    view = await visible(gateway, caller, job_id)
    return answer(JobReply.of(view, root_path), HTTPStatus.ACCEPTED if is_stopping else HTTPStatus.OK)


@router.post("/{job_id}/retry", status_code=HTTPStatus.ACCEPTED, response_model=JobReply)
async def retry_job(gateway: GatewayHere, caller: CallerHere, root_path: RootPathHere, job_id: JobId) -> Response:
    """Queue a new job with the body of a finished one. Asked twice, the same new job."""
    await visible(gateway, caller, job_id)
    new_id = await retry(gateway, caller, job_id)
    return answer(
        JobReply.of(await visible(gateway, caller, new_id), root_path),
        HTTPStatus.ACCEPTED,
        {"Location": job_path(new_id, root_path)},
    )


def _tenant(caller: Caller, asked: str) -> str:
    return asked if caller.is_anonymous else caller.tenant


async def visible(gateway: Gateway, caller: Caller, job_id: str) -> JobView:
    """Return a job that the caller may see. Raises UnknownJob for all others, whether they exist or not."""
    view = await gateway.ledger.view(job_id)
    if view is None or not caller.sees(view.tenant):
        raise UnknownJob(f"no job {job_id!r}: never submitted, not adopted yet, or its record has expired")
    return view


async def wait_for_end(request: Request, gateway: Gateway, job_id: str, wait_s: float) -> None:
    """Wait at most `wait_s` seconds for a job's end; less when the client or the gateway leaves. Raises UnknownJob."""
    until = time.monotonic() + wait_s
    with closing(await gateway.readers.open(job_id, only_final=True)) as reader:
        async with leaving(request.receive, reader):
            while not reader.is_finished and (left_s := until - time.monotonic()) > 0:
                await reader.frames(min(left_s, gateway.settings.api_heartbeat_s))


def _preferred_wait_s(prefer: str | None, gateway: Gateway) -> float | None:
    """Read RFC 7240's `wait`; None when the client wants no waiting."""
    for preference in re.split(r"[,;]", prefer or ""):
        if (match := _WAIT.fullmatch(preference.strip())) is not None:
            return min(float(match.group(1)), gateway.settings.api_max_wait_s)
    return None


events_router = APIRouter(prefix="/v1/jobs", tags=["events"])


@events_router.get("/{job_id}/events", response_class=Response)
async def follow_job(
    gateway: GatewayHere,
    caller: CallerHere,
    job_id: JobId,
    after: Annotated[int, Query(ge=0, lt=10**_SEQ_DIGITS, description="Leave out the events up to this seq.")] = 0,
    last_event_id: Annotated[str | None, Header(description="As `after`, and stronger: a browser sends it.")] = None,
) -> Response:
    """Follow a job from its beginning or from a seq on, up to its final event; also a job that has ended.

    204 when there is nothing after the seq and never will be, which tells a browser not to come back.
    """
    await visible(gateway, caller, job_id)
    reader = await gateway.readers.open(job_id, _start(after, last_event_id))
    try:
        first = await reader.begin()
    except BaseException:
        reader.close()
        raise
    if reader.has_ending and not first:
        reader.close()
        return Response(status_code=HTTPStatus.NO_CONTENT)
    return EventStream(reader, first, gateway.settings.api_heartbeat_s)


def _start(after: int, last_event_id: str | None) -> int:
    if last_event_id is None or not last_event_id.strip():
        return after
    if not last_event_id.strip().isdecimal() or len(last_event_id) > _SEQ_DIGITS:
        raise invalid("Last-Event-ID", "a seq is required")
    return int(last_event_id)
