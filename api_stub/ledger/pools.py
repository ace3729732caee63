"""The one place that makes connections to Redis, and the rule that all of them follow: leave the wrong server.

After a planned failover the name leads elsewhere, and the old server lives on as a read-only replica: its connections
stay good for ever, and each would go on asking it. So a pool leaves a server that refused a write with a code that says
so, and one that calls itself a replica or turns out not to be the master that the name leads to now; a connection asks
when it is new and every LOOK_S. To leave means: every connection that was opened before is closed at its next use, and
whoever waits on a subscription over one gets a ConnectionError and subscribes anew.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from typing import Any, Final

import redis
import redis.asyncio
from redis.asyncio.connection import AbstractConnection as AsyncConnection
from redis.connection import AbstractConnection

from api_stub.ledger import settings
from api_stub.ledger.verdicts import Verdict, is_passing, judge

#: How long a connection in use goes on without asking which server it leads to.
LOOK_S: Final = 3.0
_ROLE: Final = re.compile(r"^role:(\w+)", re.MULTILINE)
_SENTINEL: Final = re.compile(r"^(?:redis|server)_mode:sentinel", re.MULTILINE)
_HISTORY: Final = re.compile(r"^master_replid:(\w+)", re.MULTILINE)


def client(
    url: str, *, timeout_s: float, connect_s: float | None = None, retries: int = 1, max_connections: int = 100,
    wait_s: float | None = None, is_text: bool = True, health_check_s: int = settings.HEALTH_CHECK_S,
) -> redis.Redis:  # fmt: skip
    """Make a client with its own pool; connections are opened on first use. Safe to share between threads.

    timeout_s, connect_s: what a silent server costs a call, see `link.socket_options`. wait_s: how long a call waits
    for one of `max_connections`; None: it fails at once. is_text: replies are decoded.
    """
    options: dict[str, Any] = {
        "max_connections": max_connections,
        "decode_responses": is_text,
        "health_check_interval": health_check_s,
        "retry": settings.retry(retries),
        **settings.socket_options(timeout_s, connect_s),
    }
    pool = (
        redis.ConnectionPool.from_url(url, **options)
        if wait_s is None
        else redis.BlockingConnectionPool.from_url(url, timeout=wait_s, **options)
    )
    kind: Any = pool.connection_class
    pool.connection_class = type(f"Leaving{kind.__name__}", (_Leaving, kind), {"master": Master()})
    return redis.Redis.from_pool(pool)


def async_client(
    url: str, *, timeout_s: float, connect_s: float | None = None, retries: int = 1, max_connections: int = 100,
    wait_s: float | None = None, health_check_s: int = settings.HEALTH_CHECK_S,
) -> redis.asyncio.Redis:  # fmt: skip
    """`client` for one event loop. Replies are decoded."""
    options: dict[str, Any] = {
        "max_connections": max_connections,
        "decode_responses": True,
        "health_check_interval": health_check_s,
        "retry": settings.async_retry(retries),
        **settings.socket_options(timeout_s, connect_s),
    }
    pool: redis.asyncio.ConnectionPool = (
        redis.asyncio.ConnectionPool.from_url(url, **options)
        if wait_s is None
        else redis.asyncio.BlockingConnectionPool.from_url(url, timeout=wait_s, **options)
    )
    kind: Any = pool.connection_class
    pool.connection_class = type(f"Leaving{kind.__name__}", (_AsyncLeaving, kind), {"master": Master()})
    return redis.asyncio.Redis.from_pool(pool)


class IsSentinel(redis.RedisError):
    """Raised when a Redis Sentinel answers at the address: it knows masters and keeps no jobs."""

    def __init__(self) -> None:
        super().__init__("a Redis Sentinel answers there: give the address that always leads to the master")


@dataclass(slots=True)
class Master:
    """What a pool knows of the master behind its name. `term` grows when it is left; races only cost a look."""

    term: int = 0
    history: str = ""

    def leave(self, term: int) -> None:
        """A connection of `term` was at the wrong server; the first to tell of it counts."""
        if term == self.term:
            self.term, self.history = self.term + 1, ""

    def met(self, history: str) -> None:
        """A connection has reached a master with this replication id, which every promotion changes."""
        if self.history not in ("", history):
            self.term += 1
        self.history = history


class _Looks:
    """What both kinds of connections know: the term in which each was opened and when to look again."""

    master: Master
    _term = 0
    _look_at = math.inf
    _is_new = True

    @property
    def _is_left(self) -> bool:
        return self._term != self.master.term

    def _judged(self, error: redis.RedisError) -> None:
        if judge(error) is Verdict.WRONG_SERVER:
            self.master.leave(self._term)

    def _looked(self) -> None:
        self._look_at, self._is_new = time.monotonic() + LOOK_S, False

    def _refused(self, error: redis.ResponseError) -> None:
        """INFO was refused: for as long as a script runs, say, or to this user for good."""
        self._looked()
        if not is_passing(error):
            self._look_at = math.inf

    def _has_arrived(self, info: object) -> bool:
        """Read what INFO says; False: this is a replica, whose pool has been told to leave it. Raises IsSentinel.

        A new connection stays with a replica for now: the name leads there, and so it would those that were told to
        leave, each of which would tell the others again.
        """
        is_new = self._is_new
        self._looked()
        text = info.decode(errors="replace") if isinstance(info, bytes) else str(info)
        if _SENTINEL.search(text):  # which has no replication to tell of
            raise IsSentinel
        role, history = _ROLE.search(text), _HISTORY.search(text)
        if role is not None and role[1] == "slave":
            if is_new:
                return True
            self.master.leave(self._term)
            return False
        if history is not None:
            self.master.met(history[1])
            self._term = self.master.term
        return True


class _Leaving(_Looks, AbstractConnection):
    """A connection that follows the rule. For redis-py's classes to be mixed into."""

    def on_connect_check_health(self, check_health: bool = True) -> None:
        self._term, self._look_at, self._is_new = self.master.term, math.inf, True
        super().on_connect_check_health(False)
        self._look_at = 0.0

    def check_health(self) -> None:
        if self._is_left:
            self._reopen()
        if time.monotonic() >= self._look_at and not self.retry.call_with_retry(self._look, self._look_failed):
            self._reopen()
            self._looked()  # if the name has not moved yet, this is all there is
        super().check_health()  # type: ignore[no-untyped-call]

    def can_read(self, timeout: float = 0) -> bool:
        if timeout:  # a subscription waits; a pool that has a glance at what it hands out does not
            self._stay()
        return super().can_read(timeout)

    def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return super().read_response(*args, **options)
        except redis.RedisError as error:
            self._judged(error)
            raise

    def _stay(self) -> None:
        """Raise ConnectionError when the server was left; who waits here for messages asks it nothing."""
        if self._is_left and self.is_connected:
            self.disconnect()  # type: ignore[no-untyped-call]
            raise redis.ConnectionError("this server is not the master any more")

    def _look(self) -> bool:
        try:
            info = self._info("replication")
            return self._has_arrived(info or self._info("server"))
        except redis.ResponseError as error:
            self._refused(error)
            return True

    def _info(self, section: str) -> object:
        self.send_command("INFO", section, check_health=False)  # type: ignore[no-untyped-call]
        return self.read_response()

    def _look_failed(self, error: Exception) -> None:
        self.disconnect()  # type: ignore[no-untyped-call]

    def _reopen(self) -> None:
        self.disconnect()  # type: ignore[no-untyped-call]
        self.connect_check_health(check_health=False)


