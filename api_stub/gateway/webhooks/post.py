"""One POST to somebody else's server: a checked address, no redirects, no proxy; all that is kept is a status."""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

import httpcore

from api_stub.gateway.ssrf import PinnedNetwork, Resolve, SystemResolver, TargetPolicy

MAX_CONNECT_S: Final = 5.0
#: Read of an answer's body before the connection is closed: a polite receiver has finished writing by then.
MAX_BODY_BYTES: Final = 16 * 1024


class PostFailed(Exception):
    """Raised when no answer came. `str()` names the kind of failure only."""


@dataclass(frozen=True, slots=True)
class PostResponse:
    """What a receiver said. `retry_after_s` is None when it did not say."""

    status: int
    retry_after_s: float | None

    @property
    def is_good(self) -> bool:
        """True when the delivery arrived."""
        return 200 <= self.status < 300


class WebhookPost:
    """Sends. One event loop per instance. `ask` resolves names."""

    def __init__(self, policy: TargetPolicy, timeout_s: float, ask: Resolve | None = None) -> None:
        self._policy, self._timeout_s = policy, timeout_s
        self._context = ssl.create_default_context()
        self._network = PinnedNetwork(policy, ask or SystemResolver())

    async def send(self, url: str, headers: Mapping[str, str], body: bytes) -> PostResponse:
        """POST once; the caller bounds how many at a time. Raises TargetRefused (never try again), PostFailed."""
        self._policy.check_url(url)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._exchanged(url, headers, body)
        except TimeoutError as error:
            raise PostFailed(f"no answer within {self._timeout_s:g} s") from error
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
            raise PostFailed(type(error).__name__) from error
        except (ValueError, httpcore.UnsupportedProtocol) as error:
            raise PostFailed("the address cannot be used") from error

    async def _exchanged(self, url: str, headers: Mapping[str, str], body: bytes) -> PostResponse:
        limits = {"connect": min(MAX_CONNECT_S, self._timeout_s), "read": self._timeout_s, "write": self._timeout_s}
        sent = [(name.encode(), value.encode()) for name, value in headers.items()]
        # A pool of its own: httpcore loses a pool's place when asyncio cancels whoever was just given one.
        async with (
            httpcore.AsyncConnectionPool(ssl_context=self._context, network_backend=self._network) as pool,
            pool.stream("POST", url, headers=sent, content=body, extensions={"timeout": limits}) as answer,
        ):
            await _read_some(answer)
            received = {name.lower(): value for name, value in answer.headers}
            return PostResponse(answer.status, _seconds(received.get(b"retry-after", b"").decode("latin-1")))


async def _read_some(answer: httpcore.Response) -> None:
    num_bytes = 0
    async with aclosing(answer.aiter_stream()) as pieces:  # type: ignore[type-var]
        async for piece in pieces:
            num_bytes += len(piece)
            if num_bytes >= MAX_BODY_BYTES:
                return


def _seconds(retry_after: str) -> float | None:
    """Read RFC 9110's Retry-After: seconds or a date; None when it is neither."""
    text = retry_after.strip()
    if text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        when = parsedate_to_datetime(text)
    except (ValueError, TypeError):
        return None
    seconds = (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None
