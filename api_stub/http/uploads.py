"""Uploads by way of a gateway: straight into S3 with its leave, or through the gateway where S3 cannot be reached."""

from __future__ import annotations

import json
import mimetypes
from http import HTTPStatus
from pathlib import Path
from typing import Final

import httpx

from api_stub.errors import InvalidRequest, StorageRefused, StoreUnavailable
from api_stub.http.asks import CONNECT_S, Ask, Slot, slot
from api_stub.http.wire import send, unreachable, whole

PUT_S: Final = 60.0


def upload(http: httpx.Client, path: str | Path) -> str:
    """Store a local image or clip and return its URI. Reads the file in parts.

    Raises OSError (no such file), InvalidRequest, AccessRefused, StoreUnavailable, StorageRefused.
    """
    source = Path(path)
    num_bytes, content_type = source.stat().st_size, _media_type(source)
    leave = send(http, slot(content_type, num_bytes))
    try:
        _put(source, leave)
    except httpx.ConnectError:
        return _through_gateway(http, source, content_type)
    except httpx.HTTPError as error:
        raise StoreUnavailable(f"S3 did not answer: {type(error).__name__}") from error
    return leave.uri


def _put(source: Path, leave: Slot) -> None:
    """Send the file without the gateway's client, whose key is no business of S3's."""
    with source.open("rb") as file:
        timeout = httpx.Timeout(PUT_S, connect=CONNECT_S)
        answer = httpx.put(leave.url, content=file, headers=leave.headers, timeout=timeout)
    if answer.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise StoreUnavailable(f"S3 is busy: status {answer.status_code}")
    if not answer.is_success:
        raise StorageRefused(f"S3 refused: status {answer.status_code}")


def _through_gateway(http: httpx.Client, source: Path, content_type: str) -> str:
    ask = Ask("POST", "/v1/uploads/inline", lambda answer: str(json.loads(answer.body)["uri"]))
    try:
        with source.open("rb") as file:
            answer = http.post(ask.path, files={"file": (source.name, file, content_type)}, timeout=PUT_S)
    except httpx.HTTPError as error:
        raise unreachable(error) from error
    return ask.answered(whole(answer))


def _media_type(source: Path) -> str:
    guessed = mimetypes.guess_type(source.name)[0]
    if guessed is None or not guessed.startswith(("image/", "video/")):
        raise InvalidRequest(f"upload: {source.name!r} is no image or clip by its name")
    return guessed
