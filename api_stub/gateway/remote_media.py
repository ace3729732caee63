"""GETs media from listed hosts into files: checked addresses, no redirects, no proxy, bounded in bytes and in time.

Memory stays below MAX_GATHERED_BYTES and a piece per fetch. Knows no jobs; the content itself is judged by the worker,
as for all media.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from contextlib import aclosing
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import BinaryIO, Final, NoReturn

import httpcore
from anyio import to_thread

from api_stub.contract.error import ErrorCode
from api_stub.errors import StoreUnavailable
from api_stub.gateway.media_hosts import MediaAddress, MediaHosts, MediaKind
from api_stub.gateway.ssrf import (
    PinnedNetwork,
    Resolve,
    SystemResolver,
    TargetPolicy,
    TargetRefused,
    parse_networks,
)
from api_stub.settings import GatewaySettings, parsed

#: Fetches of one process at a time, all requests together; the others wait.
MAX_FETCHING: Final = 32
#: Written at once: a host chooses the size of its pieces, and every write is a thread's turn.
MAX_GATHERED_BYTES: Final = 64 * 1024
MAX_CONNECT_S: Final = 5.0
MAX_SILENCE_S: Final = 10.0
UNKNOWN_TYPE: Final = "application/octet-stream"
_UNKNOWN: Final = frozenset({"", UNKNOWN_TYPE, "binary/octet-stream"})
_SUBTYPE: Final = r"[a-z0-9][a-z0-9.+-]{0,63}"


class FetchRefused(Exception):
    """Raised when media cannot be had from an address. `str()` says why, with no more of the answer than a header."""

    def __init__(self, code: str, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


@dataclass(frozen=True, slots=True)
class RemoteRules:
    """What the settings say about http(s) media. `max_bytes` and `max_seconds`: for one request, all media together."""

    hosts: MediaHosts
    policy: TargetPolicy
    max_bytes: int
    max_seconds: float

    @classmethod
    def load(cls, settings: GatewaySettings) -> RemoteRules:
        """Read the settings. Raises InvalidSettings."""
        networks = parsed("api_media_networks", settings.api_media_networks, parse_networks)
        return cls(
            hosts=parsed("api_media_hosts", settings.api_media_hosts, MediaHosts.parse),
            policy=TargetPolicy(allow_http=True, networks=networks),
            max_bytes=settings.api_max_body_bytes,
            max_seconds=settings.api_media_s,
        )


@dataclass(slots=True)
class Allowance:
    """What is left to one request. Made on the loop, when the request begins to fetch."""

    rules: RemoteRules
    num_bytes: int = 0
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.deadline = asyncio.get_running_loop().time() + self.rules.max_seconds

    def check(self, num_bytes: int) -> None:
        """Raise FetchRefused (413) when so many bytes more are too many."""
        if self.num_bytes + num_bytes > self.rules.max_bytes:
            message = f"more than {self.rules.max_bytes} bytes, the limit for all http(s) media of a request"
            raise FetchRefused(ErrorCode.MEDIA_TOO_LARGE, message, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)

    def take(self, num_bytes: int) -> None:
        """Count bytes that came. Raises FetchRefused."""
        self.check(num_bytes)
        self.num_bytes += num_bytes


class RemoteFetcher:
    """Fetches media over http(s), `MAX_FETCHING` at a time. One event loop per instance. `resolve` looks names up."""

    def __init__(self, rules: RemoteRules, resolve: Resolve | None = None) -> None:
        self.rules = rules
        self._context = ssl.create_default_context()
        self._network = PinnedNetwork(rules.policy, resolve or SystemResolver())
        self._turns = asyncio.Semaphore(MAX_FETCHING)

    async def fetch(self, address: MediaAddress, kind: MediaKind, sink: BinaryIO, allowance: Allowance) -> str:
        """GET an address into a file and return the media's type. Raises FetchRefused, StoreUnavailable (no disk)."""
        code = f"invalid_{kind}_url"
        try:
            self.rules.policy.check_host(address.host)
            async with asyncio.timeout_at(allowance.deadline):
                return await self._received(address, kind, sink, allowance)
        except TargetRefused as error:
            raise FetchRefused(ErrorCode.MEDIA_FORBIDDEN, str(error)) from error
        except TimeoutError as error:
            raise FetchRefused(code, f"it did not send all within {self.rules.max_seconds:g} s") from error
        except httpcore.TimeoutException as error:
            raise FetchRefused(code, "it did not answer in time") from error
        except socket.gaierror as error:
            raise FetchRefused(code, "its name cannot be resolved") from error
        except (httpcore.NetworkError, OSError) as error:
            raise FetchRefused(code, "it cannot be reached") from error
        except (httpcore.ProtocolError, ValueError) as error:
            raise FetchRefused(code, "its answer is no whole HTTP answer") from error

    async def _received(self, address: MediaAddress, kind: MediaKind, sink: BinaryIO, allowance: Allowance) -> str:
        # In parts: nobody reads the address a second time, and perhaps otherwise.
        url = httpcore.URL(scheme=address.scheme, host=address.host, port=address.port, target=address.target)
        headers = [
            ("Host", address.authority),
            ("User-Agent", "visionq"),
            ("Accept", f"{kind}/*, {UNKNOWN_TYPE};q=0.5"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ]
        limits = {"connect": MAX_CONNECT_S, "read": MAX_SILENCE_S, "write": MAX_SILENCE_S}
        before = allowance.num_bytes
        # A pool of its own: httpcore loses a pool's place when asyncio cancels whoever was just given one.
        async with (
            self._turns,
            httpcore.AsyncConnectionPool(ssl_context=self._context, network_backend=self._network) as pool,
            pool.stream("GET", url, headers=headers, extensions={"timeout": limits}) as answer,
        ):
            content_type = _checked_head(answer, kind, allowance)
            await _keep(answer, sink, allowance)
        if allowance.num_bytes == before:
            raise FetchRefused(f"invalid_{kind}_url", "it sent nothing")
        return content_type


def _checked_head(answer: httpcore.Response, kind: MediaKind, allowance: Allowance) -> str:
    """Return the type of what follows. Raises FetchRefused for what is not worth reading."""
    if answer.status != HTTPStatus.OK:
        what = ", and redirects are not followed" if 300 <= answer.status < 400 else ""
        raise FetchRefused(f"invalid_{kind}_url", f"it answered with status {answer.status}{what}")
    encoding = _header(answer, b"content-encoding")
    if encoding not in ("", "identity"):
        _refuse_type(f"it sent Content-Encoding {encoding[:40]!r}, and only 'identity' is taken")
    length = _header(answer, b"content-length")
    allowance.check(int(length) if length.isdecimal() else 0)
    content_type = _header(answer, b"content-type").partition(";")[0].strip()
    if content_type in _UNKNOWN:
        return UNKNOWN_TYPE
    if not re.fullmatch(f"{kind}/{_SUBTYPE}", content_type):
        _refuse_type(f"it sent {content_type[:40]!r}, {kind}/… is required")
    return content_type


async def _keep(answer: httpcore.Response, sink: BinaryIO, allowance: Allowance) -> None:
    """Write a body into a file. Raises FetchRefused, StoreUnavailable."""
    gathered = bytearray()
    async with aclosing(answer.aiter_stream()) as pieces:  # type: ignore[type-var]
        async for piece in pieces:
            allowance.take(len(piece))
            gathered += piece
            if len(gathered) >= MAX_GATHERED_BYTES:
                await to_thread.run_sync(_write, sink, gathered)
                gathered = bytearray()  # a thread that was left behind may still write the other
            await asyncio.sleep(0)  # many small pieces come with one read, and reading alone lets nobody else run
    await to_thread.run_sync(_write, sink, gathered)


def _header(answer: httpcore.Response, name: bytes) -> str:
    values = [value.decode("latin-1").strip() for found, value in answer.headers if found.lower() == name]
    return ", ".join(values).lower()


def _refuse_type(message: str) -> NoReturn:
    raise FetchRefused(ErrorCode.MEDIA_UNSUPPORTED, message)


def _write(sink: BinaryIO, gathered: bytearray) -> None:
    try:
        sink.write(gathered)
        sink.flush()
    except OSError as error:
        raise StoreUnavailable("the gateway has no room on its disk") from error
