"""How every part of visionq reaches Redis: what a dead, silent or untrusted server may cost a call, in one place.

For redis-py keyword arguments, for kombu transport options. Certificates are verified unless the URL says otherwise.
"""

from __future__ import annotations

from typing import Final, TypedDict
from urllib.parse import urlsplit

import redis
import redis.asyncio.retry
from redis.backoff import NoBackoff
from redis.retry import Retry

from api_stub.contract import names

#: A pooled connection that was idle this long is pinged before use, so that a silently cut one is replaced.
HEALTH_CHECK_S: Final = 10
_STALE: Final = (redis.ConnectionError,)  # a pooled connection may have died unnoticed


class SocketOptions(TypedDict):
    """A call costs at most about `socket_connect_timeout` plus `socket_timeout` seconds."""

    socket_timeout: float
    socket_connect_timeout: float
    socket_keepalive: bool


class QueueOptions(SocketOptions):
    """The names of a queue's lists in Redis; all Celery programs on one queue must agree on them."""

    priority_steps: list[int]
    sep: str


def socket_options(timeout_s: float, connect_s: float | None = None) -> SocketOptions:
    """Return the bounds of a connection; `connect_s` of None is the same."""
    return {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s if connect_s is None else connect_s,
        "socket_keepalive": True,
    }


def queue_options(timeout_s: float, connect_s: float | None = None) -> QueueOptions:
    """Return kombu's transport options that producers and workers share."""
    return {
        **socket_options(timeout_s, connect_s),
        "priority_steps": list(names.PRIORITY_STEPS),
        "sep": names.PRIORITY_SEPARATOR,
    }


def retry(times: int) -> Retry:
    """Return how often a client tries again over a new connection, at once."""
    return Retry(NoBackoff(), times, _STALE)


def async_retry(times: int) -> redis.asyncio.retry.Retry:
    """`retry` for asyncio."""
    return redis.asyncio.retry.Retry(NoBackoff(), times, _STALE)


def tls_options(url: str) -> dict[str, str] | None:
    """Return what Celery must be told beside a rediss:// URL, None for redis://. What the URL's query says wins.

    Left alone, kombu speaks plain text to a rediss:// URL without ssl_ options, and the result backend refuses it.
    """
    return {"ssl_cert_reqs": "required"} if urlsplit(url).scheme == "rediss" else None
