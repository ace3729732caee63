"""What nobody may touch: a server that counts who connects, a file that tells who opens it."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_IN_ACCESS, _IN_OPEN = 0x1, 0x20


@dataclass
class Traps:
    """`url` and `secret` are the bait; `num_connections` and `num_openings` count who took it."""

    url: str
    secret: Path
    inotify: int
    connections: list[str] = field(default_factory=list)

    @property
    def num_connections(self) -> int:
        return len(self.connections)

    @property
    def num_openings(self) -> int:
        """Bytes of inotify events since the last look: 0 when nobody opened or read the file."""
        try:
            return len(os.read(self.inotify, 65_536))
        except BlockingIOError:
            return 0


@contextmanager
def set_traps(directory: Path) -> Iterator[Traps]:
    """Set both until the block ends. Linux only."""
    secret = directory / "secret.txt"
    secret.write_text("nobody reads this\n")
    libc = ctypes.CDLL(None, use_errno=True)
    inotify = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert libc.inotify_add_watch(inotify, os.fsencode(secret), _IN_ACCESS | _IN_OPEN) > 0
    server = socket.create_server(("127.0.0.1", 0))
    traps = Traps(f"http://127.0.0.1:{server.getsockname()[1]}/", secret, inotify)
    thread = threading.Thread(target=_count, args=(server, traps.connections), daemon=True)
    thread.start()
    try:
        yield traps
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(10)
        os.close(inotify)


def _count(server: socket.socket, connections: list[str]) -> None:
    with suppress(OSError):  # the server is shut down
        while True:
            connection, address = server.accept()
            connections.append(str(address))
            connection.close()
