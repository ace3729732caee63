"""Workers that several end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.processes import WorkerProcess, start_workers
from tests.servers import RedisServer, S3Server
from tests.unit.worker.conftest import one_thread

__all__ = ["one_thread"]  # for the references: two threads that lack a core wait for each other at every matrix


@pytest.fixture(scope="module")
def demo_worker(
    tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer, s3_server: S3Server
) -> Iterator[WorkerProcess]:
    """A worker with the shipped model on the queue `visionq.default`."""
    directory = tmp_path_factory.mktemp("worker")
    worker = start_workers(1, directory, redis_server, s3_server, model="demo", lease_s=6, beat_s=1, grace_s=2)[0]
    yield worker
    worker.kill()
