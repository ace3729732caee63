"""The server of probes answers them, whoever else holds connections open."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.e2e.probes import probe
from tests.servers import eventually
from worker.lifecycle import probes
from worker.lifecycle.health import Health
from worker.lifecycle.probes import MAX_CONNECTIONS, OperationsServer
from worker.observability.metrics import Metrics


@pytest.fixture
def server() -> Iterator[OperationsServer]:
    server = OperationsServer("127.0.0.1", 0, Health(5.0), Metrics("default"))
    server.start()
    yield server
    server.shutdown()
    server.server_close()


def connected(server: OperationsServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def test_silent_connections_do_not_keep_a_probe_waiting(
    server: OperationsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "CONNECTION_S", 60.0)
    with ExitStack() as opened:
        first = opened.enter_context(connected(server))
        for _ in range(3 * MAX_CONNECTIONS):
            opened.enter_context(connected(server))
        assert [probe(server.port, "/healthz")[0] for _ in range(5)] == [200] * 5
        assert first.recv(1) == b"", "the oldest made room"


def test_a_connection_that_never_ends_its_question_is_ended(
    server: OperationsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(server) as slow, monkeypatch.context() as patched:

        def is_over() -> bool:
            time.sleep(0.05)  # the drip itself: nothing is waited for
            try:
                slow.sendall(b"x")
            except OSError:
                return True
            return False

        patched.setattr(probes, "CONNECTION_S", 0.5)
        slow.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
        eventually(is_over, 30, "the server has had enough")
    assert probe(server.port, "/healthz")[0] == 200
