"""The Python API as a program uses it: both clients, many at once, and no trace left behind."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis

import api_stub
from api_stub.client.client import AsyncClient, Client
from api_stub.client.handle import AsyncJobHandle, JobHandle
from api_stub.contract.job import CaptionJob, VideoQaJob, VqaJob, parse_job
from api_stub.contract.media import S3Object
from api_stub.contract.names import job_key
from api_stub.contract.status import JobStatus
from api_stub.errors import JobFailed, UnknownJob
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Cancelled
from api_stub.settings import ClientSettings
from tests.servers import S3Server, eventually
from tests.unit.api_stub.workers import ScriptedWorker

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

#: Turns of the event loop after which a reader is cancelled; its subscription is made well within them.
NUM_MOMENTS = 24
IMAGE, CLIP = "s3://media/a.png", "s3://media/a.mp4"


def test_a_job_is_submitted_streamed_and_awaited(client: Client, worker: ScriptedWorker) -> None:
    job = client.vqa(IMAGE, question="What colour is it?")
    result = worker.answer(job.id, "It is ", "red")
    assert "".join(job.stream(timeout=5)) == "It is red"
    assert job.result(timeout=5) == result
    assert [event.seq for event in job.events()] == [1, 2, 3, 4, 5]


def test_each_call_makes_its_kind_of_job(client: Client, redis_client: redis.Redis) -> None:
    handles = (
        client.caption(IMAGE, max_new_tokens=9, seed=1),
        client.vqa(question="Why?", metadata={"a": 1}, tenant="team", deadline_s=9.0, seed=1),
        client.video_qa(CLIP, question="Why?", num_frames=4, seed=1),
        client.submit({"task": "visionq.vqa", "question": "Why?", "sampling": {"seed": 1}}),
    )
    stored = [parse_job(redis_client.hget(job_key(handle.id), "body") or "") for handle in handles]
    assert [job.model_copy(update={"sampling": None}) for job in stored] == [
        CaptionJob(media=(IMAGE,)).model_copy(update={"sampling": None}),
        VqaJob(question="Why?", metadata={"a": 1}, tenant="team", deadline_s=9.0).model_copy(update={"sampling": None}),
        VideoQaJob(media=(CLIP,), question="Why?", num_frames=4).model_copy(update={"sampling": None}),
        VqaJob(question="Why?").model_copy(update={"sampling": None}),
    ]
    assert [(job.sampling.max_new_tokens, job.sampling.seed) for job in stored] == [(9, 1)] + [(256, 1)] * 3


def test_status_tells_where_a_job_is(client: Client, worker: ScriptedWorker) -> None:
    job = client.vqa(question="Why?")
    view = job.status()
    assert (view.status, view.num_workers, view.attempt, view.worker) == (JobStatus.QUEUED, 0, 0, None)
    worker.ledger.beat("scripted@test:1", "default", ())
    worker.take(job.id)
    view = job.status()
    assert (view.status, view.num_workers, view.attempt) == (JobStatus.IN_PROGRESS, 1, 1)
    result = worker.finish()
    assert client.job(job.id).status().result == result


def test_cancel_ends_a_queued_job_and_asks_a_running_one(client: Client, worker: ScriptedWorker) -> None:
    queued, running = client.vqa(question="Why?"), client.vqa(question="Why?")
    worker.take(running.id)
    assert queued.cancel() is Cancelled.CANCELLED
    assert queued.cancel() is Cancelled.FINAL
    assert running.cancel() is Cancelled.CANCELLING
    assert running.status().cancelling
    with pytest.raises(JobFailed, match=r"^cancelled: "):
        queued.result(timeout=5)


def test_a_handle_of_nobodys_job_raises_when_it_is_asked(client: Client) -> None:
    job = client.job("nobody")
    assert repr(job) == "JobHandle('nobody')"
    for question in (job.status, job.cancel, job.result):
        with pytest.raises(UnknownJob, match="'nobody'"):
            question()


def test_an_upload_gives_a_uri_that_a_job_takes(
    redis_url: str, s3_server: S3Server, s3_client: S3Client, tmp_path: Path
) -> None:
    picture = tmp_path / "cat.jpg"
    picture.write_bytes(b"jpeg")
    fields = {"redis_url": redis_url, "s3_endpoint_url": s3_server.url}
    with Client(settings=ClientSettings.model_validate(fields)) as client:
        uri = client.upload(picture)
        assert client.caption(uri).status().status is JobStatus.QUEUED
    target = S3Object.parse(uri)
    assert s3_client.get_object(Bucket=target.bucket, Key=target.key)["Body"].read() == b"jpeg"


def test_the_async_client_does_the_same(
    redis_url: str, ledger: Ledger, s3_server: S3Server, s3_client: S3Client, tmp_path: Path
) -> None:
    (tmp_path / "cat.jpg").write_bytes(b"jpeg")
    fields = {"redis_url": redis_url, "s3_endpoint_url": s3_server.url}

    async def use() -> None:
        worker = ScriptedWorker(ledger)
        async with AsyncClient(settings=ClientSettings.model_validate(fields)) as client:
            uri = await client.upload(tmp_path / "cat.jpg")
            jobs = [
                await client.caption(uri),
                await client.vqa(uri, question="Why?"),
                await client.video_qa(CLIP, question="Why?"),
                await client.submit(VqaJob(question="Why?")),
            ]
            assert (await jobs[0].status()).status is JobStatus.QUEUED
            result = await asyncio.to_thread(worker.answer, jobs[0].id, "It is ", "red")
            assert [piece async for piece in jobs[0].stream(timeout=5)] == ["It is ", "red"]
            assert await jobs[0].result(timeout=5) == result
            assert [event.seq async for event in jobs[0].events(after=3)] == [4, 5]
            assert await jobs[1].cancel() is Cancelled.CANCELLED
            with pytest.raises(JobFailed, match=r"^cancelled: "):
                await jobs[1].result(timeout=5)
            for question in (client.job("nobody").status, client.job("nobody").cancel, client.job("nobody").result):
                with pytest.raises(UnknownJob, match="'nobody'"):
                    await question()

    asyncio.run(use())


def test_hundreds_of_submits_and_readers_at_once_in_one_event_loop(
    redis_url: str, redis_client: redis.Redis, ledger: Ledger
) -> None:
    num_jobs = 250

    def everyone_reads() -> bool:
        return len(redis_client.client_list(_type="pubsub")) == num_jobs

    async def use() -> list[str]:
        worker = ScriptedWorker(ledger)
        async with AsyncClient(redis_url) as client:
            jobs = await asyncio.gather(*(client.vqa(question=f"{n}?") for n in range(num_jobs)))
            readers = [asyncio.create_task(_read_all(job)) for job in jobs]
            await asyncio.to_thread(eventually, everyone_reads, 60, "every reader has its connection")
            for number, job in enumerate(jobs):
                await asyncio.to_thread(worker.answer, job.id, "number ", str(number))
            return await asyncio.gather(*readers)

    assert asyncio.run(use()) == [f"number {n}" for n in range(num_jobs)]


async def _read_all(job: AsyncJobHandle) -> str:
    return "".join([piece async for piece in job.stream(timeout=60)])


def test_a_cancelled_reader_gives_its_connection_back(redis_url: str, redis_client: redis.Redis) -> None:
    def num_readers() -> int:
        return len(redis_client.client_list(_type="pubsub"))

    async def use() -> None:
        async with AsyncClient(redis_url) as client:
            reader = asyncio.create_task(_read_all(await client.vqa(question="Why?")))
            await asyncio.to_thread(eventually, lambda: num_readers() == 1, what="the reader is there")
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            await asyncio.to_thread(eventually, lambda: num_readers() == 0, what="the reader is gone")

    asyncio.run(use())


def test_a_reader_can_be_cancelled_at_any_moment(redis_url: str) -> None:
    async def use() -> None:
        async with AsyncClient(redis_url) as client:
            job = await client.vqa(question="Why?")
            for num_turns in range(NUM_MOMENTS):
                reader = asyncio.create_task(_read_all(job))
                await _sends_begin()
                for _ in range(num_turns):
                    await asyncio.sleep(0)
                reader.cancel()
                await asyncio.wait([reader], timeout=10)
                assert reader.done(), f"cancelled {num_turns} turns of the loop after its first command, and reads on"
                assert reader.cancelled()

    asyncio.run(use())


async def _sends_begin() -> None:
    """Wait until a command is on its way to Redis."""
    for _ in range(10_000):
        if any("_send_packed_command" in repr(task.get_coro()) for task in asyncio.all_tasks()):
            return
        await asyncio.sleep(0)
    raise AssertionError("no command was sent")


def test_one_client_serves_many_threads(client: Client, worker: ScriptedWorker) -> None:
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        job = client.vqa(question=f"{number}?", job_id=f"job-{number}")
        texts[number] = job.result(timeout=60).text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(120)]
    for thread in threads:
        thread.start()
    for number in range(120):
        eventually(lambda n=number: worker.ledger.view(f"job-{n}"), what=f"job {number} is submitted")
        worker.answer(f"job-{number}", str(number))
    for thread in threads:
        thread.join(60)
    assert texts == {number: str(number) for number in range(120)}


def test_a_closed_client_leaves_no_connection(redis_url: str, redis_client: redis.Redis) -> None:
    def num_connections() -> int:
        return len(redis_client.client_list())

    before = num_connections()
    with Client(redis_url) as client:
        job = client.vqa(question="Why?")
        job.cancel()
        with pytest.raises(JobFailed):
            job.result()
        assert num_connections() > before

    async def use() -> None:
        async with AsyncClient(redis_url) as client:
            await (await client.vqa(question="Why?")).cancel()

    asyncio.run(use())
    gc.collect()  # an unclosed socket would warn here, and warnings are errors
    eventually(lambda: num_connections() <= before, what="every connection is closed")


def test_url_and_settings_together_are_refused(redis_url: str) -> None:
    with pytest.raises(TypeError, match="not both"):
        Client(redis_url, ClientSettings())


@pytest.mark.parametrize(("one", "other"), [(Client, AsyncClient), (JobHandle, AsyncJobHandle)])
def test_both_clients_have_the_same_methods_and_arguments(one: type, other: type) -> None:
    def surface(kind: type) -> dict[str, list[str]]:
        public = inspect.getmembers(kind, lambda member: inspect.isfunction(member) and member.__name__[0] != "_")
        return {name: list(inspect.signature(method).parameters) for name, method in public}

    assert surface(one) == surface(other)


def test_the_package_names_its_public_parts_and_nothing_else() -> None:
    assert [getattr(api_stub, name).__name__ for name in api_stub.__all__] == api_stub.__all__
    with pytest.raises(AttributeError, match="Clint"):
        _ = api_stub.Clint
