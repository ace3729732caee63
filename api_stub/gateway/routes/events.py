"""A job's events as server-sent events."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Final

from fastapi import APIRouter, Header, Query, Response

from api_stub.gateway.access import CallerHere, GatewayHere
from api_stub.gateway.problems import invalid
from api_stub.gateway.routes.jobs import JobId, visible
from api_stub.gateway.sse import EventStream

router = APIRouter(prefix="/v1/jobs", tags=["events"])

#: Redis counts the entries of a stream in 64 bits.
_SEQ_DIGITS: Final = 18


@router.get("/{job_id}/events", response_class=Response)
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
