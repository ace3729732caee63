"""Messages that are not well made: each costs itself, is answered where it has an id, and the next job is served."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery

from api_stub.client.client import Client
from api_stub.contract import names
from api_stub.errors import JobFailed
from tests.processes import WorkerProcess
from tests.servers import RedisServer, eventually

QUESTION = {"question": "hello", "sampling": {"max_new_tokens": 4}}
EMBED: dict[str, Any] = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
WELL_MADE = json.dumps([[], QUESTION, EMBED])


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[Client]:
    with Client(redis_server.url) as client:
        yield client


@pytest.fixture
def celery(redis_server: RedisServer) -> Iterator[Celery]:
    app = Celery(broker=redis_server.url, backend=redis_server.url, set_as_current=False)
    yield app
    app.close()


def envelope(job_id: str, body: bytes, headers: dict[str, Any], properties: dict[str, Any], content_type: str) -> str:
    """A list entry as kombu writes it, with whatever a case wants changed."""
    return json.dumps(
        {
            "body": base64.b64encode(body).decode(),
            "content-encoding": "utf-8",
            "content-type": content_type,
            "headers": {"task": "visionq.vqa", "id": job_id, "lang": "py", "timelimit": [None, None]} | headers,
            "properties": {
                "correlation_id": job_id,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": "visionq.default"},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            }
            | properties,
        }
    )


def push(server: RedisServer, entry: str) -> None:
    with server.client() as raw:
        raw.lpush(names.queue("default"), entry)


FAILING = {
    "body is no triple": (b'["x"]', "application/json"),
    "body is no JSON": (b"\x00\xff{", "application/json"),
    "body is a pickle": (b"x", "application/x-python-serialize"),
    "kwargs is null": (b"[[], null, {}]", "application/json"),
    "kwargs is a list": (b"[[], [1], {}]", "application/json"),
    "args is null": (b"[null, {}, {}]", "application/json"),
    "half a character": (b'[[], {"question": "a\\ud800"}, {}]', "application/json"),
    "a field named self": (b'[[], {"question": "hello", "self": 1}, {}]', "application/json"),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_message_that_is_no_job_fails_as_invalid_request(
    case: str, demo_worker: WorkerProcess, redis_server: RedisServer, celery: Celery, client: Client
) -> None:
    body, content_type = FAILING[case]
    job_id = str(uuid.uuid4())
    push(redis_server, envelope(job_id, body, {}, {}, content_type))
    with pytest.raises(JobFailed) as failure:
        celery.AsyncResult(job_id).get(timeout=30)
    assert failure.value.code == "invalid_request"
    assert client.vqa(question="hello").result(timeout=30).text


SERVED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "time limit is a word": ({"timelimit": "x"}, {}),
    "time limit is over": ({"timelimit": [0.001, 0.001]}, {}),
    "eta is garbage": ({"eta": "garbage"}, {}),
    "expires is garbage": ({"expires": "garbage"}, {}),
    "retries is null": ({"retries": None}, {}),
    "priority is a word": ({}, {"priority": "high"}),
}


@pytest.mark.parametrize("case", SERVED)
def test_odd_headers_of_a_good_job_have_no_effect(
    case: str, demo_worker: WorkerProcess, redis_server: RedisServer, celery: Celery
) -> None:
    headers, properties = SERVED[case]
    job_id = str(uuid.uuid4())
    push(redis_server, envelope(job_id, WELL_MADE.encode(), headers, properties, "application/json"))
    assert celery.AsyncResult(job_id).get(timeout=30)["text"]


DROPPED = {
    "an entry that is no JSON": "garbage",
    "an entry without anything": "{}",
    "an entry that is a list": "[1, 2]",
    "an id that is null": envelope("x", WELL_MADE.encode(), {"id": None}, {}, "application/json"),
    "an id with half a character": envelope("x", WELL_MADE.encode(), {"id": "a\ud800"}, {}, "application/json"),
    "an unknown task without an id": envelope(
        "", b'[[], {"secret": "hunter2"}, {}]', {"task": "no.such"}, {}, "application/json"
    ),
}


@pytest.mark.parametrize("case", DROPPED)
def test_what_nobody_can_be_answered_for_is_dropped_without_a_word_of_it_in_the_log(
    case: str, demo_worker: WorkerProcess, redis_server: RedisServer, client: Client
) -> None:
    with redis_server.client() as raw:
        before = raw.hkeys("unacked")  # workers that other tests killed leave some
        push(redis_server, DROPPED[case])
        assert client.vqa(question="hello").result(timeout=30).text
        assert demo_worker.process.poll() is None
        eventually(lambda: set(raw.hkeys("unacked")) <= set(before), 10, "nothing more stays unacknowledged")
    assert "hunter2" not in demo_worker.text()


def test_eta_and_expires_of_a_plain_job_have_no_effect(demo_worker: WorkerProcess, celery: Celery) -> None:
    past = datetime.now(UTC) - timedelta(hours=1)
    for options in ({"expires": past}, {"countdown": 600}):
        handle = celery.send_task("visionq.vqa", kwargs=QUESTION, queue="visionq.default", **options)
        assert handle.get(timeout=30)["text"]


def test_a_message_of_protocol_1_is_served(demo_worker: WorkerProcess, redis_server: RedisServer) -> None:
    app = Celery(broker=redis_server.url, backend=redis_server.url, set_as_current=False)
    app.conf.task_protocol = 1
    assert app.send_task("visionq.vqa", kwargs=QUESTION, queue="visionq.default").get(timeout=30)["text"]
    app.close()
