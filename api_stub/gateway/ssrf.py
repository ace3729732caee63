"""Where the gateway connects to for others: never into the network that it stands in, unless the operator lists it.

An address is judged after its name was resolved, and that very address is connected to: a name that answers differently
a moment later changes nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final
from urllib.parse import urlsplit

import httpcore

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Awaitable[tuple[str, ...]]]

#: Look-ups of one SystemResolver at a time.
MAX_ASKING: Final = 16
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
#: An IPv6-only host reaches IPv4 through these addresses, which carry the IPv4 address (RFC 6052).
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
#: Tunnels that carry an IPv4 address, and their relays: 6to4 (RFC 3056, RFC 7526) and Teredo (RFC 4380).
_TUNNELS: Final = (
    ipaddress.IPv6Network("2002::/16"),
    ipaddress.IPv6Network("2001::/32"),
    ipaddress.IPv4Network("192.88.99.0/24"),
)
#: Addresses for documentation (RFC 9637) that `ipaddress` does not know as such.
_DOCUMENTATION: Final = ipaddress.IPv6Network("3fff::/20")
_DEFAULT_PORTS: Final = {"https": 443, "http": 80}


class TargetRefused(Exception):
    """Raised when an address is one that is never connected to. `str()` says why, without the address' path."""


@dataclass(frozen=True, slots=True)
class TargetPolicy:
    """`ports` None: all. `networks`: allowed although they are not public."""

    allow_http: bool = False
    ports: frozenset[int] | None = None
    networks: tuple[IpNetwork, ...] = ()

    def check_url(self, url: str) -> None:
        """Refuse what can be refused without asking anybody. Raises TargetRefused."""
        parts = urlsplit(url)
        if parts.scheme not in _DEFAULT_PORTS or (parts.scheme == "http" and not self.allow_http):
            raise TargetRefused("https is required")
        if parts.username is not None or parts.password is not None:
            raise TargetRefused("a user name or password does not belong into it")
        host, port = parts.hostname or "", parts.port or _DEFAULT_PORTS[parts.scheme]
        if self.ports is not None and port not in self.ports:
            raise TargetRefused(f"port {port} is not allowed")
        self.check_host(host)

    def check_host(self, host: str) -> None:
        """Refuse a host whose name alone tells that it is not public. Raises TargetRefused."""
        is_local_name = host.rstrip(".").rpartition(".")[2] == "localhost"
        if is_local_name and not self._is_listed(ipaddress.IPv4Address("127.0.0.1")):
            raise TargetRefused("it is this machine")
        address = literal_address(host)
        if address is not None:
            self.check_address(address)

    def check_address(self, address: IpAddress) -> None:
        """Raise TargetRefused unless an address is public or listed."""
        if not self._is_listed(address) and not is_public(address):
            raise TargetRefused("its address is not a public one")

    def _is_listed(self, address: IpAddress) -> bool:
        plain = unmapped(address)
        return any(plain.version == network.version and plain in network for network in self.networks)


class PinnedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to the addresses that were checked; TLS still asks for the name's certificate."""

    def __init__(self, policy: TargetPolicy, ask: Resolve) -> None:
        self._policy, self._ask = policy, ask
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Open a connection to the first address that answers. Raises TargetRefused, OSError, httpcore's errors."""
        failure: Exception = httpcore.ConnectError("the name has no address")
        for address in await checked_addresses(self._policy, host, port, self._ask):
            try:
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


def is_public(address: IpAddress) -> bool:
    """Tell whether an address is one of the internet's, looking through the forms that carry another address."""
    address = unmapped(address)
    if any(address.version == tunnel.version and address in tunnel for tunnel in _TUNNELS):
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
        return address in _GLOBAL_UNICAST and address not in _DOCUMENTATION and address.is_global
    return address.is_global and not (address.is_multicast or address.is_reserved)


def literal_address(host: str) -> IpAddress | None:
    """Return the address that a host is written as, in all the ways that a resolver of C understands."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def parse_networks(text: str) -> tuple[IpNetwork, ...]:
    """Read networks between commas. Raises ValueError."""
    return tuple(ipaddress.ip_network(word.strip()) for word in text.split(",") if word.strip())


def parse_ports(text: str) -> frozenset[int] | None:
    """Read ports between commas; `*` stands for all. Raises ValueError."""
    if text.strip() == "*":
        return None
    ports = frozenset(int(word) for word in text.split(",") if word.strip())
    if not all(0 < port < 65_536 for port in ports):
        raise ValueError("a port is a number from 1 to 65535")
    return ports


class SystemResolver:
    """Asks the system's resolver, in threads of its own: for seconds, while others need asyncio's few."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_ASKING, thread_name_prefix="resolver")  # begins none before it is asked

    async def __call__(self, host: str, port: int) -> tuple[str, ...]:
        """Return a name's addresses. Raises OSError."""
        look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


async def checked_addresses(policy: TargetPolicy, host: str, port: int, ask: Resolve) -> tuple[str, ...]:
    """Resolve a name once; one address that is refused spoils the name. Raises TargetRefused, OSError."""
    addresses = await ask(host, port)
    for address in addresses:
        policy.check_address(ipaddress.ip_address(address))
    return addresses


def unmapped(address: IpAddress) -> IpAddress:
    """Return the IPv4 address that an IPv6 one stands for (`::ffff:127.0.0.1`); others as they are."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
