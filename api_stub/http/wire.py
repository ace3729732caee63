"""Sends asks with httpx, and says what its errors mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeVar

import httpx

from api_stub import causes
from api_stub.errors import StoreUnavailable
from api_stub.http.asks import ANSWER_S, CONNECT_S, Ask
from api_stub.http.refusals import Answer

T = TypeVar("T")

#: A pooled connection may have died unnoticed: worth one more try.
STALE: Final = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)
#: Readers and waiting threads never queue for a connection.
_PORTS: Final = {"http": 80, "https": 443}
LIMITS: Final = httpx.Limits(max_connections=None, max_keepalive_connections=20)


def headers(api_key: str | None) -> Mapping[str, str]:
    """Return what every request bears."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def send(http: httpx.Client, ask: Ask[T]) -> T:
    """Send an ask and read its answer. Raises StoreUnavailable and what the answer refuses with."""
    try:
        try:
            response = http.send(_request(http, ask))
        except STALE:
            response = http.send(_request(http, ask))
    except httpx.HTTPError as error:
        raise unreachable(error) from error
    return ask.answered(whole(response))


async def send_async(http: httpx.AsyncClient, ask: Ask[T]) -> T:
    """`send` for asyncio."""
    try:
        try:
            response = await http.send(_request(http, ask))
        except STALE:
            response = await http.send(_request(http, ask))
    except httpx.HTTPError as error:
        raise unreachable(error) from error
    return ask.answered(whole(response))


def whole(response: httpx.Response) -> Answer:
    """Return an answer that was read to its end."""
    said = {name.lower(): value for name, value in response.headers.items()}
    return Answer(response.status_code, said, response.content)


def unreachable(error: httpx.HTTPError) -> StoreUnavailable:
    """Return the error for the caller: what happened, and where. Never the URL: it may hold a password."""
    what = f"the gateway did not answer: {type(error).__name__}"
    cause = causes.untrusted(error) or causes.plain_cause(error)
    return StoreUnavailable(f"{what}{f': {cause}' if cause else ''}{_where(error)}")


def _where(error: httpx.HTTPError) -> str:
    try:
        url = error.request.url
    except RuntimeError:  # httpx knows of none
        return ""
    return f" ({causes.host_port(url.host, url.port or _PORTS.get(url.scheme, ''))})"


def _request(http: httpx.Client | httpx.AsyncClient, ask: Ask[T]) -> httpx.Request:
    timeout = httpx.Timeout(ANSWER_S + ask.wait_s, connect=CONNECT_S)
    if ask.body is None:
        return http.build_request(ask.method, ask.path, timeout=timeout)
    content_type = {"Content-Type": "application/json"}
    return http.build_request(ask.method, ask.path, content=ask.body, headers=content_type, timeout=timeout)