class _AsyncLeaving(_Looks, AsyncConnection):
    """`_Leaving` for asyncio."""

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        self._term, self._look_at, self._is_new = self.master.term, math.inf, True
        await super().on_connect_check_health(False)
        self._look_at = 0.0

    async def check_health(self) -> None:
        if self._is_left:
            await self._reopen()
        if time.monotonic() >= self._look_at and not await self.retry.call_with_retry(self._look, self._look_failed):
            await self._reopen()
            self._looked()
        await super().check_health()  # type: ignore[no-untyped-call]

    async def read_response(self, *args: Any, **options: Any) -> Any:
        if options.get("push_request"):  # a subscription waits
            await self._stay()
        try:
            return await super().read_response(*args, **options)
        except redis.RedisError as error:
            self._judged(error)
            raise

    async def _stay(self) -> None:
        if self._is_left and self.is_connected:
            await self.disconnect(nowait=True)
            raise redis.ConnectionError("this server is not the master any more")

    async def _look(self) -> bool:
        try:
            info = await self._info("replication")
            return self._has_arrived(info or await self._info("server"))
        except redis.ResponseError as error:
            self._refused(error)
            return True

    async def _info(self, section: str) -> object:
        await self.send_command("INFO", section, check_health=False)
        return await self.read_response()

    async def _look_failed(self, error: Exception) -> None:
        await self.disconnect(nowait=True)

    async def _reopen(self) -> None:
        await self.disconnect(nowait=True)
        await self.connect_check_health(check_health=False)
