"""The Python client through Redis and through a gateway: the same calls, the same answers, the same errors."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import threading
import time
import uuid
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import redis
from typer.testing import CliRunner

from api_stub.cli.main import app
from api_stub.client.client import AsyncClient, Client
from api_stub.client.http.wire import EventStreamParser
from api_stub.contract import names
from api_stub.contract.error import ErrorCode
from api_stub.contract.event import parse_event
from api_stub.contract.media import S3Object
from api_stub.contract.status import JobStatus
from api_stub.errors import (
    AccessRefused,
    InvalidRequest,
    InvalidSettings,
    JobFailed,
    QueueFull,
    StoreUnavailable,
    StreamRestarted,
    UnknownJob,
)
from api_stub.gateway.keys import digest_of
from api_stub.ledger.rows import Cancelled
from api_stub.settings import ClientSettings
from tests.gateway.service import Service, serving
from tests.gateway.test_process import ApiProcess
from tests.gateway.test_submitting import PNG
from tests.servers import S3Server, eventually, free_port
from tests.unit.api_stub.readings import KINDS, Reading
from tests.unit.api_stub.workers import ScriptedWorker

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

IMAGE, CLIP = "s3://media/a.png", "s3://media/a.mp4"
#: Characters that Python cuts lines at and an event stream does not.
NAMED = "0b8f6a52-6d4e-4c58-9a55-2f2d3a1b7c10"
PIECES = ("It ", "is\n\u2028", "r\x85é", "d ●")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_job_is_submitted_streamed_and_awaited(client: Client, worker: ScriptedWorker, url: str, kind: str) -> None:
    job = client.vqa(IMAGE, question="What colour is it?", metadata={"a": 1})
    assert job.status().status is JobStatus.QUEUED
    worker.take(job.id)
    readings = [Reading(kind, url, job.id, what) for what in ("stream", "events", "result")]
    worker.say(PIECES[0])
    readings[0].wait_for(1)  # while the job runs
    worker.say(*PIECES[1:])
    result = worker.finish()
    assert readings[0].join() == list(PIECES)
    assert [event.type for event in readings[1].join()] == [  # type: ignore[attr-defined]
        "job.queued", "job.started", *["output.delta"] * 4, "job.completed"
    ]  # fmt: skip
    assert readings[2].join() == [result]
    assert "".join(job.stream(timeout=5)) == "".join(PIECES)
    assert [event.seq for event in job.events(after=5, timeout=5)] == [6, 7]
    assert list(job.events(after=7)) == list(job.events(after=99)) == []
    assert job.result(timeout=0) == job.status().result == result


def test_each_call_makes_its_kind_of_job(client: Client, redis_client: redis.Redis) -> None:
    jobs = (
        client.caption(IMAGE, max_new_tokens=9),
        client.vqa(question="Why?", tenant="team", deadline_s=9.0, priority=2),
        client.video_qa(CLIP, question="Why?", num_frames=4),
        client.submit({"task": "visionq.vqa", "question": "Why?", "model": "other"}, job_id=NAMED),
    )
    bodies = [json.loads(redis_client.hget(names.job_key(job.id), "body") or "") for job in jobs]
    assert [body["task"] for body in bodies] == ["visionq.caption", "visionq.vqa", "visionq.video_qa", "visionq.vqa"]
    assert (bodies[0]["sampling"]["max_new_tokens"], bodies[2]["num_frames"]) == (9, 4)
    assert (jobs[1].status().tenant, jobs[1].status().priority, jobs[3].id) == ("team", 2, NAMED)
    assert jobs[3].status().model == "other"


def test_the_same_id_and_body_is_the_same_job(client: Client) -> None:
    assert client.vqa(question="Why?", job_id=NAMED).id == client.vqa(question="Why?", job_id=NAMED).id
    with pytest.raises(InvalidRequest, match="another body"):
        client.vqa(question="What?", job_id=NAMED)
    for bad in ({"top_p": 2.0}, {"job_id": "no/id"}):
        with pytest.raises(InvalidRequest, match=r"top_p|job_id"):
            client.vqa(question="Why?", **bad)  # type: ignore[arg-type]


def test_a_gateway_takes_ids_that_are_uuids(service: Service) -> None:
    with Client(service.url) as client:
        for bad in ("my-id", "0b8f6a52-6d4e-5c58-9a55-2f2d3a1b7c10"):
            with pytest.raises(InvalidRequest, match="job_id"):
                client.vqa(question="Why?", job_id=bad)


def test_a_job_that_fails_says_why(client: Client, worker: ScriptedWorker, url: str, kind: str) -> None:
    job = client.caption(IMAGE)
    worker.take(job.id)
    worker.say("half")
    worker.fail(ErrorCode.MEDIA_NOT_FOUND, "no such object: s3://media/a.png")
    for what in ("stream", "result"):
        with pytest.raises(JobFailed) as caught:
            Reading(kind, url, job.id, what).join()
        assert (caught.value.code, caught.value.retryable) == ("media_not_found", False)
        assert caught.value.message == "no such object: s3://media/a.png"
    assert job.status().partial_text == "half"
    new = client.retry(job.id)
    assert new.id != job.id
    assert client.retry(job.id).id == new.id
    assert new.status().status is JobStatus.QUEUED
    with pytest.raises(InvalidRequest, match="finished"):
        client.retry(new.id)


def test_cancel_ends_a_queued_job_and_asks_a_running_one(client: Client, worker: ScriptedWorker) -> None:
    queued, running = client.vqa(question="Why?"), client.vqa(question="Why?")
    worker.take(running.id)
    assert queued.cancel() is Cancelled.CANCELLED
    assert queued.cancel() is Cancelled.FINAL
    assert running.cancel() is Cancelled.CANCELLING
    assert running.status().cancelling
    with pytest.raises(JobFailed, match=r"^cancelled: "):
        queued.result(timeout=5)


def test_nobodys_job_is_unknown_to_every_question(client: Client, url: str, kind: str) -> None:
    job = client.job("nobody")
    for question in (job.status, job.cancel, lambda: client.retry("nobody")):
        with pytest.raises(UnknownJob, match="'nobody'"):
            question()
    for what in ("stream", "result"):
        with pytest.raises(UnknownJob, match="'nobody'"):
            Reading(kind, url, "nobody", what).join()


def test_silence_is_bounded(client: Client, worker: ScriptedWorker, url: str, kind: str) -> None:
    job = client.vqa(question="Why?")
    for what in ("stream", "result"):
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            Reading(kind, url, job.id, what, timeout=0.5).join()
        assert time.monotonic() - begun < 10
    worker.take(job.id)
    worker.say("a")
    reading = Reading(kind, url, job.id, timeout=20)
    reading.wait_for(1)
    worker.say("b")
    worker.finish()
    assert reading.join() == ["a", "b"]


def test_a_new_attempt_that_differs_ends_the_stream(client: Client, worker: ScriptedWorker, url: str) -> None:
    job = client.vqa(question="Why?")
    worker.take(job.id)
    worker.say("It is ", "red")
    reading = Reading("Client", url, job.id)
    reading.wait_for(2)
    worker.give_back()
    worker.ledger.reap()
    worker.take(job.id)
    worker.say("It is ", "blue")
    with pytest.raises(StreamRestarted):
        reading.join()


def test_a_full_queue_is_told_with_a_time(redis_url: str) -> None:
    settings = ClientSettings.model_validate({"redis_url": redis_url, "max_queued": 1})
    with serving(redis_url, max_queued=1) as running, Client(settings=settings) as direct, Client(running.url) as http:
        direct.vqa(question="Why?")
        for client in (direct, http):
            with pytest.raises(QueueFull, match="the limit is 1") as caught:
                client.vqa(question="Why?")
            assert caught.value.retry_after_s == 5.0


def test_a_gateway_that_is_away_is_unavailable() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url) as client, pytest.raises(StoreUnavailable, match="the gateway did not answer"):
        client.vqa(question="Why?")
    for reading in [Reading(kind, url, "any", what) for kind in KINDS for what in ("stream", "result")]:
        with pytest.raises(StoreUnavailable, match="the gateway did not answer"):
            reading.join()


def test_an_upload_gives_a_uri_that_a_job_takes(
    open_gateway: Service, redis_url: str, s3_server: S3Server, s3_client: S3Client, tmp_path: Path
) -> None:
    (tmp_path / "cat.png").write_bytes(b"png" * 100_000)
    (tmp_path / "cat.txt").write_text("no picture")

    async def stored() -> str:
        async with AsyncClient(open_gateway.url) as client:
            return await client.upload(tmp_path / "cat.png")

    with Client(open_gateway.url) as client:
        for uri in (client.upload(tmp_path / "cat.png"), asyncio.run(stored())):
            target = S3Object.parse(uri)
            found = s3_client.get_object(Bucket=target.bucket, Key=target.key)
            assert (found["Body"].read(), found["ContentType"]) == (b"png" * 100_000, "image/png")
            assert client.caption(uri).status().status is JobStatus.QUEUED
        with pytest.raises(InvalidRequest, match="no image or clip"):
            client.upload(tmp_path / "cat.txt")
        with pytest.raises(FileNotFoundError):
            client.upload(tmp_path / "dog.png")


def test_an_upload_goes_through_the_gateway_where_s3_cannot_be_reached(
    redis_url: str, s3_server: S3Server, s3_client: S3Client, tmp_path: Path
) -> None:
    (tmp_path / "cat.png").write_bytes(PNG)
    nowhere = f"http://127.0.0.1:{free_port()}"
    with serving(redis_url, s3_server.url, s3_public_url=nowhere) as running, Client(running.url) as client:
        target = S3Object.parse(client.upload(tmp_path / "cat.png"))
    assert s3_client.get_object(Bucket=target.bucket, Key=target.key)["Body"].read() == PNG


def test_a_key_is_sent_and_its_refusal_told(redis_url: str) -> None:
    with serving(redis_url, api_keys=f"team:{digest_of('good')}") as running:
        with Client(running.url, api_key="good") as client:
            job = client.vqa(question="Why?")
            assert job.status().tenant == "team"
            with pytest.raises(AccessRefused, match="tenant"):
                client.vqa(question="Why?", tenant="other")
        for key in (None, "bad"):
            with Client(running.url, api_key=key) as client, pytest.raises(AccessRefused, match="key"):
                client.job(job.id).status()


def test_an_operators_calls_need_redis(service: Service) -> None:
    with Client(service.url) as client:
        for call in (client.dead, lambda: client.drop("any")):
            with pytest.raises(InvalidRequest, match="Redis itself"):
                call()


def test_readers_outlive_a_gateway_that_is_killed(redis_url: str, worker: ScriptedWorker, tmp_path: Path) -> None:
    port = free_port()
    first = ApiProcess(redis_url, port, tmp_path / "api.log")
    try:
        first.wait_ready()
        with Client(first.url) as client:
            job = client.vqa(question="Why?")
        worker.take(job.id)
        worker.say(*PIECES[:2])
        texts, results = (
            [Reading(kind, first.url, job.id, what, 60) for kind in KINDS] for what in ("stream", "result")
        )
        for text in texts:
            text.wait_for(2)
        looks = 'visionq_api_requests_total{method="GET",route="/v1/jobs/{job_id}",status="200"} 2.0'
        eventually(lambda: looks in httpx.get(f"{first.url}/metrics").text, what="both waiters had an answer")
    finally:
        first.process.kill()
        first.process.wait(20)
    worker.say(PIECES[2])
    with serving(redis_url, api_port=port):
        worker.say(PIECES[3])
        result = worker.finish()
        for text, answer in zip(texts, results, strict=True):
            assert (text.join(60), answer.join(60)) == (list(PIECES), [result])


def test_many_threads_and_many_tasks_share_a_client(service: Service, worker: ScriptedWorker) -> None:
    texts: dict[int, str] = {}
    with Client(service.url) as client:
        ids = [str(uuid.uuid4()) for _ in range(30)]

        def ask(number: int) -> None:
            texts[number] = client.vqa(question="Why?", job_id=ids[number]).result(timeout=60).text

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(30)]
        for thread in threads:
            thread.start()
        for number in range(30):
            eventually(lambda n=number: worker.ledger.view(ids[n]), what=f"job {number} is submitted")
            worker.answer(ids[number], str(number))
        for thread in threads:
            thread.join(60)
    assert texts == {number: str(number) for number in range(30)}

    async def use() -> list[str]:
        async with AsyncClient(service.url) as client:
            jobs = [client.job(job_id) for job_id in ids]
            return await asyncio.gather(*(_text(job) for job in jobs))

    assert asyncio.run(use()) == [str(number) for number in range(30)]


async def _text(job: object) -> str:
    async with aclosing(job.stream(timeout=60)) as pieces:  # type: ignore[attr-defined]
        return "".join([piece async for piece in pieces])


def test_a_reader_that_leaves_frees_its_place(service: Service, worker: ScriptedWorker) -> None:
    with Client(service.url) as client:
        job = client.vqa(question="Why?")
        events = job.events()
        next(events)
        assert service.gateway.broadcaster.num_readers == 1
        events.close()
        eventually(lambda: service.gateway.broadcaster.num_readers == 0, what="the reader is gone")

    async def use() -> None:
        async with AsyncClient(service.url) as client:
            reader = asyncio.create_task(_text(client.job(job.id)))
            await asyncio.to_thread(eventually, lambda: service.gateway.broadcaster.num_readers == 1)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            await asyncio.to_thread(eventually, lambda: service.gateway.broadcaster.num_readers == 0)

    asyncio.run(use())


def test_the_parser_takes_bytes_as_they_fall() -> None:
    event = {"v": 1, "job_id": "j", "seq": 2, "attempt": 1, "ts": 1.5, "type": "output.delta"}
    delta = parse_event(json.dumps(event | {"text": "é\u2028●", "offset": 0, "num_tokens": 1}))
    raw = f"retry: 1000\n\n: alive\n\nid: 2\nevent: output.delta\r\ndata: {delta.to_json()}\n\ndata: {{}}\n\n".encode()
    for size in (1, 7, len(raw)):
        parser = EventStreamParser()
        pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
        assert [found for piece in pieces for found in parser.feed(piece)] == [delta]


def test_the_command_line_speaks_http(
    service: Service, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        return done.stdout

    def answer() -> None:
        eventually(lambda: worker.ledger.view(NAMED))
        worker.answer(NAMED, *PIECES)

    helper = threading.Thread(target=answer)
    helper.start()
    assert (
        run("vqa", "-q", "Why?", "--job-id", NAMED, "--url", service.url, "--timeout", "30") == "".join(PIECES) + "\n"
    )
    helper.join(20)
    monkeypatch.setenv("VISIONQ_API_URL", service.url)
    assert json.loads(run("status", NAMED, "--json"))["status"] == "completed"
    assert run("watch", NAMED) == "".join(PIECES) + "\n"
    assert run("cancel", NAMED) == "had ended before\n"


def test_a_named_redis_wins_over_a_named_gateway(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONQ_API_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("VISIONQ_REDIS_URL", redis_url)
    with Client() as client:
        assert client.vqa(question="Why?").status().status is JobStatus.QUEUED


def test_without_httpx_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidSettings, match=r"visionq\[http\]"):
        Client("http://127.0.0.1:1")
