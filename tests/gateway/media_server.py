"""A foreign web server with pictures, and with all that goes wrong on foreign web servers; over HTTP or HTTPS."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PNG = b"\x89PNG\r\n\x1a\n not really"
MP4 = b"\x00\x00\x00\x18ftypmp42 not really"
PIECE = b"x" * 65_536
CRUMBS = bytes(range(250)) * 20
LIMIT_BYTES = 256 * 1024
Page = Callable[[BaseHTTPRequestHandler], None]


def page(body: bytes, content_type: str | None = "image/png", status: int = 200, **headers: str) -> Page:
    """A page; `headers` with `_` for `-` win over the usual ones."""

    def send(request: BaseHTTPRequestHandler) -> None:
        usual = {"Content-Length": str(len(body))} | ({"Content-Type": content_type} if content_type else {})
        request.send_response(status)
        for name, value in (usual | {name.replace("_", "-"): value for name, value in headers.items()}).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    return send


def endless(request: BaseHTTPRequestHandler) -> None:
    """A body without an announced length and without an end."""
    _begin(request)
    while True:
        request.wfile.write(PIECE)


def dripping(request: BaseHTTPRequestHandler) -> None:
    """A byte now and then, never silent for long, for a minute."""
    _begin(request)
    for _ in range(600):
        request.wfile.write(b"x")
        request.connection.settimeout(0.1)
        with suppress(TimeoutError):
            if not request.connection.recv(1):
                return


def crumbling(request: BaseHTTPRequestHandler) -> None:
    """CRUMBS in chunks of one byte, then a PIECE in one."""
    chunks = [b"1\r\n%c\r\n" % byte for byte in CRUMBS]
    chunks += [b"%x\r\n%b\r\n" % (len(PIECE), PIECE), b"0\r\n\r\n"]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
    request.wfile.write(head + b"".join(chunks))


def silent(request: BaseHTTPRequestHandler) -> None:
    """No answer, until the client hangs up."""
    request.rfile.read(1)


def not_http(request: BaseHTTPRequestHandler) -> None:
    """Something that is no HTTP."""
    request.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")


def _begin(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.send_header("Content-Type", "image/png")
    request.end_headers()


PAGES: dict[str, Page] = {
    "/scene.png": page(PNG),
    "/scene.png?size=1": page(PNG + b"1"),
    "/clip.mp4": page(MP4, "video/mp4"),
    "/untold": page(PNG, None),
    "/stream": page(PNG, "application/octet-stream"),
    "/missing": page(b"no", "text/plain", 404),
    "/broken": page(b"no", "text/plain", 500),
    "/partial": page(PNG, status=206),
    "/moved": page(b"", None, 302, Location="/scene.png"),
    "/login": page(b"<html>", "text/html; charset=utf-8"),
    "/zipped": page(PNG, Content_Encoding="gzip"),
    "/empty": page(b""),
    "/short": page(PNG, Content_Length=str(len(PNG) + 100)),
    "/announced": page(b"", Content_Length=str(LIMIT_BYTES + 1)),
    "/half": page(b"x" * (LIMIT_BYTES // 2 + 1)),
    "/endless": endless,
    "/dripping": dripping,
    "/crumbling": crumbling,
    "/silent": silent,
    "/not-http": not_http,
}


class MediaServer:
    """A running server. `asked`: path and headers of every request; `num_open`: requests that are not done with."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.num_open = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="media-server")
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def url(self, path: str, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join(20)
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked.append((request.path, {name.lower(): value for name, value in request.headers.items()}))
        self._count(1)
        try:
            with suppress(OSError):  # the client has hung up
                PAGES[request.path](request)
        finally:
            self._count(-1)

    def _count(self, num: int) -> None:
        with self._lock:
            self.num_open += num

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        answer = self._answer

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)
                self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class' name
                pass

        return Handler


@contextmanager
def media_server(context: ssl.SSLContext | None = None) -> Iterator[MediaServer]:
    server = MediaServer(context)
    try:
        yield server
    finally:
        server.close()
