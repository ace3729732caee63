"""A doorbell that a worker received and did not answer: another gets it, at once after SIGTERM, soon after SIGKILL.

A worker that is stopped (SIGSTOP) while it waits for messages receives the next one without knowing.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import redis

from api_stub.client.client import Client
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Claim
from api_stub.ledger.settings import LedgerConfig
from tests.processes import WorkerProcess
from tests.servers import RedisServer, S3Server, eventually
from tests.unit.api_stub.ledger_kit import doorbells_in

TRIES = 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def worker(server: RedisServer, s3_server: S3Server, tmp_path: Path) -> Iterator[WorkerProcess]:
    """Sweeps miss no doorbell for the length of a test."""
    worker = WorkerProcess(tmp_path, server.url, s3_server.url, model="demo", grace_s=600, drain_s=240)
    yield worker.wait_ready()
    worker.kill()


@pytest.fixture
def client(server: RedisServer) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


@pytest.fixture
def raw(server: RedisServer) -> Iterator[redis.Redis]:
    with server.client() as raw:
        yield raw


def received_by_a_stopped(worker: WorkerProcess, client: Client, raw: redis.Redis) -> str:
    """Stop the worker and have it receive a doorbell; return the job's id."""
    for _ in range(TRIES):
        worker.process.send_signal(signal.SIGSTOP)
        eventually(lambda: is_stopped(worker.process.pid), what="the worker is stopped")
        job = client.vqa(question="hello", max_new_tokens=1)
        if not doorbells_in(raw):
            return job.id
        worker.process.send_signal(signal.SIGCONT)  # it was between two questions for messages
        job.result(timeout=60)
    raise AssertionError("it waits for no message")


def is_stopped(pid: int) -> bool:
    """Whether each of its threads is."""
    threads = [path.read_text().rpartition(")")[2].split() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(state == "T" for state, *_ in threads)


def claim_elsewhere(server: RedisServer, raw: redis.Redis, job_id: str) -> None:
    """Take the job as another worker does."""
    assert doorbells_in(raw) == [job_id]
    with closing(Ledger.connect(server.url, LedgerConfig())) as ledger:
        claim = ledger.claim(job_id, "another worker")
    assert isinstance(claim, Claim)
    assert claim.attempt == 1


def test_a_worker_that_drains_has_the_ledger_ring_again_while_its_other_job_still_runs(
    server: RedisServer, worker: WorkerProcess, client: Client, raw: redis.Redis
) -> None:
    long = client.vqa(question="hello", min_new_tokens=1000, max_new_tokens=1000)
    next(long.stream(timeout=60))
    job_id = received_by_a_stopped(worker, client, raw)
    worker.process.send_signal(signal.SIGTERM)
    worker.process.send_signal(signal.SIGCONT)
    eventually(lambda: doorbells_in(raw), 60, "the doorbell is there again")
    assert long.status().status == "in_progress"
    claim_elsewhere(server, raw, job_id)
    assert raw.hlen("unacked") == 0


def test_a_doorbell_that_dies_with_its_worker_is_found(
    server: RedisServer, worker: WorkerProcess, client: Client, raw: redis.Redis
) -> None:
    job_id = received_by_a_stopped(worker, client, raw)
    worker.kill()
    with closing(Ledger.connect(server.url, LedgerConfig(grace_s=0.5))) as ledger:
        eventually(ledger.reap, 60, "a sweep rings")
    claim_elsewhere(server, raw, job_id)
    assert raw.hlen("unacked") == 0
