"""A worker that fails every job, fast, must not eat the queue: it steps back, says why, and is well again by itself."""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from api_stub.client.client import Client
from api_stub.client.client import Job as JobHandle
from api_stub.errors import JobFailed
from tests.e2e.probes import probe, samples
from tests.processes import WorkerProcess
from tests.servers import RedisServer, S3Server, eventually, free_port
from tests.storage_faults import FaultyStorage, Status, faulty_storage

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

NUM_JOBS = 120
NUM_PICTURES = 24
SETTINGS: dict[str, object] = {
    "model": "demo", "lease_s": 6, "beat_s": 1, "grace_s": 2, "sweep_s": 0.2, "max_num_seqs": 8, "prepare_ahead": 4,
    "storage_retries": 1, "mute_s": 5, "media_cache_bytes": 0,
}  # fmt: skip


@pytest.fixture
def pictures(s3_client: S3Client) -> list[str]:
    """Objects of the bucket, each too large for a disk that takes `LOG_BYTES`."""
    rng = np.random.default_rng(1)
    for number in range(NUM_PICTURES):
        body = cv2.imencode(".png", rng.integers(0, 255, (420, 420, 3), np.uint8))[1].tobytes()
        assert len(body) > LOG_BYTES
        s3_client.put_object(Bucket="media", Key=f"hole/{number}.png", Body=body)
    return [f"s3://media/hole/{number}.png" for number in range(NUM_PICTURES)]


#: What a worker with a full disk may still write: its log.
LOG_BYTES = 500_000


@contextmanager
def worker_with_probes(
    directory: Path, redis_server: RedisServer, s3_url: str, **settings: object
) -> Iterator[tuple[WorkerProcess, int]]:
    port = free_port()
    worker = WorkerProcess(directory, redis_server.url, s3_url, **(SETTINGS | {"http_port": port} | settings))
    try:
        yield worker, port
    finally:
        worker.kill()


@pytest.fixture
def storage(s3_server: S3Server) -> Iterator[FaultyStorage]:
    with faulty_storage(s3_server.url) as proxy:
        yield proxy


def asked(client: Client, pictures: list[str], count: int) -> list[JobHandle]:
    return [
        client.vqa(pictures[number % len(pictures)], question=f"What is {number}?", max_new_tokens=2)
        for number in range(count)
    ]


def sick_of(port: int) -> list[str]:
    return [problem for problem in probe(port, "/readyz")[1].get("problems", []) if problem.startswith("sick of")]


@pytest.mark.parametrize("code", ["RequestTimeTooSkewed", "AccessDenied"])
def test_a_worker_that_storage_refuses_leaves_the_jobs_to_the_other(
    redis_url: str, redis_server: RedisServer, s3_server: S3Server, storage: FaultyStorage, tmp_path: Path,
    pictures: list[str], code: str,
) -> None:  # fmt: skip
    storage.always = Status(403, code)
    with (
        worker_with_probes(tmp_path, redis_server, storage.url) as (refused, port),
        worker_with_probes(tmp_path, redis_server, s3_server.url) as (served, other_port),
        Client(redis_url) as client,
    ):
        refused.wait_ready()
        served.wait_ready()
        jobs = asked(client, pictures, NUM_JOBS)
        eventually(lambda: sick_of(port), 60, "the refused worker is sick")
        assert code in sick_of(port)[0]
        assert probe(port, "/readyz")[0] == 503
        assert probe(port, "/healthz")[0] == 200, "a restart would not help"
        assert samples(port)["visionq_worker_sick{reason=storage}"] == 1
        results = [job.result(timeout=120) for job in jobs]
        assert len(results) == NUM_JOBS
        assert sick_of(other_port) == []
        assert refused.text().count('"worker is sick, no more jobs are claimed"') == 1
        time.sleep(float(str(SETTINGS["mute_s"])) + 3)  # the watchdog's own time: it must not take this for muteness
        assert refused.process.poll() is None

        storage.always = None
        served.process.send_signal(signal.SIGKILL)
        served.process.wait(20)
        results = [job.result(timeout=120) for job in asked(client, pictures, 20)]
        assert len(results) == 20
        eventually(lambda: probe(port, "/readyz")[0] == 200, 20, "ready again")
        assert samples(port)["visionq_worker_sick{reason=storage}"] == 0
        assert refused.text().count('"worker is well again"') == 1


def test_the_only_worker_keeps_jobs_waiting_while_storage_refuses_it(
    redis_url: str, redis_server: RedisServer, storage: FaultyStorage, tmp_path: Path, pictures: list[str]
) -> None:
    with worker_with_probes(tmp_path, redis_server, storage.url) as (worker, port), Client(redis_url) as client:
        worker.wait_ready()
        asked(client, pictures, 1)[0].result(timeout=60)
        storage.always = Status(403, "AccessDenied")
        jobs = asked(client, pictures, 40)
        eventually(lambda: sick_of(port), 60, "sick")
        until = time.monotonic() + 10
        while time.monotonic() < until:  # tries of single jobs, which all fail
            assert {job.status().status for job in jobs} <= {"queued", "in_progress"}
            time.sleep(0.5)
        storage.always = None
        assert len([job.result(timeout=120) for job in jobs]) == 40
        eventually(lambda: probe(port, "/readyz")[0] == 200, 20, "ready again")


def test_a_forbidden_object_is_told_soon_by_a_worker_that_has_read_nothing_yet(
    redis_url: str, redis_server: RedisServer, storage: FaultyStorage, tmp_path: Path, pictures: list[str]
) -> None:
    storage.always = Status(403, "AccessDenied")
    with worker_with_probes(tmp_path, redis_server, storage.url) as (worker, port), Client(redis_url) as client:
        worker.wait_ready()
        with pytest.raises(JobFailed) as caught:
            asked(client, pictures, 1)[0].result(timeout=30)
        assert caught.value.code == "media_forbidden"
        assert sick_of(port) == []


def test_a_worker_with_a_full_disk_leaves_the_jobs_to_the_other(
    redis_url: str, redis_server: RedisServer, s3_server: S3Server, tmp_path: Path, pictures: list[str]
) -> None:
    with (
        worker_with_probes(tmp_path, redis_server, s3_server.url) as (full, port),
        worker_with_probes(tmp_path, redis_server, s3_server.url) as (served, _),
        Client(redis_url) as client,
    ):
        full.wait_ready()
        served.wait_ready()
        _, most = resource.prlimit(full.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(full.process.pid, resource.RLIMIT_FSIZE, (LOG_BYTES, most))
        jobs = asked(client, pictures, NUM_JOBS)
        eventually(lambda: sick_of(port), 60, "sick")
        assert "disk" in sick_of(port)[0]
        assert len([job.result(timeout=120) for job in jobs]) == NUM_JOBS
        resource.prlimit(full.process.pid, resource.RLIMIT_FSIZE, (most, most))
        served.process.send_signal(signal.SIGKILL)
        served.process.wait(20)
        assert len([job.result(timeout=120) for job in asked(client, pictures, 10)]) == 10
        eventually(lambda: probe(port, "/readyz")[0] == 200, 20, "ready again")
