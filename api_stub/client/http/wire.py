"""Sends requests with httpx, uploads files, reads text/event-stream, and says what httpx' errors mean.

A file goes straight into S3 with the gateway's put, or through the gateway where S3 cannot be reached. Streams are
cut at new lines only: an answer's text may hold the other characters that Python cuts lines at.
"""

from __future__ import annotations

import json
import logging
import mimetypes
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Final, TypeVar

import httpx
from pydantic import ValidationError

from api_stub import connections
from api_stub.client.http.requests import (
    ANSWER_S,
    CONNECT_S,
    ApiRequest,
    ApiResponse,
    PresignedPut,
    job_path,
    presign_put,
)
from api_stub.contract.event import Event, parse_event
from api_stub.errors import InvalidRequest, StorageRefused, StoreUnavailable

T = TypeVar("T")

#: A pooled connection may have died unnoticed: worth one more try.
STALE: Final = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)
#: Readers and waiting threads never queue for a connection.
_PORTS: Final = {"http": 80, "https": 443}
LIMITS: Final = httpx.Limits(max_connections=None, max_keepalive_connections=20)

logger = logging.getLogger(__name__)

#: A gateway says every 15 s that it lives, unless it is told otherwise. One that is silent this long is asked anew.
LIVE_S: Final = 45.0
#: How much later than asked for a reader may notice a silence.
SLACK_S: Final = 0.5
PUT_S: Final = 60.0


def headers(api_key: str | None) -> Mapping[str, str]:
    """Return what every request bears."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def send(http: httpx.Client, request: ApiRequest[T]) -> T:
    """Send a request and read its response. Raises StoreUnavailable and the error that the response stands for."""
    try:
        try:
            response = http.send(_request(http, request))
        except STALE:
            response = http.send(_request(http, request))
    except httpx.HTTPError as error:
        raise unreachable(error) from error
    return request.read_response(whole(response))


async def send_async(http: httpx.AsyncClient, request: ApiRequest[T]) -> T:
    """`send` for asyncio."""
    try:
        try:
            response = await http.send(_request(http, request))
        except STALE:
            response = await http.send(_request(http, request))
    except httpx.HTTPError as error:
        raise unreachable(error) from error
    return request.read_response(whole(response))


def whole(response: httpx.Response) -> ApiResponse:
    """Return an answer that was read to its end."""
    headers = {name.lower(): value for name, value in response.headers.items()}
    return ApiResponse(response.status_code, headers, response.content)


def unreachable(error: httpx.HTTPError) -> StoreUnavailable:
    """Return the error for the caller: what happened, and where. Never the URL: it may hold a password."""
    what = f"the gateway did not answer: {type(error).__name__}"
    cause = connections.untrusted(error) or connections.plain_cause(error)
    return StoreUnavailable(f"{what}{f': {cause}' if cause else ''}{_where(error)}")


def _where(error: httpx.HTTPError) -> str:
    try:
        url = error.request.url
    except RuntimeError:  # httpx knows of none
        return ""
    return f" ({connections.host_port(url.host, url.port or _PORTS.get(url.scheme, ''))})"


def _request(http: httpx.Client | httpx.AsyncClient, request: ApiRequest[T]) -> httpx.Request:
    timeout = httpx.Timeout(ANSWER_S + request.wait_s, connect=CONNECT_S)
    if request.body is None:
        return http.build_request(request.method, request.path, timeout=timeout)
    content_type = {"Content-Type": "application/json"}
    return http.build_request(request.method, request.path, content=request.body, headers=content_type, timeout=timeout)


def stream_path(job_id: str, after: int) -> str:
    """Return the address of a job's events behind a seq."""
    return f"{job_path(job_id)}/events?after={after}"


class EventStreamParser:
    """One per response. Comments and unknown events yield nothing."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Take some bytes; yield the events that they complete."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            event = self._taken(line.removesuffix(b"\r"))
            if event is not None:
                yield event

    def _taken(self, line: bytes) -> Event | None:
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            return None
        data, self._data = self._data, []
        return _parsed(b"\n".join(data)) if data else None


def _parsed(raw: bytes) -> Event | None:
    try:
        return parse_event(raw)
    except ValidationError:
        logger.warning("event of an unknown kind skipped", extra={"action": "follow"})
        return None


def upload(http: httpx.Client, path: str | Path) -> str:
    """Store a local image or clip and return its URI. Reads the file in parts.

    Raises OSError (no such file), InvalidRequest, AccessRefused, StoreUnavailable, StorageRefused.
    """
    source = Path(path)
    num_bytes, content_type = source.stat().st_size, _media_type(source)
    put = send(http, presign_put(content_type, num_bytes))
    try:
        _put(source, put)
    except httpx.ConnectError:
        return _through_gateway(http, source, content_type)
    except httpx.HTTPError as error:
        raise StoreUnavailable(f"S3 did not answer: {type(error).__name__}") from error
    return put.uri


def _put(source: Path, put: PresignedPut) -> None:
    """Send the file without the gateway's client, whose key is no business of S3's."""
    with source.open("rb") as file:
        timeout = httpx.Timeout(PUT_S, connect=CONNECT_S)
        response = httpx.put(put.url, content=file, headers=put.headers, timeout=timeout)
    if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise StoreUnavailable(f"S3 is busy: status {response.status_code}")
    if not response.is_success:
        raise StorageRefused(f"S3 refused: status {response.status_code}")


def _through_gateway(http: httpx.Client, source: Path, content_type: str) -> str:
    request = ApiRequest("POST", "/v1/uploads/inline", lambda response: str(json.loads(response.body)["uri"]))
    try:
        with source.open("rb") as file:
            response = http.post(request.path, files={"file": (source.name, file, content_type)}, timeout=PUT_S)
    except httpx.HTTPError as error:
        raise unreachable(error) from error
    return request.read_response(whole(response))


def _media_type(source: Path) -> str:
    guessed = mimetypes.guess_type(source.name)[0]
    if guessed is None or not guessed.startswith(("image/", "video/")):
        raise InvalidRequest(f"upload: {source.name!r} is no image or clip by its name")
    return guessed
