"""The producer's connections to Redis, and why one failed, in words without a secret.

A bounded pool serves commands: one that finds every connection busy waits. A reader keeps its connection as long as it
reads, and a process may have thousands of readers, so those never queue. A dead or silent Redis costs a call about
TIMEOUT_S. Of an error is told the system's reason, the server's fixed phrases, host and port; a library's own text is
not passed on: it may repeat a URL or a command, and with it a password.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import redis
import redis.asyncio
from redis.asyncio.connection import AbstractConnection as AsyncConnection
from redis.connection import AbstractConnection

from api_stub.errors import StoreUnavailable
from api_stub.ledger import pools
from api_stub.ledger.verdicts import code_of

#: Phrases that servers and libraries always use as they stand here.
_PHRASES: Final = (
    "max number of clients reached",
    "Connection closed by server",
    "Timeout connecting to server",
    "Timeout reading from",
    "No connection available",
    "Too many connections",
    "invalid username-password pair or user is disabled",
    "Authentication required",
    "Server disconnected without sending a response",
)
_TIMEOUTS: Final = (TimeoutError, asyncio.TimeoutError)
_SERVER: Final = "visionq_server"

TIMEOUT_S: Final = 2.0
MAX_COMMANDS: Final = 50
#: redis-py's own default is 100, after which it refuses.
MAX_READERS: Final = 1_000_000


def plain_cause(error: BaseException) -> str:
    """Return the reason behind an error; empty when none is known that may be told."""
    for link in _chain(error):
        if isinstance(link, socket.gaierror):
            return link.strerror or "the name has no address"
        if isinstance(link, ssl.SSLError):  # whose number is one of its own, and no errno
            return f"TLS: {link.reason.replace('_', ' ').lower()}" if link.reason else "TLS failed"
        if isinstance(link, OSError) and link.errno is not None and link.strerror:
            return os.strerror(link.errno)  # asyncio puts an address into its own words
        text = str(link)
        for phrase in _PHRASES:
            if phrase.lower() in text.lower():
                return phrase.removesuffix(" from")
    return "timed out" if any(isinstance(link, _TIMEOUTS) for link in _chain(error)) else ""


def untrusted(error: BaseException) -> str | None:
    """Return why a server's certificate was refused, if that is behind an error."""
    for link in _chain(error):
        if isinstance(link, ssl.SSLCertVerificationError):
            return link.verify_message
    return None


def server_of(error: BaseException) -> str:
    """Return `host:port` of the Redis that an error came from, where its pool was given to `name_servers`."""
    return next((str(server) for link in _chain(error) if (server := getattr(link, _SERVER, None))), "")


def name_servers(pool: redis.ConnectionPool) -> None:
    """Let the errors of a pool's connections say where they come from. Before the pool's first use."""
    kind: Any = pool.connection_class
    pool.connection_class = type(f"Named{kind.__name__}", (_Named, kind), {})


def name_servers_async(pool: redis.asyncio.ConnectionPool) -> None:
    """`name_servers` for asyncio."""
    kind: Any = pool.connection_class
    pool.connection_class = type(f"Named{kind.__name__}", (_AsyncNamed, kind), {})


def host_port(host: str, port: object) -> str:
    """Return a host and a port as one word."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Named(AbstractConnection):
    """A connection whose errors bear its server's name. For redis-py's classes to be mixed into."""

    def connect(self) -> Any:
        try:
            return super().connect()  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            _mark(error, self)
            raise

    def send_packed_command(self, *args: Any, **options: Any) -> Any:
        try:
            return super().send_packed_command(*args, **options)  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            _mark(error, self)
            raise

    def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return super().read_response(*args, **options)
        except redis.RedisError as error:
            _mark(error, self)
            raise


class _AsyncNamed(AsyncConnection):
    """`_Named` for asyncio."""

    async def connect(self) -> Any:
        try:
            return await super().connect()  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            _mark(error, self)
            raise

    async def send_packed_command(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().send_packed_command(*args, **options)
        except redis.RedisError as error:
            _mark(error, self)
            raise

    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*args, **options)
        except redis.RedisError as error:
            _mark(error, self)
            raise


def _mark(error: redis.RedisError, connection: object) -> None:
    host = str(getattr(connection, "host", ""))
    if host:
        setattr(error, _SERVER, host_port(host, getattr(connection, "port", "")))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what is behind it, nearest first; of a group the first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        behind = error.__cause__ or error.__context__
        error = behind or (error.exceptions[0] if isinstance(error, BaseExceptionGroup) else None)


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
    name_servers(client.connection_pool)
    return client


def _async_named(client: redis.asyncio.Redis) -> redis.asyncio.Redis:
    name_servers_async(client.connection_pool)
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
    server = server_of(error) if tells_where else ""
    where = f" ({server})" if server else ""
    if (refused := untrusted(error)) is not None:
        return StoreUnavailable(f"Redis' certificate is not trusted: {refused}{where}")
    known = plain_cause(error)
    cause = f": {known}" if known else ""
    if isinstance(error, pools.IsSentinel):
        return StoreUnavailable(f"Redis cannot be used: {error}{where}")
    if (code := code_of(error)) is not None or isinstance(error, redis.ResponseError):
        return StoreUnavailable(f"Redis refused: {code or type(error).__name__}{cause}{where}")
    return StoreUnavailable(f"Redis did not answer: {type(error).__name__}{cause}{where}")
