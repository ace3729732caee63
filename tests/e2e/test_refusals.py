"""A Redis that answers and refuses writes for a moment: full, demoted to a replica, short of replicas."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import redis

from api_stub.client.client import Client
from api_stub.contract import names
from tests.processes import WorkerProcess
from tests.servers import RedisServer, eventually

REFUSED_S = 2.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("refusing"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, server: RedisServer) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(
        tmp_path_factory.mktemp("worker"),
        server.url,
        "http://127.0.0.1:1",
        model="demo",
        lease_s=6,
        beat_s=1,
        grace_s=1,
    )
    yield worker.wait_ready()
    worker.kill()


@contextmanager
def refusing(direct: redis.Redis, reason: str) -> Iterator[None]:
    """Have Redis refuse all writes while the block lasts."""
    setting = "maxmemory" if reason == "full" else "min-replicas-to-write"
    if reason == "read-only":
        direct.replicaof("127.0.0.1", 1)  # as after a failover: it keeps its data
    else:
        direct.config_set(setting, 1)
    try:
        yield
    finally:
        if reason == "read-only":
            direct.replicaof("NO", "ONE")
        else:
            direct.config_set(setting, 0)


@pytest.mark.parametrize("reason", ["full", "read-only", "short of replicas"])
def test_a_worker_outlives_a_redis_that_refuses_writes(server: RedisServer, worker: WorkerProcess, reason: str) -> None:
    with Client(server.url) as client, server.client() as direct:
        long = client.vqa(question="hello", min_new_tokens=1500, max_new_tokens=1500)
        next(long.stream(timeout=60))
        short = [client.vqa(question=f"hello {number}", max_new_tokens=20) for number in range(5)]
        with refusing(direct, reason):
            with pytest.raises(redis.ResponseError):
                direct.set("anything", 1)
            until = time.monotonic() + REFUSED_S
            while time.monotonic() < until:  # the refusal itself: nothing is waited for
                time.sleep(0.1)
        assert all(job.result(timeout=60) for job in short)
        assert long.result(timeout=60).usage.completion_tokens == 1500
        assert client.vqa(question="afterwards").result(timeout=60)
        eventually(lambda: direct.llen(names.queue_list("default", 6)) == 0, what="the queue is empty")
    assert worker.process.poll() is None, worker.text()[-3000:]
