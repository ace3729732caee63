"""Decoded media between jobs, against a real S3: how often it is read, and that nobody is given what it should not be.

A proxy counts the requests: every job heads every object; only a state that nobody has read yet costs a GET.
"""

from __future__ import annotations

import io
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from api_stub.contract.conversation import ImagePart, MediaPart, VideoPart
from api_stub.contract.job import TaskName
from api_stub.ledger.backoff import Backoff
from tests.decoding import shared_decoders
from tests.servers import S3Server, eventually
from tests.storage_faults import Before, FaultyStorage, Silence, Stall, Status, Unconditional, faulty_storage
from tests.unit.worker.media.drawn_clips import B_FRAMES, number_of
from worker.errors import (
    MediaForbidden,
    MediaNotFound,
    MediaTooLarge,
    MediaUnsupported,
    StorageRefuses,
    StorageUnavailable,
)
from worker.media.cache import MediaCache
from worker.media.collect import AnyMediaPart, Collected, MediaCollector
from worker.media.fetch import ObjectFetcher
from worker.media.storage import s3_client
from worker.media.types import DecodedImage, MediaPolicy

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

POLICY = MediaPolicy(frozenset({"media"}))
RED, BLUE = (255, 0, 0), (0, 0, 255)
SCENE = MediaPart(uri="s3://media/scene.png")
CLIP = VideoPart(uri="s3://media/clip.mp4")
TIMEOUT_S = 10.0


class Stopped(Exception):
    """What a cancelled job's `should_stop` raises."""


def go_on() -> None:
    """A job that nobody cancels."""


