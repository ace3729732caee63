"""What Celery's producers may expect of a job beside its answer; docs/celery.md lists it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import Celery

from api_stub.client.client import Client
from api_stub.contract import names
from api_stub.contract.status import JobStatus
from tests.processes import WorkerProcess
from tests.servers import RedisServer

QUESTION = {"question": "hello", "sampling": {"max_new_tokens": 4}}

pytestmark = pytest.mark.usefixtures("demo_worker")


@pytest.fixture
def celery(redis_server: RedisServer) -> Iterator[Celery]:
    app = Celery(broker=redis_server.url, backend=redis_server.url, set_as_current=False)
    yield app
    app.close()


def test_a_revoked_job_is_served_all_the_same(celery: Celery, demo_worker: WorkerProcess) -> None:
    handle = celery.send_task("visionq.vqa", kwargs=QUESTION, queue="visionq.default")
    handle.revoke(terminate=True)
    assert handle.get(timeout=30)["text"]
    assert celery.control.ping(timeout=0.5) == []


def test_a_forgotten_result_is_gone_and_the_ledger_still_has_it(celery: Celery, redis_server: RedisServer) -> None:
    handle = celery.send_task("visionq.vqa", kwargs=QUESTION, queue="visionq.default")
    text = handle.get(timeout=30)["text"]
    handle.forget()
    assert celery.AsyncResult(handle.id).state == "PENDING"
    with Client(redis_server.url) as client:
        view = client.job(handle.id).status()
    assert view.status is JobStatus.COMPLETED
    assert view.result is not None
    assert view.result.text == text


def test_a_result_expires_as_the_worker_says(celery: Celery, redis_server: RedisServer) -> None:
    celery.conf.result_expires = 5
    handle = celery.send_task("visionq.vqa", kwargs=QUESTION, queue="visionq.default")
    handle.get(timeout=30)
    with redis_server.client() as raw:
        assert 86_000 < raw.ttl(names.result_key(handle.id)) <= 86_400
