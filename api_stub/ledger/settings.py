"""What the settings of either side say about Redis and the ledger: the address, what a call may cost, the limits.

A URL may hold a password: no message repeats it. Timeouts and certificates are given as redis-py's keyword arguments
and as kombu's transport options; certificates are verified unless the URL says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypedDict
from urllib.parse import parse_qs, urlsplit

import redis
import redis.asyncio.retry
from redis.backoff import NoBackoff
from redis.retry import Retry

from api_stub.contract import names

_WAY: Final = "give one address that always leads to the master, a name that moves or a TCP proxy"
_SET_IN_THE_URL: Final = ("password", "username", "db")


def check_redis_url(url: str) -> None:
    """Raise ValueError when `url` names no Redis, or says in its query what belongs before it."""
    _refuse_several(url)
    try:
        parts = urlsplit(url)
        is_redis = parts.scheme in {"redis", "rediss"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_redis = False
    # A '#' or '/' in a password cuts the host off: what follows would be printed as the path.
    if not is_redis or "@" in parts.path + parts.query + parts.fragment:
        raise ValueError("must be redis://[user:password@]host[:port][/db] or rediss://…")
    for name in _SET_IN_THE_URL:
        if name in parse_qs(parts.query, keep_blank_values=True):
            raise ValueError(f"{name}= does not belong into the query: redis://[user:password@]host[:port][/db]")


def _refuse_several(url: str) -> None:
    """Name what libraries take elsewhere, and the way that works here."""
    scheme, _, rest = url.partition("://")
    if "sentinel" in scheme.lower():
        raise ValueError(f"Redis Sentinel is not supported: {_WAY}")
    hosts = rest.partition("/")[0].rpartition("@")[2]
    if "," in hosts or ";" in hosts or "://" in rest:
        raise ValueError(f"several addresses are not supported: {_WAY}")


def redis_address(url: str) -> str:
    """Return `host:port` of a checked URL, for messages."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or 6379}"


#: What workers and gateways should agree on: each treats a job by its own values.
SHARED_SETTINGS: Final = (
    "max_attempts",
    "tenant_max_running",
    "grace_s",
    "ageing_s",
    "result_ttl_s",
    "events_ttl_s",
    "unserved_ttl_s",
)


@dataclass(frozen=True, slots=True)
class LedgerConfig:
    """Durations in seconds of Redis' clock.

    lease_s: silence after which a claimed job counts as lost; the same for every process on one Redis. Time in which
        nobody reached Redis does not count: after such a gap a dead worker's job may be taken one lease later. A worker
        that starts when all others are dead sees such a gap, too.
    grace_s: time after which a queued job is checked for a lost doorbell.
    max_attempts: lost leases after which a job is given up (`poison_job`).
    tenant_max_running: jobs of one tenant and model that run or are about to; 0 means no limit. The workers' own
        setting decides.
    ageing_s: time in the queue after which a job of a lower priority is served among those of priority 0.
    window: doorbells of one priority list that are out at a time; more when there are many workers.
    unserved_ttl_s: time after which a queued job ends when no worker of its model has been there.
    max_queued: queued and in-progress jobs per model that submit admits; 0 means no limit.
    """

    lease_s: float = 15.0
    grace_s: float = 15.0
    max_attempts: int = 3
    max_queued: int = 0
    tenant_max_running: int = 0
    ageing_s: float = 60.0
    window: int = 8
    result_ttl_s: int = 86_400
    events_ttl_s: int = 3_600
    unserved_ttl_s: int = 86_400


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
