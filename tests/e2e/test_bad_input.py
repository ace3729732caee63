"""Bad jobs: each gets its code and a message with field, limit and value; the worker serves the next job."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
from celery import Celery
from PIL import Image

from api_stub.client.client import Client
from api_stub.errors import InvalidRequest, JobFailed
from tests.processes import WorkerProcess
from tests.servers import RedisServer

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[Client]:
    with Client(redis_server.url) as client:
        yield client


@pytest.fixture
def celery(redis_server: RedisServer) -> Iterator[Celery]:
    app = Celery(broker=redis_server.url, backend=redis_server.url, set_as_current=False)
    yield app
    app.close()


def picture(colour: tuple[int, int, int] = (220, 40, 40)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "JPEG")
    return file.getvalue()


def header_bomb(side: int) -> bytes:
    """A PNG whose header promises side × side pixels and whose body has none of them."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def clip_without_frames(directory: Path) -> bytes:
    path = directory / "empty.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (32, 32))
    writer.release()
    if path.exists() and path.stat().st_size > 0:
        return path.read_bytes()
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (32, 32))
    writer.write(np.zeros((32, 32, 3), np.uint8))
    writer.release()
    return path.read_bytes()[:400]


OBJECTS = {
    "empty.jpg": (b"", "media_corrupt", ["0 bytes"]),
    "truncated.jpg": (picture()[:300], "media_corrupt", ["truncated.jpg"]),
    "text.png": (b"this is no picture, whatever its name says\n", "media_unsupported", ["text.png"]),
    "bomb.png": (header_bomb(20_000), "media_too_large", ["20000", "50000000"]),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_a_bad_object_fails_its_job_and_the_next_one_is_served(
    name: str, demo_worker: WorkerProcess, client: Client, s3_client: S3Client
) -> None:
    body, code, said = OBJECTS[name]
    s3_client.put_object(Bucket="media", Key=name, Body=body)
    s3_client.put_object(Bucket="media", Key="good.jpg", Body=picture())
    with pytest.raises(JobFailed) as failure:
        client.caption(f"s3://media/{name}").result(timeout=60)
    assert failure.value.code == code
    for words in said:
        assert words in failure.value.message
    assert client.caption("s3://media/good.jpg").result(timeout=60).text


def test_a_clip_with_no_frames_is_corrupt(
    demo_worker: WorkerProcess, client: Client, s3_client: S3Client, tmp_path: Path
) -> None:
    s3_client.put_object(Bucket="media", Key="frameless.avi", Body=clip_without_frames(tmp_path))
    with pytest.raises(JobFailed) as failure:
        client.video_qa("s3://media/frameless.avi", question="What moves?").result(timeout=60)
    assert failure.value.code == "media_corrupt"
    assert "frame" in failure.value.message


def test_a_missing_object_is_named(demo_worker: WorkerProcess, client: Client, s3_client: S3Client) -> None:
    with pytest.raises(JobFailed) as failure:
        client.caption("s3://media/no/such/object.png").result(timeout=60)
    assert failure.value.code == "media_not_found"
    assert "no/such/object.png" in failure.value.message


def test_a_foreign_bucket_is_refused_without_being_read(
    demo_worker: WorkerProcess, client: Client, s3_client: S3Client
) -> None:
    s3_client.put_object(Bucket="private", Key="secret.jpg", Body=picture())
    with pytest.raises(JobFailed) as failure:
        client.caption("s3://private/secret.jpg").result(timeout=60)
    assert failure.value.code == "media_forbidden"
    assert "private" in failure.value.message


def test_limits_for_pixels_reach_the_model_and_what_cannot_be_had_is_refused(
    demo_worker: WorkerProcess, client: Client, s3_client: S3Client
) -> None:
    """The demo's pictures are 64×64 pixels in patches of 16."""
    s3_client.put_object(Bucket="media", Key="good.jpg", Body=picture())
    whole = client.caption("s3://media/good.jpg").result(timeout=60)
    small = client.caption("s3://media/good.jpg", media_options={"max_pixels": 256}).result(timeout=60)
    assert whole.text != small.text, "one patch of a picture is another picture"
    assert whole.usage.media_tokens is None, "jobs that ask for nothing new get what they got before"
    assert small.usage.media_tokens is not None
    assert 0 < small.usage.media_tokens < small.usage.prompt_tokens
    assert client.caption("s3://media/good.jpg").result(timeout=60).text == whole.text
    for number, options in ((5000, {"min_pixels": 5000}), (2**28, {"min_pixels": 2**28, "max_pixels": 2**28})):
        with pytest.raises(JobFailed, match="media_options") as failure:
            client.caption("s3://media/good.jpg", media_options=options).result(timeout=60)
        assert failure.value.code == "invalid_request"
        assert str(number) in failure.value.message


def test_a_question_longer_than_the_context_names_both_numbers(demo_worker: WorkerProcess, client: Client) -> None:
    with pytest.raises(JobFailed) as failure:
        client.vqa(question="how many stars? " * 2000, max_new_tokens=8).result(timeout=60)
    assert failure.value.code == "prompt_too_long"
    assert "2048" in failure.value.message
    assert any(int(number) > 8000 for number in failure.value.message.split() if number.isdigit())


def test_a_job_over_the_size_limit_is_refused_at_submit_and_failed_when_it_comes_plainly(
    demo_worker: WorkerProcess, client: Client, celery: Celery
) -> None:
    with pytest.raises(InvalidRequest, match="262144"):
        client.vqa(question="x" * 300_000)
    with pytest.raises(JobFailed, match="262144") as failure:
        celery.send_task("visionq.vqa", kwargs={"question": "x" * 300_000}, queue="visionq.default").get(timeout=60)
    assert failure.value.code == "invalid_request"


def test_an_unknown_field_is_named(demo_worker: WorkerProcess, client: Client, celery: Celery) -> None:
    with pytest.raises((InvalidRequest, TypeError), match="colour"):
        client.vqa(question="hello", colour="red")
    with pytest.raises(JobFailed, match="colour") as failure:
        celery.send_task("visionq.vqa", kwargs={"question": "hello", "colour": "red"}, queue="visionq.default").get(
            timeout=60
        )
    assert failure.value.code == "invalid_request"


def test_positional_arguments_are_refused(demo_worker: WorkerProcess, celery: Celery) -> None:
    with pytest.raises(JobFailed, match="keyword") as failure:
        celery.send_task("visionq.vqa", args=["hello"], queue="visionq.default").get(timeout=60)
    assert failure.value.code == "invalid_request"


def test_queue_and_model_that_disagree_are_told_apart(demo_worker: WorkerProcess, celery: Celery) -> None:
    with pytest.raises(JobFailed) as failure:
        celery.send_task(
            "visionq.vqa", kwargs={"question": "hello", "model": "elsewhere"}, queue="visionq.default"
        ).get(timeout=60)
    assert failure.value.code == "model_mismatch"
    assert "elsewhere" in failure.value.message
    assert "default" in failure.value.message


def test_a_clip_where_an_image_is_due_is_unsupported(
    demo_worker: WorkerProcess, client: Client, s3_client: S3Client, tmp_path: Path
) -> None:
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (32, 32))
    for _ in range(5):
        writer.write(np.full((32, 32, 3), 128, np.uint8))
    writer.release()
    s3_client.upload_file(str(path), "media", "clip.avi")
    s3_client.put_object(Bucket="media", Key="still.jpg", Body=picture())
    with pytest.raises(JobFailed) as failure:
        client.caption("s3://media/clip.avi").result(timeout=60)
    assert failure.value.code == "media_unsupported"
    with pytest.raises(JobFailed) as failure:
        client.video_qa("s3://media/still.jpg", question="What moves?").result(timeout=60)
    assert failure.value.code == "media_unsupported"


def test_a_deadline_that_passes_while_running_ends_the_job(
    demo_worker: WorkerProcess, client: Client, s3_client: S3Client
) -> None:
    s3_client.put_object(Bucket="media", Key="good.jpg", Body=picture())
    job = client.caption(
        "s3://media/good.jpg", deadline_s=1.0, max_new_tokens=1900, min_new_tokens=1900, temperature=2.0
    )
    with pytest.raises(JobFailed) as failure:
        job.result(timeout=60)
    assert failure.value.code in {"deadline_exceeded", "expired"}
