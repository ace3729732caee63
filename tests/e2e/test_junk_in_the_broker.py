"""Anything in the broker's lists and hashes: it costs itself, and the worker goes on and answers everybody else."""

from __future__ import annotations

import bz2
import json
import lzma
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import redis
from celery import Celery

from api_stub.client.client import Client
from api_stub.contract import names
from api_stub.errors import JobFailed
from tests.fuzz_entries import QUEUE, dropped, good, live, message
from tests.processes import WorkerProcess
from tests.servers import RedisServer, S3Server, eventually, free_port

WELL_MADE = json.dumps([[], {"question": "hello", "sampling": {"max_new_tokens": 1}}, {}]).encode()
DEEP = '{"a":' * 700 + "1" + "}" * 700


@dataclass
class Served:
    """A worker on a Redis of its own."""

    redis: RedisServer
    worker: WorkerProcess
    port: int


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[Served]:
    folder, port = tmp_path_factory.mktemp("junk"), free_port()
    server = RedisServer(folder)
    worker = WorkerProcess(
        folder, server.url, s3_server.url, model="demo", http_port=port, lease_s=6, beat_s=1, grace_s=2
    )
    yield Served(server, worker.wait_ready(), port)
    worker.kill()
    server.stop()


@pytest.fixture
def raw(served: Served) -> Iterator[redis.Redis]:
    with served.redis.client() as client:
        yield client


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.redis.url) as client:
        yield client


@pytest.fixture
def celery(served: Served) -> Iterator[Celery]:
    app = Celery(broker=served.redis.url, backend=served.redis.url, set_as_current=False)
    yield app
    app.close()


