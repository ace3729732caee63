"""`visionq api` as a process: it stops soon although readers are open; many idle readers cost little."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import redis

from api_stub.ledger.ledger import Ledger
from api_stub.ledger.settings import LedgerConfig
from tests.gateway.service import sent_events, text_of
from tests.gateway.test_jobs import QUESTION
from tests.servers import eventually, free_port
from tests.unit.api_stub.workers import ScriptedWorker

START_S = 60.0
STOP_S = 20.0
NUM_IDLE = 1000
MAX_IDLE_BYTES = 200 * 1024 * 1024
Start = Callable[..., "ApiProcess"]


class ApiProcess:
    """A gateway process."""

    def __init__(self, redis_url: str, port: int, log: Path, *arguments: str, **settings: str) -> None:
        self.url, self.port, self.log = f"http://127.0.0.1:{port}", port, log
        plain = {name: value for name, value in os.environ.items() if not name.startswith("VISIONQ_")}
        usual = {"VISIONQ_REDIS_URL": redis_url, "VISIONQ_API_MODELS": "default"}
        environment = plain | usual | {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1"} | settings
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    "from api_stub.cli.main import main; main()",
                    "api",
                    "--port",
                    str(port),
                    *arguments,
                ],
                env=environment,
                stderr=file,
            )

    def wait_ready(self) -> ApiProcess:
        eventually(lambda: self.process.poll() is not None or self._is_ready(), START_S, "the gateway is ready")
        assert self.process.poll() is None, self.log.read_text()
        return self

    def submit(self) -> str:
        job_id: str = httpx.post(f"{self.url}/v1/jobs", json=QUESTION, timeout=30).json()["job_id"]
        return job_id

    def rss_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@pytest.fixture
def start(redis_url: str, tmp_path: Path) -> Iterator[Start]:
    started: list[ApiProcess] = []

    def run(port: int | None = None, *arguments: str, **settings: str) -> ApiProcess:
        started.append(ApiProcess(redis_url, port or free_port(), tmp_path / "api.log", *arguments, **settings))
        return started[-1]

    yield run
    for api in started:
        api.process.kill()
        api.process.wait(STOP_S)


@pytest.fixture
def patient_worker(redis_url: str) -> Iterator[ScriptedWorker]:
    """A worker whose job nobody takes while a gateway starts."""
    ledger = Ledger.connect(redis_url, LedgerConfig(lease_s=600))
    yield ScriptedWorker(ledger)
    ledger.close()


def test_a_gateway_stops_soon_and_its_readers_go_on_at_the_next(start: Start, patient_worker: ScriptedWorker) -> None:
    worker = patient_worker
    first = start().wait_ready()
    job_id = first.submit()
    worker.take(job_id)
    worker.say("a ", "red ")
    with httpx.stream("GET", f"{first.url}/v1/jobs/{job_id}/events", timeout=30) as answer:
        lines = answer.iter_lines()
        events = [event for _, event in zip(range(4), sent_events(lines), strict=False)]
        begun = time.monotonic()
        first.process.terminate()
        assert list(sent_events(lines)) == []  # ended, not cut: httpx would raise
    assert first.process.wait(STOP_S) == 0
    assert time.monotonic() - begun < STOP_S
    assert "Traceback" not in first.log.read_text()

    second = start(first.port).wait_ready()
    headers = {"Last-Event-ID": events[-1].id}
    with httpx.stream("GET", f"{second.url}/v1/jobs/{job_id}/events", headers=headers, timeout=30) as answer:
        rest = sent_events(answer.iter_lines())
        worker.say("circle")
        worker.finish()
        assert text_of(events + list(rest)) == "a red circle"


def subscribers(client: redis.Redis) -> set[str]:
    """The connections that are subscribed to channels, by Redis' number of them."""
    return {connection["id"] for connection in client.client_list(_type="pubsub")}


def test_many_idle_readers_cost_little(start: Start, redis_client: redis.Redis) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    of_others = subscribers(redis_client)  # some may still be leaving
    api = start().wait_ready()
    job_ids = [api.submit() for _ in range(50)]
    readers = []
    try:
        for number in range(NUM_IDLE):
            readers.append(reader := socket.create_connection(("127.0.0.1", api.port), timeout=150))
            path = f"/v1/jobs/{job_ids[number % len(job_ids)]}/events"
            reader.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        for reader in readers:
            received = b""
            while b"job.queued" not in received:
                received += (piece := reader.recv(4096))
                assert piece, received
        assert api.rss_bytes() < MAX_IDLE_BYTES
        assert len(subscribers(redis_client) - of_others) == 1
    finally:
        for reader in readers:
            reader.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_keys_it_does_not_listen_to_other_machines(start: Start) -> None:
    api = start(None, "--host", "0.0.0.0")
    assert api.process.wait(START_S) == 2
    assert "VISIONQ_API_HOST" in api.log.read_text()


def test_a_lost_doorbell_is_rung_by_the_gateway(start: Start, redis_client: redis.Redis) -> None:
    api = start(VISIONQ_GRACE_S="0.2", VISIONQ_SWEEP_S="0.1").wait_ready()
    api.submit()
    queue = "visionq.default\x06\x166"
    assert redis_client.delete(queue) == 1
    eventually(lambda: redis_client.llen(queue) == 1, what="the doorbell is rung again")
