"""Files and batches through OpenAI's own package: every line answered once, whatever happens to the gateway."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
import redis
import redis.asyncio
from openai.types import Batch

from api_stub.gateway.keys import ANYBODY, digest_of, new_key
from api_stub.gateway.openai import files
from api_stub.gateway.openai.batches import lines, runner
from api_stub.gateway.openai.batches.store import (
    BATCH_PREFIX,
    BatchRequest,
    BatchStore,
    Lease,
    LeaseLost,
)
from tests.gateway.openai_stack import eager_worker, openai_client
from tests.gateway.service import Service, serving
from tests.gateway.test_api_docs import check
from tests.gateway.test_process import ApiProcess
from tests.servers import RedisServer, S3Server, eventually, free_port
from tests.unit.api_stub.workers import ScriptedWorker

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

NUM_LINES = 800
WAIT_S = 240.0
FINAL = {"completed", "failed", "expired", "cancelled"}
KEYS = {name: new_key() for name in ("alice", "bob", "small")}
OPTIONS = {"small": "in_flight=2 models=default"}
ENTRIES = "; ".join(f"{name}:{digest_of(key)} {OPTIONS.get(name, '')}" for name, key in KEYS.items())


@pytest.fixture
def client(service: Service, s3_client: S3Client) -> Iterator[openai.OpenAI]:
    with openai_client(service.url) as opened:
        yield opened


@pytest.fixture
def served(worker: ScriptedWorker) -> ScriptedWorker:
    """A worker that is known to serve `default`."""
    worker.ledger.beat("scripted@test:1", "default", [])
    return worker


def line(name: str, text: str, **fields: object) -> bytes:
    body = {"model": "default", "messages": [{"role": "user", "content": text}]} | fields
    asked = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(asked).encode() + b"\n"


def start(client: openai.OpenAI, content: bytes, window: Any = "24h", **options: Any) -> Batch:
    file = client.files.create(file=("input.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window=window, **options
    )


def finished(client: openai.OpenAI, batch: Batch, timeout_s: float = WAIT_S) -> Batch:
    found = [batch]

    def look() -> bool:
        found[0] = client.batches.retrieve(batch.id)
        return found[0].status in FINAL

    eventually(look, timeout_s, "the batch ends")
    return found[0]


def read(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(row) for row in client.files.content(file_id).text.splitlines()]


def test_a_batch_is_answered_line_by_line(
    client: openai.OpenAI, redis_client: redis.Redis, redis_url: str, s3_client: S3Client
) -> None:
    asked = {"media_options": {"max_pixels": 50_000}}
    content = b"".join(line(f"q-{n}", "fail" if n % 5 == 4 else f"number {n}", **asked) for n in range(20))
    content += b"\n" + b"not json\n" + line("other", "x", model="absent") + line("tools", "x", tools=[1])
    content += line("pixels", "x", mm_processor_kwargs={"max_pixels": 0})
    content += line("stream", "x", stream=True) + b'{"custom_id": "bare"}'
    with eager_worker(redis_url) as worker:
        worker.pause()
        batch = start(client, content, metadata={"a": "b"})
        redis_client.hset(BATCH_PREFIX + batch.id, "mistakes", 3)
        worker.go_on()
        batch = finished(client, batch)
    assert redis_client.hget(BATCH_PREFIX + batch.id, "mistakes") == "0"  # it came further
    assert (batch.status, batch.errors, batch.metadata) == ("completed", None, {"a": "b"})
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (26, 16, 10)

    answers = read(client, batch.output_file_id)
    assert [row["custom_id"] for row in answers] == [f"q-{n}" for n in range(20) if n % 5 != 4]
    for row in answers:
        assert row["response"]["status_code"] == 200
        said = row["response"]["body"]["choices"][0]["message"]["content"]
        assert said == f"you said number {row['custom_id'].removeprefix('q-')}"
    errors = {row["custom_id"]: row["response"] for row in read(client, batch.error_file_id)}
    codes = {name: (answer["status_code"], answer["body"]["error"]["code"]) for name, answer in errors.items()}
    assert codes == {
        **{f"q-{n}": (400, "media_not_found") for n in (4, 9, 14, 19)},
        None: (400, "invalid_json_line"),
        "other": (404, "model_not_found"),
        "tools": (400, "invalid_request"),
        "pixels": (400, "invalid_request"),
        "stream": (400, "invalid_request"),
        "bare": (400, "invalid_request"),
    }
    keys = [entry["Key"] for entry in s3_client.list_objects_v2(Bucket="media", Prefix="files/")["Contents"]]
    assert not any(batch.id in key for key in keys)  # what it wrote on the way is gone


@pytest.mark.parametrize(
    ("content", "code", "number"),
    [
        (line("a", "x") + b"\n" + line("b", "x") + line("a", "y"), "duplicate_custom_id", 4),
        (b"\n \n", "empty_file", None),
    ],
)
def test_a_batch_that_makes_no_sense_fails_as_a_whole(
    client: openai.OpenAI, content: bytes, code: str, number: int | None
) -> None:
    batch = finished(client, start(client, content))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    (error,) = batch.errors.data
    assert (error.code, error.line) == (code, number)


def test_too_many_lines_are_refused(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINES", 3)
    batch = finished(client, start(client, b"".join(line(str(n), "x") for n in range(4))))
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert batch.errors.data[0].code == "too_many_lines"


def test_a_cancelled_batch_cancels_its_jobs_and_keeps_its_answers(
    service: Service, client: openai.OpenAI, served: ScriptedWorker
) -> None:
    batch = start(client, b"".join(line(str(n), f"number {n}") for n in range(300)))

    def queued() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = service.http.get("/v1/jobs?status=queued&limit=200").json()["jobs"]
        return found

    eventually(lambda: len(queued()) == 128, 60, "the batch has as many jobs as it may")
    for job in queued()[:3]:
        served.answer(job["job_id"], "yes")
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = finished(client, batch)
    assert (batch.status, queued()) == ("cancelled", [])
    assert len(read(client, batch.output_file_id)) == 3
    assert batch.error_file_id is None
    assert client.batches.cancel(batch.id).status == "cancelled"


def test_a_batch_that_takes_too_long_expires(service: Service, client: openai.OpenAI, served: ScriptedWorker) -> None:
    batch = finished(client, start(client, b"".join(line(str(n), "x") for n in range(200)), window="3s"))
    assert batch.status == "expired"
    rows = read(client, batch.error_file_id)
    assert len(rows) == 200
    assert {row["error"]["code"] if row["error"] else row["response"]["body"]["error"]["code"] for row in rows} <= {
        "batch_expired",
        "expired",
    }
    assert service.http.get("/v1/jobs?status=queued").json()["jobs"] == []


@contextmanager
def _ending(server: RedisServer) -> Iterator[None]:
    try:
        yield
    finally:
        server.stop()


def test_the_queues_limit_and_the_keys_cap_hold_a_batch_back(tmp_path: Path, s3_server: S3Server) -> None:
    s3_server.client()
    # Its own Redis: other tests' gateway would take the batches up as well, and knows no limit.
    redis_server = RedisServer(tmp_path)
    redis_url = redis_server.url
    with (
        _ending(redis_server),
        serving(redis_url, s3_server.url, api_keys=ENTRIES, max_queued=4, api_models="default") as running,
        openai_client(running.url, KEYS["alice"]) as alice,
        openai_client(running.url, KEYS["small"]) as small,
    ):
        clients = [alice, small]
        batches = [start(client, b"".join(line(str(n), "x") for n in range(12))) for client in clients]
        depths = [0]
        with redis.Redis.from_url(redis_url, decode_responses=True) as observer, eager_worker(redis_url) as worker:

            def is_full() -> bool:
                depths.append(int(observer.get("visionq:depth:default") or 0))
                return depths[-1] >= 4

            worker.pause()
            eventually(is_full, 60, "the queue is full")
            worker.go_on()
            ended = [finished(client, batch) for client, batch in zip(clients, batches, strict=True)]
        assert max(depths) == 4
        assert [batch.status for batch in ended] == ["completed", "completed"]
        assert [len(read(c, b.output_file_id)) for c, b in zip(clients, ended, strict=True)] == [12, 12]


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[str]:
    """A Redis whose batches no other test's gateway takes up."""
    server = RedisServer(tmp_path)
    with _ending(server):
        yield server.url


