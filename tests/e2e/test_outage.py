"""Outages of Redis longer than a lease: the worker lives on, or ends because it was asked to."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

from api_stub.client.client import Client
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.settings import LedgerConfig
from tests.processes import WorkerProcess
from tests.servers import RedisServer, eventually

LEASE_S = 3.0


def test_an_outage_longer_than_the_lease_costs_no_job_a_life(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--appendfsync", "always")
    worker = WorkerProcess(
        tmp_path, server.url, "http://127.0.0.1:1", model="demo", lease_s=LEASE_S, beat_s=0.5, sweep_s=0.2,
        grace_s=1, max_attempts=1,
    )  # fmt: skip
    try:
        worker.wait_ready()
        with Client(server.url) as client:
            jobs = [
                client.vqa(question="hello", max_new_tokens=1900, min_new_tokens=1900, temperature=1.0, seed=seed)
                for seed in range(3)
            ]
            for job in jobs:
                next(job.stream(timeout=60))
            server.kill()
            until = time.monotonic() + LEASE_S + 2
            while time.monotonic() < until:  # the outage itself: nothing is waited for
                time.sleep(0.1)
            server.start()
            results = [job.result(timeout=120) for job in jobs]
        assert worker.process.poll() is None
        assert all(result.usage.completion_tokens == 1900 for result in results)
        assert all(result.attempt >= 2 for result in results), "the worker stopped what it could not prove to own"
    finally:
        worker.kill()
        server.stop()


def test_a_worker_whose_redis_does_not_come_back_ends_when_it_is_asked_to_and_loses_no_job(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--appendfsync", "always")
    worker = WorkerProcess(
        tmp_path, server.url, "http://127.0.0.1:1", model="demo", lease_s=LEASE_S, beat_s=0.5, drain_s=1
    )  # fmt: skip
    try:
        worker.wait_ready()
        with Client(server.url) as client:
            job = client.vqa(question="hello", max_new_tokens=1900, min_new_tokens=1900)
            next(job.stream(timeout=60))
        server.kill()
        assert worker.terminate(timeout_s=60) == 0
        assert worker.text().count('"outcome of a job not recorded"') == 1
        server.start()
        with closing(Ledger.connect(server.url, LedgerConfig(lease_s=LEASE_S))) as ledger:
            eventually(lambda: job.id in {bell.job_id for bell in ledger.reap()}, 60, "the job is rung again")
    finally:
        worker.kill()
        server.stop()
