"""With VISIONQ_CELERY_EVENTS a worker tells Celery's task events, which Flower lives on; else heartbeats alone."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import redis

from api_stub.client.client import Client
from tests.processes import WorkerProcess
from tests.servers import S3Server, eventually


@pytest.mark.parametrize("is_on", [True, False])
def test_task_events_are_sent_when_asked_for(
    tmp_path: Path, redis_url: str, redis_client: redis.Redis, s3_server: S3Server, is_on: bool
) -> None:
    s3_server.client()
    worker = WorkerProcess(tmp_path, redis_url, s3_server.url, celery_events=is_on).wait_ready()
    try:
        with redis_client.pubsub() as heard, Client(redis_url) as client:
            heard.psubscribe("*celeryev*")
            assert client.vqa(question="hello", max_new_tokens=4).result(timeout=60).text
            if is_on:
                eventually(lambda: "task-received" in _events(heard), what="the task is told")
            else:
                # A worker that tells of tasks has told of the first before it tells that it lives.
                found: set[str] = set()
                eventually(lambda: found.update(_events(heard)) or found, what="the worker lives")
                assert found == {"worker-heartbeat"}
    finally:
        worker.kill()


def _events(subscription: redis.client.PubSub) -> set[str]:
    """Types of the events that have come since the last look."""
    found: set[str] = set()
    while (message := subscription.get_message(timeout=0.2)) is not None:
        if message["type"] == "pmessage":
            body = json.loads(base64.b64decode(json.loads(message["data"])["body"]))
            found |= {event["type"] for event in (body if isinstance(body, list) else [body])}
    return found
