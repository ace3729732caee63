"""An outage of Redis longer than a lease, with the worker alive throughout."""

from __future__ import annotations

import time
from pathlib import Path

from api_stub.client import Client
from tests.processes import WorkerProcess
from tests.servers import RedisServer

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
