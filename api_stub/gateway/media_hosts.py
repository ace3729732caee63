"""Which http(s) addresses media may be fetched from: the operator's list of hosts, and how an address is read.

An address is read once and strictly, and what was held against the list is what is connected to.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final, Literal

from api_stub.contract.error import ErrorCode
from api_stub.gateway.ssrf import literal_address

MediaKind = Literal["image", "video"]
MAX_URL_CHARS: Final = 8192
_DEFAULT_PORTS: Final = {"https": 443, "http": 80}
_URL: Final = re.compile(r"(?P<scheme>https?)://(?P<authority>[^/?#]*)(?P<target>[^#]*)(?:#.*)?", re.IGNORECASE)
_AUTHORITY: Final = re.compile(
    r"(?P<host>\[[0-9a-f:.]{2,45}\]|[a-z0-9_.-]{1,254})(?::(?P<port>[0-9]{1,5}))?", re.IGNORECASE
)
_LABEL: Final = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")


class AddressRefused(Exception):
    """Raised when nothing is fetched from an address. `str()` says why, with nothing of it but its host."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class MediaAddress:
    """An http(s) URL taken apart. `host` is in lower case, without a last dot or brackets; `target`: path and query."""

    scheme: str
    host: str
    port: int
    target: str = "/"

    @property
    def authority(self) -> str:
        """Host, and port unless it is the scheme's own, as a Host header says it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """What may be told of it: neither path nor query."""
        return f"{self.scheme}://{self.authority}"

    @classmethod
    def parse(cls, url: str) -> MediaAddress:
        """Read a URL. Raises AddressRefused."""
        if len(url) > MAX_URL_CHARS:
            raise _malformed(f"{len(url)} characters, the limit is {MAX_URL_CHARS}")
        if not url.isascii() or not url.isprintable() or " " in url:
            raise _malformed("only printable ASCII: percent-encode the rest, a host as punycode")
        parts = _URL.fullmatch(url)
        if parts is None:
            raise _malformed("not an http(s) address")
        if "@" in parts["authority"]:
            raise _malformed("a user name or password does not belong into it")
        scheme, target = parts["scheme"].lower(), parts["target"]
        try:
            host, port = _host_and_port(parts["authority"], scheme)
        except ValueError as error:
            raise _malformed("its host and port cannot be read") from error
        return cls(scheme, host, port, target if target.startswith("/") else f"/{target}")


@dataclass(frozen=True, slots=True)
class _Entry:
    scheme: str
    host: str
    port: int
    is_suffix: bool

    def matches(self, address: MediaAddress) -> bool:
        is_here = address.host.endswith(f".{self.host}") if self.is_suffix else address.host == self.host
        return is_here and (address.scheme, address.port) == (self.scheme, self.port)


@dataclass(frozen=True, slots=True)
class MediaHosts:
    """The list; an empty one admits nothing."""

    entries: tuple[_Entry, ...] = ()

    @classmethod
    def parse(cls, text: str) -> MediaHosts:
        """Read `host`, `*.host`, `host:port` between commas; https unless `http://` precedes. Raises ValueError."""
        return cls(tuple(_entry(word.strip()) for word in text.split(",") if word.strip()))

    def address(self, url: str) -> MediaAddress:
        """Return a URL whose host is listed, taken apart. Raises AddressRefused."""
        if not self.entries:
            raise _malformed("http(s) addresses are not fetched; send a data URL or an s3:// address")
        address = MediaAddress.parse(url)
        if not any(entry.matches(address) for entry in self.entries):
            message = f"{address.origin} is not among the hosts that media are fetched from"
            raise AddressRefused(ErrorCode.MEDIA_FORBIDDEN, message)
        return address


NO_HOSTS: Final = MediaHosts()


def _entry(word: str) -> _Entry:
    scheme, _, rest = word.rpartition("://")
    scheme, is_suffix = scheme.lower() or "https", rest.startswith("*.")
    if scheme not in _DEFAULT_PORTS:
        raise ValueError(f"{word!r}: only `http://` or `https://` may precede a host")
    try:
        host, port = _host_and_port(rest.removeprefix("*."), scheme)
    except ValueError as error:
        raise ValueError(f"{word!r} is not `host`, `*.host`, `host:port` or one of these after `http://`") from error
    if is_suffix and literal_address(host) is not None:
        raise ValueError(f"{word!r}: an address of numbers has no names below it")
    return _Entry(scheme, host, port, is_suffix)


def _host_and_port(authority: str, scheme: str) -> tuple[str, int]:
    found = _AUTHORITY.fullmatch(authority)
    if found is None:
        raise ValueError("no host")
    port = int(found["port"] or _DEFAULT_PORTS[scheme])
    if not 0 < port < 65_536:
        raise ValueError("no port")
    return _host(found["host"]), port


def _host(text: str) -> str:
    if text.startswith("["):
        return str(ipaddress.IPv6Address(text[1:-1]))
    name = text.lower().removesuffix(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise ValueError("no host name")
    return name


def _malformed(message: str) -> AddressRefused:
    return AddressRefused(ErrorCode.INVALID_REQUEST, message)
