"""TCP proxies in front of a server: networks that reset, cut one way, fall silent and slow down.

All proxies of a `Network` run on one thread of their own. A connection that lost bytes stays dead for ever, as TCP
would have it: it never goes on with a gap. Whoever closes a dead connection is not heard at its other end either.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, Final, Self, TypeVar

T = TypeVar("T")

CHUNK_BYTES: Final = 64 * 1024
#: How long the far end of a dead connection is left open once the near end has closed.
BURIAL_S: Final = 15.0
#: How long a TLS connection waits for the other end's last word.
GOODBYE_S: Final = 0.02
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


class Way(StrEnum):
    """A direction of a connection."""

    REQUESTS = "requests"  # from the client to the server
    REPLIES = "replies"


BOTH_WAYS: Final = frozenset(Way)


@dataclass(eq=False, slots=True)
class _Connection:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    dead: set[Way] = field(default_factory=set)

    def abort(self) -> None:
        """Reset both ends."""
        for writer in (self.client, self.server):
            end = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()


class TcpProxy:
    """One listening port in front of one server. Faults may be set from any thread, and hold until the next call."""

    def __init__(self, network: Network, target_port: int, tls: ssl.SSLContext | None = None) -> None:
        self._network = network
        self._target_port = target_port
        self._tls = tls
        self._connections: set[_Connection] = set()
        self._cut: frozenset[Way] = frozenset()
        self._delay_s = 0.0
        self.listener = network.run(self._listen())
        self.port: int = self.listener.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        """The server as a Redis URL."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def num_dead(self) -> int:
        """Open connections that have lost bytes."""
        return sum(bool(connection.dead) for connection in tuple(self._connections))

    def heal(self) -> None:
        """Pass everything on again; what has lost bytes stays dead."""
        self._set(frozenset(), 0.0)

    def cut(self, ways: frozenset[Way]) -> None:
        """Swallow all bytes that travel `ways`, of old and new connections alike."""
        self._set(ways, 0.0)

    def delay(self, seconds: float) -> None:
        """Hold every piece back for so long, in both directions."""
        self._set(frozenset(), seconds)

    def lead_to(self, port: int) -> None:
        """Lead new connections to another server; old ones stay, as when a name moves."""
        self._target_port = port

    def reset(self) -> None:
        """Reset every connection there is."""
        self._network.call(self._reset)

    def _set(self, ways: frozenset[Way], delay_s: float) -> None:
        self._cut, self._delay_s = ways, delay_s

    def _reset(self) -> None:
        for connection in tuple(self._connections):
            connection.abort()

    async def _listen(self) -> asyncio.Server:
        goodbye_s = None if self._tls is None else GOODBYE_S
        return await asyncio.start_server(
            self._serve, "127.0.0.1", 0, backlog=512, ssl=self._tls, ssl_shutdown_timeout=goodbye_s
        )

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target_port)
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
            return
        connection = _Connection(writer, to_server)
        self._connections.add(connection)
        pumps = {
            asyncio.create_task(self._pump(reader, to_server, connection, Way.REQUESTS)),
            asyncio.create_task(self._pump(from_server, writer, connection, Way.REPLIES)),
        }
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if connection.dead:
                await asyncio.wait(pumps, timeout=BURIAL_S)
        except asyncio.CancelledError:
            pass  # the network ends; asyncio of Python 3.11 would print it
        finally:
            for pump in pumps:
                pump.cancel()
            for end in (to_server, writer):
                end.close()
            self._connections.discard(connection)

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, connection: _Connection, way: Way
    ) -> None:
        with contextlib.suppress(OSError):
            while piece := await source.read(CHUNK_BYTES):
                if way in self._cut:
                    connection.dead.add(way)
                if way in connection.dead:
                    continue
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                target.write(piece)
                await target.drain()
        if way in self._cut:  # the news of the end is lost as well
            connection.dead.add(way)


class Network:
    """The thread on which proxies live. Leaving the block closes every port and connection."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._proxies: list[TcpProxy] = []

    def proxy(self, target_port: int, tls: ssl.SSLContext | None = None) -> TcpProxy:
        """Open a port in front of a server; with `tls`, clients speak TLS to it and it speaks plain text on."""
        self._proxies.append(TcpProxy(self, target_port, tls))
        return self._proxies[-1]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the network's thread and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def call(self, function: Callable[[], object]) -> None:
        """Call a function on the network's thread and wait for it."""

        async def called() -> None:
            function()

        self.run(called())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _end(self) -> None:
        for proxy in self._proxies:
            proxy.listener.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.05)  # transports close on the loop's next turns
