"""From a request's body to a job in the ledger: read a draft, make the job of it, fetch, store, submit.

Nothing is fetched or stored for a request that is refused: media have names before they are sent.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final, NoReturn

from anyio import to_thread
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Receive

from api_stub.contract import names
from api_stub.contract.error import InvalidJob
from api_stub.contract.job import Job, parse_job
from api_stub.errors import InvalidRequest, UnknownJob, VisionqError
from api_stub.gateway.access import check_allowed, check_known, media_of
from api_stub.gateway.drafts import Attached, Draft, JsonDraft, Remote, Unstored
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.keys import Caller
from api_stub.gateway.problems import FieldError, Problem, invalid
from api_stub.gateway.resolve import Destination, NewObject, fetched, read_local, with_uris
from api_stub.gateway.schemas import MAX_FILES, StoredReply
from api_stub.gateway.uploads import check_uploads
from api_stub.submit import checked_id, submit_errors

FORM_JOB: Final = "job"
FORM_MEDIA: Final = "media"
_MAX_JOB_FIELD: Final = 1024 * 1024
#: JSON above this size is parsed in a thread, so that it stops nobody else.
_LARGE: Final = 64 * 1024
_IDEMPOTENCY_KEY: Final = re.compile(r"[\x20-\x7e]{1,255}")
_NAMESPACE: Final = uuid.UUID("6d1f5a0e-5a0b-4a52-9f0f-3f6f0b7c9d11")


async def read_job(request: Request) -> JsonDraft:
    """Read a job from JSON or from a form with the field `job` and files `media`. Raises Problem."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "application/json":
        return JsonDraft(await read_json(request))
    if content_type == "multipart/form-data":
        return await _of_form(request)
    detail = "send application/json, or multipart/form-data with a field `job` and files `media`"
    raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", detail)


async def read_json(request: Request) -> Mapping[str, object]:
    """Read a body that is a JSON object. Raises Problem."""
    return await _parsed(await request.body())


async def accept(
    gateway: Gateway,
    caller: Caller,
    draft: Draft,
    idempotency_key: str | None = None,
    job_id: str | None = None,
    receive: Receive | None = None,
) -> str:
    """Hand a job in for a caller and return its id.

    With an idempotency key the id follows from it, so that the ledger itself tells a repetition from a conflict.
    `receive` is the request's, whose body has been read: a client that leaves ends the fetch of http(s) media.
    Raises Problem, InvalidRequest, QueueFull, StoreUnavailable, StorageRefused.
    """
    tenant = _tenant_of(draft, caller)
    where = Destination(gateway.settings.media_bucket, str(draft.tenant) if tenant is None else tenant)
    sources = draft.sources
    local = await to_thread.run_sync(read_local, sources, where)
    remote = [source for source in sources if isinstance(source, Remote)]
    placeholders: dict[Unstored, str] = {source: where.placeholder(number) for number, source in enumerate(remote)}
    job = draft.job({source: new.uri for source, new in local.items()} | placeholders, tenant)
    check_allowed(caller, job, gateway.settings.training_root)
    await check_known(gateway, job.model)
    gateway.webhook_rules.check(job, gateway.keys)
    await check_uploads(gateway, caller, media_of(job))
    job_id = checked_id(job_id) if idempotency_key is None else keyed_id(idempotency_key, job.tenant)
    async with fetched(gateway, remote, where, receive) as found:
        uris = {placeholders[source]: new.uri for source, new in zip(remote, found, strict=True)}
        await _submit(gateway, caller, job_id, with_uris(job, uris), [*local.values(), *found], idempotency_key)
    return job_id


async def _submit(
    gateway: Gateway, caller: Caller, job_id: str, job: Job, media: Sequence[NewObject], idempotency_key: str | None
) -> None:
    """Store a job's media and hand it in, counted among the caller's unfinished jobs."""
    await gateway.limits.reserve(caller, job_id)
    try:
        await _store(gateway, media)
        await gateway.submit(job_id, job)
    except InvalidRequest as error:
        if idempotency_key is not None:
            _refuse_other_body(error)
        raise
    except VisionqError:
        await gateway.limits.release(caller, job_id)
        raise


async def store_file(gateway: Gateway, caller: Caller, file: UploadFile) -> StoredReply:
    """Store a form's file for a caller. Raises Problem (no image or clip, too large), StorageRefused."""
    where = Destination(gateway.settings.media_bucket, caller.tenant)
    (media,) = (await to_thread.run_sync(read_local, [Attached("media.0", file)], where)).values()
    await _store(gateway, [media])
    return StoredReply(uri=media.uri, content_type=media.content_type)