def test_a_batch_that_meets_a_mistake_again_and_again_is_given_up(
    own_redis: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.client()
    monkeypatch.setattr(runner, "PAUSE_S", 0.01)
    monkeypatch.setattr(runner, "POLL_S", 0.05)

    def jobs(running: Service, status: str) -> int:
        return len(running.http.get(f"/v1/jobs?status={status}").json()["jobs"])

    with serving(own_redis, s3_server.url, api_models="default") as running, openai_client(running.url) as client:
        batch = start(client, b"".join(line(str(n), "x") for n in range(5)))
        eventually(lambda: jobs(running, "queued") == 5, 60, "the batch's jobs are queued")
    with redis.Redis.from_url(own_redis) as there:
        there.set(files.FILE_PREFIX + batch.input_file_id, "{}")  # as another version may have written it
    with serving(own_redis, s3_server.url, api_models="default") as running, openai_client(running.url) as client:
        batch = finished(client, batch)
        assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
        assert batch.errors is not None
        assert batch.errors.data is not None
        assert [error.code for error in batch.errors.data] == ["internal"]
        assert (jobs(running, "queued"), jobs(running, "cancelled")) == (0, 5)
        check(running.http.get("/openapi.json").json(), "BatchObject", batch.model_dump(mode="json"))
        metrics = running.http.get("/metrics").text
        assert 'visionq_api_batches_put_down_total{why="mistake"} 6.0' in metrics
        assert 'visionq_api_batches_put_down_total{why="given_up"} 1.0' in metrics


def test_mistakes_count_until_the_batch_comes_further(own_redis: str) -> None:
    async def counts() -> list[int]:
        async with redis.asyncio.Redis.from_url(own_redis, decode_responses=True) as commands:
            store = BatchStore(commands, lease_s=60)
            request = BatchRequest(input_file_id="x", endpoint="/v1/chat/completions", completion_window="1h")
            await store.create(ANYBODY, request)
            found = []
            for progress in ({}, {"total": 1}, {"mistakes": 0}):
                lease = await store.take()
                assert lease is not None
                await store.keep(lease, progress)
                found.append(await store.count_mistake(lease, pause_s=-1))  # times are rounded: 0 may be still to come
            with pytest.raises(LeaseLost):
                await store.count_mistake(Lease(lease.batch_id, lease.fence - 1), pause_s=0)
            await store.count_mistake(lease, pause_s=60)
            assert await store.take() is None
            return found

    assert asyncio.run(counts()) == [1, 2, 1]


def test_files_and_batches_belong_to_their_tenant(redis_url: str, s3_server: S3Server) -> None:
    s3_server.client()
    with (
        serving(redis_url, s3_server.url, api_keys=ENTRIES) as running,
        openai_client(running.url, KEYS["alice"]) as alice,
        openai_client(running.url, KEYS["bob"]) as bob,
    ):
        batch = start(alice, b"\n")
        calls: list[Callable[[], object]] = [
            lambda: bob.files.retrieve(batch.input_file_id),
            lambda: bob.files.content(batch.input_file_id),
            lambda: bob.files.delete(batch.input_file_id),
            lambda: bob.batches.retrieve(batch.id),
            lambda: bob.batches.cancel(batch.id),
            lambda: bob.batches.create(
                input_file_id=batch.input_file_id, endpoint="/v1/chat/completions", completion_window="24h"
            ),
        ]
        for call in calls:
            with pytest.raises(openai.NotFoundError):
                call()
        assert list(bob.files.list()) == list(bob.batches.list()) == []
        assert [file.id for file in alice.files.list()] == [batch.input_file_id]
        finished(alice, batch)


def test_files_are_listed_page_by_page_and_deleted(service: Service, client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{n}.jsonl", b"x" * n), purpose="batch") for n in range(1, 6)]
    listed = list(client.files.list(limit=2))
    assert {(file.id, file.bytes, file.filename) for file in listed} == {(f.id, f.bytes, f.filename) for f in made}
    assert client.files.content(made[2].id).content == b"xxx"
    assert client.files.delete(made[2].id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made[2].id)
    assert len(list(client.files.list())) == 4
    with pytest.raises(openai.BadRequestError):
        client.files.create(file=b"x", purpose="fine-tune")
    document = service.http.get("/openapi.json").json()
    check(document, "FileObject", service.http.get(f"/v1/files/{made[0].id}").json())
    check(document, "FileList", service.http.get("/v1/files").json())
    check(document, "OpenAIErrorBody", service.http.get("/v1/files/none").json())


@pytest.fixture
def process(redis_url: str, s3_server: S3Server, tmp_path: Path) -> Iterator[Callable[[int], ApiProcess]]:
    s3_server.client()
    started: list[ApiProcess] = []

    def run(port: int) -> ApiProcess:
        settings = {"AWS_ENDPOINT_URL_S3": s3_server.url, "VISIONQ_LEASE_S": "2", "VISIONQ_API_MODELS": "default"}
        started.append(ApiProcess(redis_url, port, tmp_path / "api.log", **settings))
        return started[-1].wait_ready()

    yield run
    for api in started:
        api.process.kill()
        api.process.wait(20)


def test_a_gateway_killed_in_the_middle_leaves_every_line_answered_once(
    process: Callable[[int], ApiProcess], redis_url: str
) -> None:
    port = free_port()
    first = process(port)
    with eager_worker(redis_url) as worker, openai_client(first.url, max_retries=5) as client:
        batch = start(client, b"".join(line(f"q-{n}", f"number {n}") for n in range(NUM_LINES)))
        eventually(lambda: len(worker.num_claims) > lines.SEGMENT_LINES * 2, 120, "a checkpoint was written")
        first.process.kill()
        first.process.wait(20)
        assert len(worker.num_claims) < NUM_LINES
        process(port)
        batch = finished(client, batch)
        rows = read(client, batch.output_file_id)
    assert batch.status == "completed"
    assert [row["custom_id"] for row in rows] == [f"q-{n}" for n in range(NUM_LINES)]
    for row in rows:
        said = row["response"]["body"]["choices"][0]["message"]["content"]
        assert said == f"you said number {row['custom_id'].removeprefix('q-')}"
    assert Counter(worker.num_claims.values()) == {1: NUM_LINES}
    assert httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=30).status_code == 200
