"""What a proxy in front of the gateway says about a request: scheme, host and path prefix that its client used.

Believed of the listed proxies only. Afterwards the request looks as if the client had reached the gateway itself below
that prefix: `root_path` and `path` are those of the ASGI specification, `host` and `scheme` the client's.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final, Self

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api_stub.gateway.ssrf import IpNetwork, parse_networks, unmapped
from api_stub.settings import GatewaySettings, parsed

#: One or more segments, no `//`: a reference that begins with two slashes would name another host.
_PREFIX: Final = re.compile(r"(/[A-Za-z0-9._~!$&'()*+;=:@%-]+)+")
_HOST: Final = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
_SCHEMES: Final = frozenset({"http", "https"})
#: Below these the gateway's own addresses begin: a path that starts so has no prefix on it.
_OWN: Final = ("/v1", "/static")
#: Where the host that the connection itself was asked for stays, for checks that believe no proxy.
DIRECT_HOST: Final = "visionq.direct_host"


@dataclass(frozen=True, slots=True)
class TrustedProxies:
    """Who is believed. `networks` None: whoever connects."""

    networks: tuple[IpNetwork, ...] | None

    @classmethod
    def load(cls, settings: GatewaySettings) -> Self:
        """Read the setting. Raises InvalidSettings."""
        return cls(parsed("api_trusted_proxies", settings.api_trusted_proxies, _networks))

    def trust(self, client: tuple[str, int] | None) -> bool:
        """Tell whether the other end of a connection is one of them; None: a connection without an address."""
        if self.networks is None:
            return True
        try:
            address = unmapped(ipaddress.ip_address(client[0] if client is not None else ""))
        except ValueError:
            return False
        return any(address.version == network.version and address in network for network in self.networks)


class Forwarded:
    """ASGI middleware, outermost. A slash at the end of a path changes nothing: nobody is redirected for one."""

    def __init__(self, app: ASGIApp, proxies: TrustedProxies) -> None:
        self._app, self._proxies = app, proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            scope = dict(scope)
            if self._proxies.trust(scope.get("client")):
                _believe(scope)
            _drop_last_slash(scope)
        await self._app(scope, receive, send)


def path_below(scope: Scope) -> str:
    """Return a request's path below the gateway's prefix. Not for what is mounted below another one."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _networks(text: str) -> tuple[IpNetwork, ...] | None:
    return None if text.strip() == "*" else parse_networks(text)


def _believe(scope: Scope) -> None:
    headers = Headers(scope=scope)
    scheme = _first(headers, "x-forwarded-proto").lower()
    if scheme in _SCHEMES:
        scope["scheme"] = scheme
    host = _first(headers, "x-forwarded-host")
    if _HOST.fullmatch(host):
        scope[DIRECT_HOST] = headers.get("host", "")
        others = [(name, value) for name, value in scope["headers"] if name != b"host"]
        scope["headers"] = [*others, (b"host", host.encode())]
    # Each proxy of a chain adds what it took off.
    prefix = "".join(part.strip().rstrip("/") for part in _all(headers, "x-forwarded-prefix"))
    if _PREFIX.fullmatch(prefix):
        _put_below(scope, prefix)


def _put_below(scope: Scope, prefix: str) -> None:
    """Let the path begin with the prefix, whether the proxy took it off or not."""
    path: str = scope["path"]
    has_prefix = path.startswith(f"{prefix}/") and not f"{prefix}/".startswith(tuple(f"{own}/" for own in _OWN))
    scope["root_path"] = prefix
    scope["path"] = path if has_prefix else prefix + path
    scope.pop("raw_path", None)  # optional, and not that path any more


def _drop_last_slash(scope: Scope) -> None:
    below = path_below(scope)
    if len(below) > 1 and below.endswith("/"):
        scope["path"] = scope["path"][:-1]
        scope.pop("raw_path", None)


def _first(headers: Headers, name: str) -> str:
    """Return what the client used: each further proxy adds its own behind it."""
    return next(iter(_all(headers, name)), "").strip()


def _all(headers: Headers, name: str) -> list[str]:
    return [part for value in headers.getlist(name) for part in value.split(",")]