REFUSED: dict[str, tuple[dict[str, Any], bytes, str]] = {
    "unknown task": ({"task": "no.such"}, WELL_MADE, "task: 'no.such'"),
    "a task of Celery's own": ({"task": "celery.map"}, WELL_MADE, "task: 'celery.map'"),
    "task is an object": ({"task": {}}, WELL_MADE, "task: "),
    "unknown compression": ({"compression": "rot13"}, WELL_MADE, "compression: 'rot13'"),
    "compression of an odd type": ({"compression": {"a": 1}}, WELL_MADE, "compression: "),
    "not what it is said to be": ({"compression": "gzip"}, WELL_MADE, "compression: the body is no gzip"),
    "bomb, gzip": ({"compression": "gzip"}, zlib.compress(bytes(300_000_000)), "compression: the body inflates"),
    "bomb, bzip2": ({"compression": "bzip2"}, bz2.compress(bytes(300_000_000)), "compression: the body inflates"),
    "bomb, xz": ({"compression": "xz"}, lzma.compress(bytes(300_000_000), preset=0), "compression: the body inflates"),
    "nested 700 deep": ({}, b'[[], {"question": "x", "metadata": ' + DEEP.encode() + b"}, {}]", "metadata: nested 700"),
    "nested 100 000 deep": ({}, b"[" * 100_000, "job: "),
    "NaN": ({}, b'[[], {"question": "x", "deadline_s": NaN}, {}]', "deadline_s: "),
    "more digits than Python reads": ({}, b'[[], {"priority": ' + b"9" * 5_000 + b"}, {}]", "job: "),
    "a type of kombu's": ({}, b'[[], {"question": {"__type__": "decimal", "__value__": "x"}}, {}]', "question: "),
    "link": ({}, WELL_MADE[:-3] + b'{"callbacks": [{"task": {}}]}]', "link: "),
    "10 MB": ({}, b" " * 10_000_000, "job: 13"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_an_id_and_is_no_job_fails_as_invalid_request_by_name_in_result_and_events(
    case: str, raw: redis.Redis, celery: Celery, client: Client
) -> None:
    headers, body, said = REFUSED[case]
    job_id = str(uuid.uuid4())
    raw.lpush(QUEUE, message(job_id, body, headers=headers))
    with pytest.raises(JobFailed) as failure:
        celery.AsyncResult(job_id).get(timeout=30)
    assert failure.value.code == "invalid_request"
    assert failure.value.message.startswith(said)
    assert [event.type for event in client.job(job_id).events(timeout=10)][-1] == "job.failed"


@pytest.mark.parametrize("method", ["gzip", "bzip2", "lzma"])
def test_a_compressed_job_is_served(method: str, celery: Celery) -> None:
    handle = celery.send_task("visionq.vqa", kwargs={"question": "hello"}, queue=QUEUE, compression=method)
    assert handle.get(timeout=30)["text"]


DROPPED: dict[str, tuple[bytes, str]] = {
    "a value that kombu makes a decimal of": (b'{"__type__":"decimal","__value__":"x"}', "no_id"),
    "lists without end": (b"[" * 100_000, "unreadable"),
    "no UTF-8": (b"\xff\xfe", "unreadable"),
    "nothing": (b"", "unreadable"),
    "an id with a new line": (message("a\nb", WELL_MADE), "no_id"),
    "an id of 300 characters": (message("a" * 300, WELL_MADE), "no_id"),
    "protocol 1 without an id": (message("", b'{"task": "visionq.vqa", "kwargs": {}}', task=None), "no_id"),
}


@pytest.mark.parametrize("step", names.PRIORITY_STEPS)
@pytest.mark.parametrize("case", DROPPED)
def test_what_has_no_id_is_counted(case: str, step: int, served: Served, raw: redis.Redis) -> None:
    entry, reason = DROPPED[case]
    before = dropped(served.port)
    raw.lpush(names.queue_list("default", step), entry)
    eventually(lambda: dropped(served.port) - before == Counter({reason: 1}), 20, "counted once")
    assert served.worker.process.poll() is None


def test_a_second_job_under_a_taken_id_is_counted_and_the_first_answer_stays(
    served: Served, raw: redis.Redis, celery: Celery
) -> None:
    job_id = str(uuid.uuid4())
    raw.lpush(QUEUE, good(job_id))
    text = celery.AsyncResult(job_id).get(timeout=30)["text"]
    before = dropped(served.port)
    raw.lpush(QUEUE, message(job_id, b'[[], {"question": "another"}, {}]'))
    eventually(lambda: dropped(served.port) - before == Counter({"id_taken": 1}), 20, "counted")
    assert celery.AsyncResult(job_id).get(timeout=5)["text"] == text


def test_one_unreadable_copy_of_a_held_message_keeps_nobody_else_s_from_being_restored(
    served: Served, raw: redis.Redis, celery: Celery
) -> None:
    job_ids = [str(uuid.uuid4()) for _ in range(3)]
    before = dropped(served.port)
    junk = [b"garbage", b"[" * 100_000, b"[1, 2, 3]", b'[{"__type__":"decimal","__value__":"x"}, "", "q"]', b"{}"]
    held = [json.dumps([json.loads(good(job_id)), "", QUEUE]).encode() for job_id in job_ids]
    with redis.Redis.from_url(served.redis.url) as client:
        for index, copy in enumerate(item for pair in zip(junk, held, strict=False) for item in pair):
            client.hset("unacked", f"lost-{index}", copy)
            client.zadd("unacked_index", {f"lost-{index}": 1_000 + index})
    for job_id in job_ids:
        assert celery.AsyncResult(job_id).get(timeout=40)["text"]
    eventually(lambda: dropped(served.port) - before == Counter({"unacked_unreadable": 3}), 20, "counted")
    eventually(lambda: not raw.hlen("unacked") and not raw.zcard("unacked_index"), 20, "nothing is left")


@pytest.mark.parametrize("key", ["unacked", "unacked_index"])
def test_a_key_of_the_wrong_type_where_held_messages_are_noted_stops_no_job(
    key: str, served: Served, raw: redis.Redis, celery: Celery
) -> None:
    eventually(lambda: not raw.exists(key), 20, "nothing is held")
    raw.set(key, "no such thing")
    for _ in range(5):
        job_id = str(uuid.uuid4())
        raw.lpush(QUEUE, good(job_id))
        assert celery.AsyncResult(job_id).get(timeout=30)["text"]
    raw.delete(key)
    assert "unacknowledged message not stored in Redis" in served.worker.text()
    assert served.worker.process.poll() is None


def test_a_list_of_the_wrong_type_is_told_and_survived(served: Served, raw: redis.Redis, celery: Celery) -> None:
    eventually(lambda: not raw.exists(QUEUE), 20, "the list is empty")
    raw.set(QUEUE, "no list")
    eventually(lambda: "WRONGTYPE" in served.worker.text(), 20, "the worker says so")
    time.sleep(2)
    raw.delete(QUEUE)
    job_id = str(uuid.uuid4())
    raw.lpush(QUEUE, good(job_id))
    assert celery.AsyncResult(job_id).get(timeout=30)["text"]
    assert served.worker.process.poll() is None


def test_an_entry_of_300_mb_costs_itself(served: Served, raw: redis.Redis, celery: Celery) -> None:
    entry = json.dumps(
        {"body": "x" * 300_000_000, "headers": {"task": "visionq.vqa", "id": (job_id := str(uuid.uuid4()))}}
    )
    with redis.Redis.from_url(served.redis.url, socket_timeout=60) as client:
        client.lpush(QUEUE, entry)
    with pytest.raises(JobFailed, match="bytes in the message"):
        celery.AsyncResult(job_id).get(timeout=60)


def test_a_bomb_holds_up_no_good_job(served: Served, raw: redis.Redis, celery: Celery) -> None:
    packed = zlib.compress(bytes(1_000_000_000))
    for _ in range(5):
        raw.lpush(QUEUE, message(str(uuid.uuid4()), packed, headers={"compression": "gzip"}))
    job_id = str(uuid.uuid4())
    raw.lpush(QUEUE, good(job_id))
    assert celery.AsyncResult(job_id).get(timeout=30)["text"]


def test_a_thousand_odd_entries_cost_themselves_and_every_good_job_is_answered(served: Served) -> None:
    found = live(served.redis, served.worker, served.port, 1_000, seed=1)
    assert found["good"] == 50
    assert found["failed"] > 500
