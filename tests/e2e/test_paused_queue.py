"""A real worker before a paused queue, with a Redis that is killed meanwhile; and a purge beside it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery

from api_stub.client.client import Client
from api_stub.client.handle import JobHandle
from api_stub.contract.status import JobStatus
from api_stub.errors import UnknownJob
from tests.processes import WorkerProcess
from tests.servers import RedisServer, eventually

LONG = {"question": "hello", "max_new_tokens": 300, "min_new_tokens": 300}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    running = RedisServer(tmp_path, "--appendfsync", "always")
    yield running
    running.stop()


@pytest.fixture
def worker(tmp_path: Path, server: RedisServer) -> Iterator[WorkerProcess]:
    running = WorkerProcess(
        tmp_path, server.url, "http://127.0.0.1:1", model="demo", lease_s=3.0, beat_s=0.5, sweep_s=0.2, grace_s=1
    )
    yield running
    running.kill()


def statuses(jobs: list[JobHandle]) -> set[JobStatus]:
    return {job.status().status for job in jobs}


def is_known(job: JobHandle) -> bool:
    try:
        return job.status().status is JobStatus.QUEUED
    except UnknownJob:
        return False


def test_a_worker_takes_nothing_of_a_paused_queue_until_it_goes_on(worker: WorkerProcess, server: RedisServer) -> None:
    worker.wait_ready()
    with Client(server.url) as client:
        running = client.vqa(**LONG)  # type: ignore[arg-type]
        next(running.stream(timeout=60))
        client.pause("default")
        jobs = [client.vqa(question="hello", priority=number % 10) for number in range(30)]
        late = client.vqa(question="hello", deadline_s=1.0)
        plain = client.job(str(uuid.uuid4()))
        with Celery(broker=server.url) as celery:
            celery.send_task("visionq.vqa", kwargs={"question": "hello"}, queue="visionq.default", task_id=plain.id)
        assert running.result(timeout=120).usage.completion_tokens == 300
        eventually(lambda: late.status().status is JobStatus.EXPIRED, 60, "the deadline passes")
        eventually(lambda: is_known(plain), 60, "the plain message is adopted")
        server.kill()
        server.start()
        eventually(lambda: jobs[0].status().num_workers == 1, 60, "the worker is back")
        assert statuses([*jobs, plain]) == {JobStatus.QUEUED}
        assert "is paused" in (jobs[0].status().warnings or ("",))[0]
        client.resume("default")
        results = [job.result(timeout=120) for job in (*jobs, plain)]
    assert {result.attempt for result in results} == {1}
    assert worker.process.poll() is None


def test_a_purge_beside_a_worker_ends_all_that_waits(worker: WorkerProcess, server: RedisServer) -> None:
    worker.wait_ready()
    with Client(server.url) as client:
        running = client.vqa(**LONG)  # type: ignore[arg-type]
        next(running.stream(timeout=60))
        jobs = [client.vqa(question="hello", tenant=f"tenant-{number % 5}") for number in range(500)]
        num_ended = client.purge("default")
        ended = statuses(jobs)
        assert JobStatus.QUEUED not in ended
        assert num_ended > 0
        cancelled = [job for job in jobs if job.status().status is JobStatus.CANCELLED]
        assert len(cancelled) == num_ended
        assert running.result(timeout=120).usage.completion_tokens == 300
        assert client.vqa(question="hello").result(timeout=120).attempt == 1