def png(colour: tuple[int, int, int], side: int = 32) -> bytes:
    """Return a plain picture; all have the same number of bytes, so that only the ETag tells them apart."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue().ljust(200, b"\0")


def put(client: S3Client, colour: tuple[int, int, int], key: str = "scene.png") -> str:
    """Store a plain picture; return its version, if the bucket keeps versions."""
    return client.put_object(Bucket="media", Key=key, Body=png(colour)).get("VersionId", "")


def colour_of(collected: Collected) -> object:
    (medium,) = collected.media
    assert isinstance(medium, DecodedImage)
    return medium.pixels.getpixel((5, 5))


@pytest.fixture
def storage(s3_server: S3Server, s3_client: S3Client) -> Iterator[FaultyStorage]:
    s3_client.put_bucket_versioning(Bucket="media", VersioningConfiguration={"Status": "Suspended"})
    put(s3_client, RED)
    s3_client.put_object(Bucket="media", Key="clip.mp4", Body=B_FRAMES.read_bytes())
    with faulty_storage(s3_server.url) as proxy:
        yield proxy


@pytest.fixture
def cache() -> MediaCache:
    return MediaCache(1 << 24)


@pytest.fixture
def collect(storage: FaultyStorage, cache: MediaCache) -> Callable[..., Collected]:
    return collecting(storage, cache)


def collecting(
    storage: FaultyStorage, cache: MediaCache, policy: MediaPolicy = POLICY, retries: int = 2
) -> Callable[..., Collected]:
    """Return what a job calls, on a worker with this cache and policy."""
    client = s3_client(storage.url, "us-east-1", TIMEOUT_S)
    fetcher = ObjectFetcher(client, policy, retries=retries, backoff=Backoff(first_s=0.02, max_s=5))
    collector = MediaCollector(fetcher, policy, cache, shared_decoders())

    def collect(*parts: AnyMediaPart, num_frames: int = 8, should_stop: Callable[[], None] = go_on) -> Collected:
        has_clips = any(isinstance(part, VideoPart) for part in parts)
        return collector.collect(
            parts,
            task=TaskName.VIDEO_QA if has_clips else TaskName.VQA,
            num_frames=num_frames,
            should_stop=should_stop,
            on_progress=lambda done, total: None,
        )

    return collect


def test_a_hundred_jobs_about_one_image_at_once_read_it_once(collect, storage: FaultyStorage, cache) -> None:
    all_came = Before(lambda: eventually(lambda: storage.seen.count("HEAD") == 100, TIMEOUT_S, "all jobs have come"))
    storage.plan["GET"] = [all_came]
    with ThreadPoolExecutor(100) as pool:
        collected = list(pool.map(lambda _: collect(SCENE), range(100)))
    assert len({id(one.media[0]) for one in collected}) == 1
    assert (storage.seen.count("HEAD"), storage.seen.count("GET")) == (100, 1)
    assert (cache.stats().hits, cache.stats().misses) == (99, 1)
    assert sum(one.decode_s > 0 for one in collected) == 1


def test_every_attempt_heads_the_object_and_a_changed_one_is_read_anew(
    collect, storage: FaultyStorage, s3_client: S3Client
) -> None:
    assert [colour_of(collect(SCENE)) for _ in range(2)] == [RED, RED]
    put(s3_client, BLUE)
    assert [colour_of(collect(SCENE)) for _ in range(2)] == [BLUE, BLUE]
    assert storage.seen == ["HEAD", "GET", "HEAD"] * 2
    put(s3_client, RED)
    assert colour_of(collect(SCENE)) == RED


def test_what_is_read_is_kept_as_the_state_that_was_read(collect, storage: FaultyStorage, s3_client: S3Client) -> None:
    storage.plan["GET"] = [Before(lambda: put(s3_client, BLUE))]
    assert colour_of(collect(SCENE)) == BLUE
    assert storage.seen == ["HEAD", "GET", "HEAD", "GET"]
    assert colour_of(collect(SCENE)) == BLUE
    put(s3_client, RED)
    assert colour_of(collect(SCENE)) == RED
    assert storage.seen[4:] == ["HEAD", "HEAD", "GET"]


def test_a_storage_without_if_match_cannot_pass_one_state_off_as_another(
    collect, storage: FaultyStorage, s3_client: S3Client
) -> None:
    storage.plan["GET"] = [Unconditional(lambda: put(s3_client, BLUE))]
    assert colour_of(collect(SCENE)) == BLUE
    put(s3_client, RED)
    assert colour_of(collect(SCENE)) == RED


def test_versions_are_different_objects_and_the_newest_is_also_its_version(
    collect, storage: FaultyStorage, s3_client: S3Client
) -> None:
    s3_client.put_bucket_versioning(Bucket="media", VersioningConfiguration={"Status": "Enabled"})
    old, new = (put(s3_client, colour, "versions.png") for colour in (RED, BLUE))
    named = [MediaPart(uri=f"s3://media/versions.png?versionId={version}") for version in (old, new)]
    assert [colour_of(collect(part)) for part in named * 2] == [RED, BLUE, RED, BLUE]
    assert colour_of(collect(MediaPart(uri="s3://media/versions.png"))) == BLUE
    assert (storage.seen.count("HEAD"), storage.seen.count("GET")) == (5, 2)


def test_two_numbers_of_frames_are_two_entries(collect, storage: FaultyStorage, cache: MediaCache) -> None:
    for num_frames in (3, 5, 3, 5):
        (clip,) = collect(CLIP, num_frames=num_frames).media
        assert [number_of(clip.frames[at]) for at in (0, -1)] == [0, 239]
        assert len(clip.frames) == num_frames
    assert (storage.seen.count("GET"), cache.stats().num_entries) == (2, 2)


@pytest.mark.parametrize("max_bytes", [0, 1 << 24], ids=["off", "on"])
def test_one_job_reads_an_object_once_however_often_it_names_it(storage: FaultyStorage, max_bytes: int) -> None:
    parts = [CLIP.model_copy(update={"num_frames": num_frames}) for num_frames in (2, 4, 2)]
    first, second, third = collecting(storage, MediaCache(max_bytes))(*parts).media
    assert first is third
    assert (len(first.frames), len(second.frames)) == (2, 4)
    assert storage.seen == ["HEAD", "GET"]


def test_without_bytes_every_job_reads(storage: FaultyStorage) -> None:
    collect = collecting(storage, MediaCache(0))
    assert [colour_of(collect(SCENE)) for _ in range(2)] == [RED, RED]
    assert storage.seen == ["HEAD", "GET"] * 2


def test_a_deleted_object_is_not_found_although_it_is_kept(collect, s3_client: S3Client) -> None:
    collect(SCENE)
    s3_client.delete_object(Bucket="media", Key="scene.png")
    with pytest.raises(MediaNotFound):
        collect(SCENE)


def test_storage_that_now_refuses_is_obeyed(collect, storage: FaultyStorage) -> None:
    collect(SCENE)
    storage.of_object = {"scene.png": Status(403, "AccessDenied")}
    with pytest.raises(StorageRefuses):
        collect(SCENE)


def test_a_bucket_that_left_the_allow_list_is_served_no_more(collect, storage: FaultyStorage, cache) -> None:
    collect(SCENE)
    storage.seen.clear()
    with pytest.raises(MediaForbidden):
        collecting(storage, cache, replace(POLICY, buckets=frozenset({"private"})))(SCENE)
    assert storage.seen == []


def test_stricter_limits_hold_for_what_was_kept_under_others(collect, storage: FaultyStorage, cache) -> None:
    collect(SCENE)
    with pytest.raises(MediaTooLarge, match=r"s3://media/scene\.png: 32×32"):
        collecting(storage, cache, replace(POLICY, max_image_pixels=1_000))(SCENE)


def test_a_kept_medium_of_the_wrong_kind_is_still_the_wrong_kind(collect) -> None:
    collect(SCENE)
    collect(CLIP)
    with pytest.raises(MediaUnsupported, match=r"a video where visionq\.vqa takes an image"):
        collect(ImagePart(uri=CLIP.uri))
    with pytest.raises(MediaUnsupported, match="an image where a video was named"):
        collect(VideoPart(uri=SCENE.uri))


def test_a_job_leaves_the_one_it_waits_for_at_its_own_cancel(collect, storage: FaultyStorage) -> None:
    storage.plan["GET"] = [Silence()]
    with ThreadPoolExecutor(1) as pool:
        leader_stop = threading.Event()
        leader = pool.submit(collect, SCENE, should_stop=raising_after(leader_stop))
        eventually(lambda: "GET" in storage.seen, TIMEOUT_S, "one job reads")
        stop_at = time.monotonic() + 0.3
        with pytest.raises(Stopped):
            collect(SCENE, should_stop=lambda: raise_after(stop_at))
        assert time.monotonic() < stop_at + 1.0
        assert not leader.done()
        leader_stop.set()
        assert isinstance(leader.exception(TIMEOUT_S), Stopped)


def test_those_who_wait_take_over_when_the_job_that_reads_is_cancelled(collect, storage: FaultyStorage) -> None:
    storage.plan["GET"] = [Stall(20)]
    stop = threading.Event()
    with ThreadPoolExecutor(9) as pool:
        leader = pool.submit(collect, SCENE, should_stop=raising_after(stop))
        eventually(lambda: "GET" in storage.seen, TIMEOUT_S, "one job reads")
        others = [pool.submit(collect, SCENE) for _ in range(8)]
        eventually(lambda: storage.seen.count("HEAD") == 9, TIMEOUT_S, "the others have come")
        stop.set()
        assert isinstance(leader.exception(TIMEOUT_S), Stopped)
        assert [colour_of(other.result(TIMEOUT_S)) for other in others] == [RED] * 8
    assert storage.seen.count("GET") == 2


def test_a_fault_that_one_job_met_is_not_the_others(storage: FaultyStorage, cache: MediaCache) -> None:
    collect = collecting(storage, cache, retries=0)
    storage.plan["GET"] = [Status(503, "SlowDown")]
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(collect, SCENE) for _ in range(8)]
        errors = [job.exception(TIMEOUT_S) for job in jobs]
    assert [type(error) for error in errors if error is not None] == [StorageUnavailable]
    assert colour_of(collect(SCENE)) == RED


def test_no_file_is_left_behind(collect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    collect(SCENE, CLIP)
    assert list(tmp_path.iterdir()) == []


def raise_after(moment: float) -> None:
    if time.monotonic() > moment:
        raise Stopped


def raising_after(event: threading.Event) -> Callable[[], None]:
    def should_stop() -> None:
        if event.is_set():
            raise Stopped

    return should_stop
