"""Somebody else's server: keeps what it is sent and answers as it is told, over HTTP or HTTPS."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(slots=True)
class Reply:
    """What the receiver answers to one request. `is_held`: not before `Receiver.release` is set."""

    status: int = 204
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_held: bool = False


@dataclass(frozen=True, slots=True)
class Received:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """A running server. Replies are used up in order; then everything is answered with 204."""

    def __init__(self, context: ssl.SSLContext | None, *replies: Reply) -> None:
        self.requests: list[Received] = []
        self.replies = list(replies)
        self.release = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._scheme = "http"
        if context is not None:
            self._scheme = "https"
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="receiver")
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def url(self, host: str = "127.0.0.1") -> str:
        return f"{self._scheme}://{host}:{self.port}/hook"

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._thread.join(20)
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in request.headers.items()}
        reply = self.replies.pop(0) if self.replies else Reply()
        self.requests.append(Received(request.path, headers, body))
        if reply.is_held:
            self.release.wait(60)
        try:
            request.send_response(reply.status)
            for name, value in reply.headers.items():
                request.send_header(name, value)
            if reply.status != 204:
                request.send_header("Content-Length", str(len(reply.body)))
            request.end_headers()
            request.wfile.write(reply.body)
        except OSError:
            pass  # the sender has hung up

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        answer = self._answer

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                answer(self)

            def do_GET(self) -> None:
                answer(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class' name
                pass

        return Handler


@contextmanager
def receiving(*replies: Reply, context: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    receiver = Receiver(context, *replies)
    try:
        yield receiver
    finally:
        receiver.close()
