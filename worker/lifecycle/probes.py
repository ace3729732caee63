"""`/healthz`, `/readyz` and `/metrics` of one worker process, from before its model loads until after its drain.

Read-only, without authentication, and no response holds a secret. Bounded: `MAX_CONNECTIONS` at once, each for
`CONNECTION_S`; when there are more, the oldest connection that has sent no request is closed.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final
from urllib.parse import urlsplit

from prometheus_client.exposition import choose_encoder

from worker.errors import CannotStart
from worker.lifecycle.health import Health, Report
from worker.observability.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 16
MAX_BACKLOG: Final = 128  # connections that the kernel queues until they are accepted
CONNECTION_S: Final = 5.0


class _Connections:
    """The open connections, oldest first. A socket is closed only after `remove`. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened_at: dict[socket.socket, float] = {}
        self._answered: set[socket.socket] = set()

    def admit(self, connection: socket.socket) -> bool:
        """Add a connection, if need be in place of the oldest without a request; False when all have sent theirs."""
        with self._lock:
            if len(self._opened_at) >= MAX_CONNECTIONS:
                oldest = next((each for each in self._opened_at if each not in self._answered), None)
                if oldest is None:
                    return False
                self._end(oldest)
            self._opened_at[connection] = time.monotonic()
            return True

    def answer(self, connection: socket.socket) -> None:
        """Note that a connection has sent its request: from now on only its time limit ends it."""
        with self._lock:
            self._answered.add(connection)

    def remove(self, connection: socket.socket) -> None:
        """Forget a connection that is about to be closed."""
        with self._lock:
            self._opened_at.pop(connection, None)
            self._answered.discard(connection)

    def end_late(self) -> None:
        """End the connections that are over their time limit."""
        with self._lock:
            latest = time.monotonic() - CONNECTION_S
            for connection in [each for each, opened_at in self._opened_at.items() if opened_at < latest]:
                self._end(connection)

    def _end(self, connection: socket.socket) -> None:
        """Shut a socket down: its thread wakes up and closes it."""
        del self._opened_at[connection]
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


class OperationsServer(ThreadingHTTPServer):
    """Answers probes and scrapers, each on a thread of its own. `port` 0 binds a free one."""

    daemon_threads = True
    request_queue_size = MAX_BACKLOG

    def __init__(self, host: str, port: int, health: Health, metrics: Metrics) -> None:
        self.health, self.metrics = health, metrics
        self.connections = _Connections()
        try:
            super().__init__((host, port), _Probe)
        except OSError as error:
            raise CannotStart(f"VISIONQ_HTTP_PORT: cannot listen on {host}:{port}: {error.strerror}") from error

    @property
    def port(self) -> int:
        """The port that the server listens on."""
        return int(self.server_address[1])

    def start(self) -> None:
        """Serve on a daemon thread until the process ends."""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.5}, name="http", daemon=True).start()
        logger.info("answering probes", extra={"action": "http", "host": self.server_name, "port": self.port})

    def server_bind(self) -> None:
        """Bind without HTTPServer's reverse DNS look-up of the host, which may take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.port

    def process_request(self, request: object, client_address: object) -> None:
        """Serve a connection, or close it when there are too many."""
        assert isinstance(request, socket.socket)
        if self.connections.admit(request):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def shutdown_request(self, request: object) -> None:
        """Forget the connection, then close it."""
        assert isinstance(request, socket.socket)
        self.connections.remove(request)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called by serve_forever after each connection and twice a second."""
        self.connections.end_late()

    def handle_error(self, request: object, client_address: object) -> None:
        """Log a failed response (usually a client that disconnected) for debugging only."""
        logger.debug("probe failed", extra={"action": "http"}, exc_info=True)


class _Probe(BaseHTTPRequestHandler):
    server: OperationsServer
    timeout = CONNECTION_S
    server_version, sys_version = "visionq-worker", ""

    def do_GET(self) -> None:
        self.server.connections.answer(self.connection)
        match urlsplit(self.path).path:
            case "/healthz":
                self._report(self.server.health.liveness())
            case "/readyz":
                self._report(self.server.health.readiness())
            case "/metrics":
                encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                self._answer(HTTPStatus.OK, content_type, encode(self.server.metrics.registry))
            case _:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"/healthz, /readyz or /metrics\n")

    do_HEAD = do_GET  # noqa: N815 - the names are http.server's

    def _report(self, report: Report) -> None:
        status = HTTPStatus.OK if report.is_good else HTTPStatus.SERVICE_UNAVAILABLE
        self._answer(status, "application/json", json.dumps(report.to_dict()).encode() + b"\n")

    def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is http.server's
        """Log no requests: probes come every few seconds."""