async def retry(gateway: Gateway, caller: Caller, job_id: str) -> str:
    """Queue a new job with the body of a finished one and return its id. Raises Problem, UnknownJob, QueueFull."""
    await _check_again(gateway, caller, job_id)
    place = f"retry:{job_id}"  # the ledger draws the new id
    await gateway.limits.reserve(caller, place)
    try:
        with submit_errors():
            new_id = await gateway.ledger.retry(job_id)
    except InvalidRequest as error:  # the job is not finished, or had no valid body
        await gateway.limits.release(caller, place)
        raise Problem(HTTPStatus.CONFLICT, "cannot_retry", str(error)) from error
    except VisionqError:
        await gateway.limits.release(caller, place)
        raise
    if new_id is None:
        await gateway.limits.release(caller, place)
        raise UnknownJob(f"no job {job_id!r}: its record has expired")
    await gateway.limits.rename(caller, place, new_id)
    return new_id


async def _check_again(gateway: Gateway, caller: Caller, job_id: str) -> None:
    """Raise Problem for a job that its own tenant may not hand in now: 403 by its key's lists, 404 by its model."""
    body: Any = await gateway.commands.hget(names.job_key(job_id), "body")
    if body is None:
        return
    try:
        job = parse_job(body)
    except InvalidJob:
        return  # it came from elsewhere, and the worker says what is wrong with it
    check_allowed(caller, job, gateway.settings.training_root)
    await check_known(gateway, job.model)


async def _parsed(body: bytes) -> Mapping[str, object]:
    try:
        parsed = _loaded(body) if len(body) <= _LARGE else await to_thread.run_sync(_loaded, body)
    except (ValueError, RecursionError) as error:
        raise Problem(HTTPStatus.BAD_REQUEST, "invalid_request", "the body is not JSON") from error
    if not isinstance(parsed, dict):
        raise invalid("body", "an object is required")
    return parsed


def _loaded(body: bytes) -> Any:
    return json.loads(body, parse_constant=_no_constant)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


async def _of_form(request: Request) -> JsonDraft:
    try:
        form = await request.form(max_files=MAX_FILES, max_fields=8, max_part_size=_MAX_JOB_FIELD)
    except MultiPartException as error:
        raise Problem(HTTPStatus.BAD_REQUEST, "invalid_request", f"the form cannot be read: {error.message}") from error
    except UnicodeError as error:
        raise Problem(HTTPStatus.BAD_REQUEST, "invalid_request", "the form's text cannot be decoded") from error
    unknown = sorted(set(form) - {FORM_JOB, FORM_MEDIA})
    if unknown:
        raise invalid(unknown[0], "not a field of this form")
    jobs, files = form.getlist(FORM_JOB), form.getlist(FORM_MEDIA)
    if len(jobs) != 1 or not isinstance(jobs[0], str):
        raise invalid(FORM_JOB, "one field with the job's JSON is required")
    media = [file for file in files if isinstance(file, UploadFile)]
    if len(media) != len(files):
        raise invalid(FORM_MEDIA, "a file is required")
    return JsonDraft(await _parsed(jobs[0].encode(errors="surrogatepass")), media)


def _tenant_of(draft: Draft, caller: Caller) -> str | None:
    """Return the tenant that a key puts on a job, None without keys. Raises Problem (403): it bears another's."""
    if caller.is_anonymous:
        return None
    if draft.tenant not in ("", caller.tenant):
        message = "a key submits for its own tenant only; leave it out"
        errors = [FieldError(field="tenant", message=message)]
        raise Problem(HTTPStatus.FORBIDDEN, "forbidden", f"tenant: {message}", errors=errors)
    return caller.tenant


async def _store(gateway: Gateway, media: Sequence[NewObject]) -> None:
    for new in {new.uri: new for new in media}.values():
        await gateway.in_storage(lambda new=new: gateway.storage.put(new.uri, new.content, new.content_type))  # type: ignore[misc]


def keyed_id(idempotency_key: str, tenant: str) -> str:
    """Return the id of the job that a tenant's key stands for. Raises Problem."""
    if not _IDEMPOTENCY_KEY.fullmatch(idempotency_key):
        raise invalid("Idempotency-Key", "1 to 255 printable ASCII characters are required")
    return str(uuid.uuid5(_NAMESPACE, f"{tenant}\0{idempotency_key}"))


def _refuse_other_body(error: InvalidRequest) -> NoReturn:
    detail = "Idempotency-Key: it was used for a job with another body"
    raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "idempotency_key_reused", detail) from error
