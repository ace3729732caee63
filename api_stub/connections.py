"""The producer's connections to Redis: a bounded pool for commands, an open one for readers.

A command that finds every connection busy waits for one. A reader keeps its connection as long as it reads, and a
process may have thousands of readers, so those never queue. A dead or silent Redis costs a call about TIMEOUT_S.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import redis
import redis.asyncio

from api_stub import causes
from api_stub.errors import StoreUnavailable
from api_stub.ledger import pools
from api_stub.ledger.verdicts import code_of

TIMEOUT_S: Final = 2.0
MAX_COMMANDS: Final = 50
#: redis-py's own default is 100, after which it refuses.
MAX_READERS: Final = 1_000_000


def commands(url: str) -> redis.Redis:
    """Connections for short commands, text replies; safe to share between threads."""
    return _named(pools.client(url, timeout_s=TIMEOUT_S, max_connections=MAX_COMMANDS, wait_s=TIMEOUT_S))


def readers(url: str) -> redis.Redis:
    """Connections for subscriptions; safe to share between threads."""
    return _named(pools.client(url, timeout_s=TIMEOUT_S, retries=0, max_connections=MAX_READERS, health_check_s=0))


def async_commands(url: str, *, timeout_s: float = TIMEOUT_S, max_wait_s: float = TIMEOUT_S) -> redis.asyncio.Redis:
    """`commands` for one event loop. `max_wait_s`: how long a command waits for one of the busy connections."""
    client = pools.async_client(
        url, timeout_s=timeout_s, connect_s=TIMEOUT_S, max_connections=MAX_COMMANDS, wait_s=max_wait_s
    )
    return _async_named(client)


def async_readers(url: str) -> redis.asyncio.Redis:
    """`readers` for one event loop."""
    client = pools.async_client(url, timeout_s=TIMEOUT_S, retries=0, max_connections=MAX_READERS, health_check_s=0)
    return _async_named(client)


def _named(client: redis.Redis) -> redis.Redis:
    causes.name_servers(client.connection_pool)
    return client


def _async_named(client: redis.asyncio.Redis) -> redis.asyncio.Redis:
    causes.name_servers_async(client.connection_pool)
    return client


@contextmanager
def store_errors() -> Iterator[None]:
    """Translate what redis-py raises."""
    try:
        yield
    except redis.RedisError as error:
        raise unavailable(error) from error


def unavailable(error: redis.RedisError, *, tells_where: bool = True) -> StoreUnavailable:
    """Return the error for the caller: what happened and, unless that is not their business, at which host and port.

    Redis' own text is left out but for its code and for what is known to hold no secret: it may repeat commands.
    """
    server = causes.server_of(error) if tells_where else ""
    where = f" ({server})" if server else ""
    if (untrusted := causes.untrusted(error)) is not None:
        return StoreUnavailable(f"Redis' certificate is not trusted: {untrusted}{where}")
    known = causes.plain_cause(error)
    cause = f": {known}" if known else ""
    if isinstance(error, pools.IsSentinel):
        return StoreUnavailable(f"Redis cannot be used: {error}{where}")
    if (code := code_of(error)) is not None or isinstance(error, redis.ResponseError):
        return StoreUnavailable(f"Redis refused: {code or type(error).__name__}{cause}{where}")
    return StoreUnavailable(f"Redis did not answer: {type(error).__name__}{cause}{where}")
