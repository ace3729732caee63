"""The whole corridor with the shipped model: producers, queue, worker, streams."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from api_stub.client.client import Client
from api_stub.contract import names
from api_stub.contract.event import JobStarted
from tests.e2e.scenes import Question, stored_questions
from tests.processes import WorkerProcess
from tests.servers import RedisServer, S3Server, eventually
from tests.tiny.reference import Reference
from worker.demo_model import CHECKPOINT
from worker.models.digests import folder_digest
from worker.models.source import SHIPPED

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

NUM_SCENES = 200


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[Client]:
    with Client(redis_server.url) as client:
        yield client


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> list[Question]:
    """One question about each of 200 different scenes, kinds taking turns."""
    questions = stored_questions(
        s3_server.client(), tmp_path_factory.mktemp("scenes"), "--count", str(NUM_SCENES), "--seed", "7"
    )
    by_uri: dict[str, list[Question]] = {}
    for question in questions:
        by_uri.setdefault(question.uri, []).append(question)
    return [choices[index % len(choices)] for index, choices in enumerate(by_uri.values())]


def sequential_answers(asked: list[Question]) -> list[str]:
    """What the same checkpoint says to the same questions, one after the other, without any of our engine."""
    reference = Reference(CHECKPOINT)
    return [reference.answer(reference.single_turn([Image.open(q.path)], q.text), max_new_tokens=64) for q in asked]


@pytest.mark.check
def test_each_of_200_concurrent_jobs_gets_the_answer_of_its_own_scene(
    demo_worker: WorkerProcess, client: Client, asked: list[Question], redis_server: RedisServer
) -> None:
    jobs = [
        client.caption(q.uri, prompt=q.text) if q.task == "caption" else client.vqa(q.uri, question=q.text)
        for q in asked
    ]
    with ThreadPoolExecutor(50) as pool:
        streamed = list(pool.map(lambda job: "".join(job.stream(timeout=120)), jobs))
    results = [job.result(timeout=120) for job in jobs]

    assert streamed == [result.text for result in results]
    correct = sum(result.text == q.answer for result, q in zip(results, asked, strict=True))
    expected = sequential_answers(asked)
    correct_sequentially = sum(text == q.answer for text, q in zip(expected, asked, strict=True))
    assert abs(correct - correct_sequentially) <= NUM_SCENES // 100
    assert correct >= 0.95 * NUM_SCENES
    assert [result.text for result in results] == expected

    late = ["".join(job.stream(timeout=30)) for job in jobs[:20]]
    assert late == streamed[:20]
    with redis_server.client() as raw:
        for job in jobs:
            events = [json.loads(fields["event"]) for _, fields in raw.xrange(names.events_key(job.id))]
            assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
            assert [event["type"] for event in events].count("job.completed") == 1
            assert events[-1]["type"] == "job.completed"


def test_result_and_event_name_the_weights_that_answered(demo_worker: WorkerProcess, client: Client) -> None:
    job = client.vqa(question="hello")
    checkpoint = job.result(timeout=60).checkpoint
    assert checkpoint == folder_digest(SHIPPED["demo"])
    assert [event.checkpoint for event in job.events() if isinstance(event, JobStarted)] == [checkpoint]


def test_a_reader_that_loses_its_connection_gets_the_same_text(
    demo_worker: WorkerProcess, client: Client, asked: list[Question], redis_server: RedisServer
) -> None:
    job = client.caption(asked[0].uri, temperature=1.5, seed=5, min_new_tokens=300, max_new_tokens=400)
    pieces: list[str] = []
    with redis_server.client() as raw:
        for piece in job.stream(timeout=60):
            pieces.append(piece)
            if len(pieces) in (3, 20):
                raw.client_kill_filter(_type="pubsub")
    assert "".join(pieces) == job.result(timeout=30).text
    assert len(pieces) > 20
    assert client.vqa(question="hello").result(timeout=30).text, "the worker lost its subscriptions too, and serves on"


def test_a_cancelled_job_stops_and_keeps_its_partial_text(
    demo_worker: WorkerProcess, client: Client, asked: list[Question]
) -> None:
    from api_stub.errors import JobFailed

    job = client.caption(asked[0].uri, max_new_tokens=1500, min_new_tokens=1500, temperature=2.0)
    stream = job.stream(timeout=60)
    seen = next(stream)
    job.cancel()
    with pytest.raises(JobFailed) as failure:
        seen += "".join(stream)
    assert failure.value.code == "cancelled"
    eventually(lambda: job.status().status == "cancelled", 5)
    view = job.status()
    assert view.partial_text is not None
    assert view.partial_text.startswith(seen)
    assert 0 < view.usage.completion_tokens < 1500


def test_a_plain_celery_producer_gets_its_result_by_asyncresult(
    demo_worker: WorkerProcess, redis_server: RedisServer, asked: list[Question]
) -> None:
    from celery import Celery

    app = Celery(broker=redis_server.url, backend=redis_server.url, set_as_current=False)
    question = asked[0]
    handle = app.send_task(
        "visionq.caption",
        kwargs={"media": [question.uri], "prompt": question.text},
        queue="visionq.default",
        priority=6,
    )
    value = handle.get(timeout=60)
    assert value["text"] == Reference(CHECKPOINT).answer(
        Reference(CHECKPOINT).single_turn([Image.open(question.path)], question.text), max_new_tokens=64
    )
    assert value["job_id"] == handle.id
    assert handle.state == "SUCCESS"
    with redis_server.client() as raw:
        types = [json.loads(fields["event"])["type"] for _, fields in raw.xrange(names.events_key(handle.id))]
    assert types[:2] == ["job.queued", "job.started"]
    assert types[-1] == "job.completed"
    app.close()


def test_stages_are_announced_in_order(demo_worker: WorkerProcess, client: Client, asked: list[Question]) -> None:
    job = client.caption(asked[0].uri)
    stages = [event.stage for event in job.events(timeout=60) if event.type == "job.progress"]
    assert list(dict.fromkeys(stages)) == ["fetching", "preparing", "prefill"]


def test_a_clip_is_answered_by_what_moves_in_it(
    demo_worker: WorkerProcess, client: Client, s3_client: S3Client, tmp_path: Path
) -> None:
    questions = [q for q in stored_questions(s3_client, tmp_path) if q.task == "video_qa"]
    assert questions
    for question in questions:
        result = client.video_qa(question.uri, question=question.text).result(timeout=60)
        assert result.text == question.answer
        assert result.usage.frames == 8
        assert result.usage.images == 0


def test_the_worker_drains_on_sigterm_and_exits_with_0(
    redis_server: RedisServer, s3_server: S3Server, tmp_path: Path, client: Client, asked: list[Question]
) -> None:
    worker = WorkerProcess(
        tmp_path, redis_server.url, s3_server.url, model="demo", model_name="drains", drain_s=30, is_executed=True
    ).wait_ready()
    try:
        job = client.caption(asked[0].uri, model="drains", max_new_tokens=200, min_new_tokens=200, temperature=1.0)
        next(job.stream(timeout=60))
        status: list[int] = []
        thread = threading.Thread(target=lambda: status.append(worker.terminate()))
        thread.start()
        assert job.result(timeout=60).usage.completion_tokens == 200
        thread.join(60)
        assert status == [0]
    finally:
        worker.kill()


def test_a_job_survives_the_death_of_its_worker(
    redis_server: RedisServer, s3_server: S3Server, tmp_path: Path, client: Client, asked: list[Question]
) -> None:
    settings = {"model": "demo", "model_name": "mortal", "lease_s": 3, "beat_s": 0.5, "grace_s": 1, "sweep_s": 0.2}
    first = WorkerProcess(tmp_path, redis_server.url, s3_server.url, **settings).wait_ready()
    second = None
    try:
        job = client.caption(
            asked[0].uri, model="mortal", max_new_tokens=1500, min_new_tokens=300, temperature=1.0, seed=3
        )
        next(job.stream(timeout=60))
        first.kill()
        second = WorkerProcess(tmp_path, redis_server.url, s3_server.url, **settings).wait_ready()
        result = job.result(timeout=60)
        assert result.attempt == 2
        assert "".join(job.stream(timeout=30)) == result.text
        types = [event.type for event in job.events(timeout=30)]
        assert types.count("job.started") == 2
        assert types.count("job.retrying") == 1
    finally:
        first.kill()
        if second is not None:
            second.kill()


def test_a_job_for_a_model_nobody_serves_waits_and_says_so(client: Client) -> None:
    job = client.vqa(question="Anybody there?", model="nobody")
    view = job.status()
    assert view.status == "queued"
    assert view.num_workers == 0
    with pytest.raises(TimeoutError):
        job.result(timeout=1)
    job.cancel()
    assert job.status().status == "cancelled"


def test_two_workers_share_one_queue_and_other_names_serve_other_queues(
    demo_worker: WorkerProcess,
    redis_server: RedisServer,
    s3_server: S3Server,
    tmp_path: Path,
    client: Client,
    asked: list[Question],
) -> None:
    twin = WorkerProcess(tmp_path, redis_server.url, s3_server.url, model="demo", lease_s=6, beat_s=1)
    other = WorkerProcess(tmp_path, redis_server.url, s3_server.url, model="demo", model_name="other")
    try:
        twin.wait_ready()
        other.wait_ready()
        eventually(lambda: client.vqa(question="hello").status().num_workers == 2, 20, "two workers are registered")
        jobs = [client.caption(q.uri) for q in asked[:60]]
        elsewhere = [client.caption(q.uri, model="other") for q in asked[:10]]
        servers = {_worker_of(job) for job in jobs}
        assert len(servers) == 2
        assert len({_worker_of(job) for job in elsewhere} | servers) == 3
    finally:
        twin.kill()
        other.kill()


def _worker_of(job: object) -> str:
    return next(event.worker for event in job.events(timeout=60) if event.type == "job.started")


def test_no_key_of_a_finished_job_stays_for_ever(
    demo_worker: WorkerProcess, client: Client, redis_server: RedisServer
) -> None:
    job = client.vqa(question="hello")
    job.result(timeout=60)
    with redis_server.client() as raw:
        keys = [key for key in raw.scan_iter() if job.id in key]
        assert {names.job_key(job.id), names.events_key(job.id), names.result_key(job.id)} <= set(keys)
        assert all(raw.ttl(key) > 0 for key in keys)
