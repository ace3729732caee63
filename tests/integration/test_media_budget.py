"""The pixels that one job may hold, however many media it names."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from api_stub.contract.conversation import MediaPart
from api_stub.contract.job import TaskName
from tests.decoding import shared_decoders
from tests.servers import S3Server
from worker.errors import MediaTooLarge
from worker.media.cache import MediaCache
from worker.media.collect import MediaCollector
from worker.media.fetch import ObjectFetcher
from worker.media.storage import s3_client
from worker.media.types import MediaPolicy
from worker.media_access import media_policy
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

SIDE = 50


def test_a_job_over_its_pixel_budget_names_both_numbers(s3_server: S3Server, s3_client: S3Client) -> None:
    policy = MediaPolicy(buckets=frozenset({"media"}), max_job_pixels=2 * SIDE * SIDE)
    parts = []
    for index in range(3):
        file = io.BytesIO()
        Image.new("RGB", (SIDE, SIDE), (index, 0, 0)).save(file, "PNG")
        s3_client.put_object(Bucket="media", Key=f"budget-{index}.png", Body=file.getvalue())
        parts.append(MediaPart(uri=f"s3://media/budget-{index}.png"))
    assert len(collected(s3_server, policy, parts[:2])) == 2
    with pytest.raises(MediaTooLarge, match=f"{3 * SIDE * SIDE} pixels .* {2 * SIDE * SIDE}"):
        collected(s3_server, policy, parts)
    assert len(collected(s3_server, replace(policy, max_job_pixels=3 * SIDE * SIDE), parts)) == 3


def collected(server: S3Server, policy: MediaPolicy, parts: list[MediaPart]) -> list[object]:
    fetcher = ObjectFetcher(s3_client(server.url, "us-east-1", 5.0), policy, retries=0)
    collector = MediaCollector(fetcher, policy, MediaCache(0), shared_decoders())
    return list(
        collector.collect(
            parts, task=TaskName.VQA, num_frames=8, should_stop=lambda: None, on_progress=lambda done, total: None
        ).media
    )


def test_a_reservation_covers_what_is_decoded_and_no_job_is_larger_than_the_budget() -> None:
    policy = media_policy(WorkerSettings(decoded_bytes=4 << 20, max_job_pixels=10_000_000))
    assert (policy.max_job_pixels, policy.max_clip_pixels, policy.max_image_pixels) == (1 << 20,) * 3
    fetcher = ObjectFetcher(s3_client("http://127.0.0.1:1", "us-east-1", 5.0), policy, retries=0)
    collector = MediaCollector(fetcher, replace(policy, max_image_pixels=1000), MediaCache(0), shared_decoders())
    one, other = MediaPart(uri="s3://media/one.png"), MediaPart(uri="s3://media/other.png")
    assert collector.most_decoded_bytes([], task=TaskName.VQA, num_frames=8) == 0
    assert collector.most_decoded_bytes([one, one, other], task=TaskName.VQA, num_frames=8) == 8000
    assert collector.most_decoded_bytes([one], task=TaskName.VIDEO_QA, num_frames=8) == 4 << 20
