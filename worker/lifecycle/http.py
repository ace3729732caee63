"""`/healthz`, `/readyz` and `/metrics` of one worker process, from before its model loads until after its drain.

Reads only, asks for nothing and says nothing secret. Bounded: a few connections at once, each for a few seconds.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
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
CONNECTION_S: Final = 5.0


class OperationsServer(ThreadingHTTPServer):
    """Answers probes and scrapers, each on a thread of its own. `port` 0 takes a free one."""

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, host: str, port: int, health: Health, metrics: Metrics) -> None:
        self.health, self.metrics = health, metrics
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        try:
            super().__init__((host, port), _Probe)
        except OSError as error:
            raise CannotStart(f"VISIONQ_HTTP_PORT: cannot listen on {host}:{port}: {error.strerror}") from error

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self.server_address[1])

    def start(self) -> None:
        """Answer from now on, as long as the process lives."""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.5}, name="http", daemon=True).start()
        logger.info("answering probes", extra={"action": "http", "host": self.server_name, "port": self.port})

    def server_bind(self) -> None:
        """Without HTTPServer's reverse look-up of the host's name, which may take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.port

    def process_request(self, request: object, client_address: object) -> None:
        """Turn connections away that are too many."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)  # type: ignore[arg-type]
        else:
            self.shutdown_request(request)  # type: ignore[arg-type]

    def process_request_thread(self, request: object, client_address: object) -> None:
        """Give the place back whatever happens."""
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._places.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""
        logger.debug("probe failed", extra={"action": "http"}, exc_info=True)


class _Probe(BaseHTTPRequestHandler):
    server: OperationsServer
    timeout = CONNECTION_S
    server_version, sys_version = "visionq-worker", ""

    def do_GET(self) -> None:
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
        """Probes come every few seconds; nobody reads about them."""
