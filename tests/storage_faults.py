"""A proxy in front of real S3 that breaks chosen requests: what a bad day of storage looks like to a client."""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STALL_S = 20.0
PIECE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Status:
    """Answer with this HTTP status and S3 error code."""

    status: int
    code: str = ""


@dataclass(frozen=True)
class Truncate:
    """Promise the whole body, send this many bytes of it, close."""

    num_bytes: int


@dataclass(frozen=True)
class Stall:
    """Send this many bytes of the body, then nothing."""

    num_bytes: int = 0


@dataclass(frozen=True)
class Drip:
    """Send the body whole, but in pieces with a pause after each."""

    pause_s: float
    piece_bytes: int = PIECE_BYTES


@dataclass(frozen=True)
class Silence:
    """Take the request and never answer."""


@dataclass(frozen=True)
class Reset:
    """Reset the connection without an answer."""


@dataclass(frozen=True)
class Lie:
    """Claim another length in the headers (HEAD only)."""

    num_bytes: int


@dataclass(frozen=True)
class Before:
    """Do something first, then answer truthfully."""

    action: Callable[[], object]


@dataclass(frozen=True)
class Unconditional:
    """Do something first, then answer as a server that knows no If-Match."""

    action: Callable[[], object]


Fault = Status | Truncate | Stall | Drip | Silence | Reset | Lie | Before | Unconditional


@dataclass
class FaultyStorage:
    """`plan["GET"]` holds the faults of the next GETs, `always` one that hits every request without a plan.

    `of_object["key"]` hits every request for objects of that key, before any other.
    """

    upstream: str
    plan: dict[str, list[Fault]] = field(default_factory=dict)
    always: Fault | None = None
    of_object: dict[str, Fault] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    url: str = ""
    closing: threading.Event = field(default_factory=threading.Event)

    def next_fault(self, method: str, key: str) -> Fault | None:
        self.seen.append(method)
        if key in self.of_object:
            return self.of_object[key]
        planned = self.plan.get(method)
        return planned.pop(0) if planned else self.always


@contextmanager
def faulty_storage(upstream: str) -> Iterator[FaultyStorage]:
    """Serve until the block ends; no thread and no socket is left behind."""
    storage = FaultyStorage(upstream)
    handler = type("Handler", (_Handler,), {"storage": storage})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    storage.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield storage
    finally:
        storage.closing.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    storage: FaultyStorage

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _serve(self, method: str) -> None:
        fault = self.storage.next_fault(method, urllib.parse.urlsplit(self.path).path.split("/", 2)[-1])
        if isinstance(fault, Reset):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            self.close_connection = True
            self.connection.close()
        elif isinstance(fault, Silence):
            self.storage.closing.wait(STALL_S)
            self.close_connection = True
        elif isinstance(fault, Status):
            body = f"<Error><Code>{fault.code}</Code></Error>".encode() if fault.code and method == "GET" else b""
            self._answer(fault.status, {"Content-Length": str(len(body))}, body)
        else:
            if isinstance(fault, Before | Unconditional):
                fault.action()
            if isinstance(fault, Unconditional):
                del self.headers["If-Match"]
            status, headers, body = self._ask(method)
            if isinstance(fault, Lie):
                headers["Content-Length"] = str(fault.num_bytes)
            sent = body[: fault.num_bytes] if isinstance(fault, Truncate | Stall) else body
            self._answer(status, headers, sent, fault if isinstance(fault, Drip) else Drip(0.0))
            if isinstance(fault, Stall):
                self.storage.closing.wait(STALL_S)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, drip: Drip = Drip(0.0)) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        with suppress(OSError):  # a client that has seen enough hangs up
            for start in range(0, len(body), drip.piece_bytes):
                self.wfile.write(body[start : start + drip.piece_bytes])
                self.storage.closing.wait(drip.pause_s)

    def _ask(self, method: str) -> tuple[int, dict[str, str], bytes]:
        """Pass the request on to the real S3."""
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        request = urllib.request.Request(self.storage.upstream + self.path, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, _kept(answer.headers), answer.read()
        except urllib.error.HTTPError as refusal:
            with refusal:
                return refusal.code, _kept(refusal.headers), refusal.read()


def _kept(headers: Any) -> dict[str, str]:
    dropped = {"connection", "transfer-encoding", "server", "date"}
    return {name: value for name, value in headers.items() if name.lower() not in dropped}
