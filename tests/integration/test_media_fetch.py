"""Media reads against a real S3, and against the same S3 on a bad day."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest
from PIL import Image

from api_stub.contract.error import ErrorCode
from api_stub.ledger.backoff import Backoff
from tests.servers import S3Server, eventually, free_port
from tests.storage_faults import (
    Before,
    Drip,
    FaultyStorage,
    Lie,
    Reset,
    Silence,
    Stall,
    Status,
    Truncate,
    faulty_storage,
)
from worker.errors import (
    InvalidRequest,
    MediaCorrupt,
    MediaForbidden,
    MediaNotFound,
    MediaRefused,
    MediaTooLarge,
    MediaUnsupported,
    StorageRefuses,
    StorageUnavailable,
    WorkerError,
)
from worker.media.fetch import FetchedMedia, ObjectFetcher
from worker.media.sniff import MediaFormat, MediaKind
from worker.media.storage import s3_client
from worker.media.types import MediaPolicy

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

POLICY = MediaPolicy(frozenset({"media", "absent"}), max_image_bytes=400_000, max_video_bytes=1_000_000)
TIMEOUT_S = 1.0
BACKOFF = Backoff(first_s=0.02, max_s=5)


class Stopped(Exception):
    """What a cancelled job's `should_stop` raises."""


def png(colour: tuple[int, int, int] = (200, 30, 30), side: int = 200) -> bytes:
    """A PNG of incompressible size: about 3 bytes a pixel."""
    picture = Image.effect_noise((side, side), 80).convert("RGB")
    picture.paste(colour, (0, 0, side // 4, side // 4))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def go_on() -> None:
    """A job that nobody cancels."""


@pytest.fixture
def storage(s3_server: S3Server, s3_client: S3Client) -> Iterator[FaultyStorage]:
    with faulty_storage(s3_server.url) as proxy:
        yield proxy


@pytest.fixture
def fetch(storage: FaultyStorage, tmp_path: Path) -> Callable[..., object]:
    return lambda uri, should_stop=go_on: fetched_by(fetcher_at(storage.url), uri, tmp_path, should_stop)


def fetched_by(
    fetcher: ObjectFetcher, uri: str, directory: Path, should_stop: Callable[[], None] = go_on
) -> FetchedMedia:
    """Both steps at once."""
    return fetcher.read(fetcher.head(uri, should_stop=should_stop), directory, should_stop=should_stop)


def fetcher_at(url: str, policy: MediaPolicy = POLICY, retries: int = 2) -> ObjectFetcher:
    return ObjectFetcher(s3_client(url, "us-east-1", TIMEOUT_S), policy, retries=retries, backoff=BACKOFF)


def test_an_object_arrives_whole_with_its_kind_by_content(s3_client: S3Client, fetch, tmp_path: Path) -> None:
    body = png()
    stored = s3_client.put_object(Bucket="media", Key="whole.txt", Body=body, ContentType="text/plain")
    fetched = fetch("s3://media/whole.txt")
    assert fetched.path.read_bytes() == body
    assert (fetched.kind, fetched.format, fetched.stored.num_bytes) == (MediaKind.IMAGE, MediaFormat.PNG, len(body))
    assert fetched.stored.etag == stored["ETag"]
    assert list(tmp_path.iterdir()) == [fetched.path]


@pytest.mark.parametrize("key", ["a b/ü?#%41.png", "/..escape.png", "x" * 900, "a/...//c.png", "tab\tline.png"])
def test_a_key_never_names_the_file(s3_client: S3Client, s3_server: S3Server, tmp_path: Path, key: str) -> None:
    body = png(side=20)
    s3_client.put_object(Bucket="media", Key=key, Body=body)
    fetched = fetched_by(fetcher_at(s3_server.url), f"s3://media/{quote(key)}", tmp_path)
    assert fetched.path.read_bytes() == body
    assert fetched.path.parent == tmp_path
    assert fetched.path.name.startswith("media-")


def test_a_named_version_is_read_and_not_the_newest(s3_client: S3Client, fetch) -> None:
    s3_client.put_bucket_versioning(Bucket="media", VersioningConfiguration={"Status": "Enabled"})
    old, new = png((1, 2, 3), 20), png((9, 8, 7), 30)
    version = s3_client.put_object(Bucket="media", Key="versions.png", Body=old)["VersionId"]
    newer = s3_client.put_object(Bucket="media", Key="versions.png", Body=new)["VersionId"]
    named, newest = fetch(f"s3://media/versions.png?versionId={version}"), fetch("s3://media/versions.png")
    assert (named.path.read_bytes(), newest.path.read_bytes()) == (old, new)
    assert [fetched.stored.identity.version_id for fetched in (named, newest)] == [version, newer]


def test_a_foreign_bucket_is_refused_before_any_network(tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(MediaForbidden, match="'private' is not one that this worker may read"):
        fetched_by(fetcher_at(nobody), "s3://private/secret.png", tmp_path)


def test_a_malformed_uri_is_an_invalid_request(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="s3:// URI"):
        fetched_by(fetcher_at("http://127.0.0.1:9"), "file:///etc/passwd", tmp_path)


@pytest.mark.parametrize("uri", ["s3://media/nothing.png", "s3://absent/nothing.png"])
def test_a_missing_object_or_bucket_is_not_found(fetch, storage: FaultyStorage, uri: str) -> None:
    with pytest.raises(MediaNotFound, match=uri):
        fetch(uri)
    assert storage.seen == ["HEAD"]


@pytest.mark.parametrize("version", ["00000000-0000-0000-0000-000000000000", "rubbish"])
def test_a_missing_version_is_not_found(s3_client: S3Client, fetch, version: str) -> None:
    s3_client.put_object(Bucket="media", Key="one.png", Body=png(side=20))
    with pytest.raises(MediaNotFound, match="versionId="):
        fetch(f"s3://media/one.png?versionId={version}")


def test_a_version_that_storage_calls_malformed_is_not_found(fetch, storage: FaultyStorage) -> None:
    storage.always = Status(400)
    with pytest.raises(MediaNotFound, match="no such version"):
        fetch("s3://media/one.png?versionId=rubbish")


def test_a_refusal_says_that_it_may_mean_a_missing_object(fetch, storage: FaultyStorage) -> None:
    storage.of_object = {"hidden.png": Status(403, "AccessDenied")}
    with pytest.raises(
        MediaForbidden, match=r"AccessDenied.* may not read it, or it does not exist and the worker may"
    ):
        fetch("s3://media/hidden.png")
    assert storage.seen == ["HEAD", "GET", "HEAD", "GET"]


def test_a_refusal_that_ends_while_it_is_looked_into_is_no_fault_of_the_object(
    s3_client: S3Client, storage: FaultyStorage, tmp_path: Path
) -> None:
    for key in ("served.png", "next.png"):
        s3_client.put_object(Bucket="media", Key=key, Body=png(side=20))
    fetcher, denied = fetcher_at(storage.url), Status(403, "AccessDenied")
    fetched_by(fetcher, "s3://media/served.png", tmp_path)
    for plan in ({"HEAD": [denied]}, {"HEAD": [denied], "GET": [denied]}, {"GET": [denied]}):
        storage.plan = plan  # refused, then refused with a code, or not any more
        assert fetched_by(fetcher, "s3://media/next.png", tmp_path).stored.num_bytes
        assert not any(storage.plan.values())


def refused(storage: FaultyStorage, tmp_path: Path, code: str, *, is_known: bool, status: int = 403) -> Exception:
    """What a read raises when storage refuses everything; `is_known`: it served this worker before."""
    fetcher = fetcher_at(storage.url)
    if is_known:
        fetched_by(fetcher, "s3://media/served.png", tmp_path)
    storage.always = Status(status, code)
    with pytest.raises(WorkerError) as caught:
        fetched_by(fetcher, "s3://media/served.png", tmp_path)
    assert not fetcher.is_served()
    storage.always = None
    assert fetcher.is_served()
    return caught.value


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "RequestTimeTooSkewed"), (400, "ExpiredToken"), (403, "InvalidAccessKeyId"),
        (403, "SignatureDoesNotMatch"), (400, "InvalidToken"),
    ],
)  # fmt: skip
def test_a_worker_without_valid_credentials_is_to_blame_and_no_job(
    s3_client: S3Client, storage: FaultyStorage, tmp_path: Path, status: int, code: str, is_known: bool
) -> None:
    s3_client.put_object(Bucket="media", Key="served.png", Body=png(side=20))
    error = refused(storage, tmp_path, code, is_known=is_known, status=status)
    assert isinstance(error, StorageRefuses)
    assert error.is_proven
    assert code in str(error)


def test_a_worker_that_may_read_nothing_any_more_is_suspect(
    s3_client: S3Client, storage: FaultyStorage, tmp_path: Path
) -> None:
    s3_client.put_object(Bucket="media", Key="served.png", Body=png(side=20))
    known = refused(storage, tmp_path, "AccessDenied", is_known=True)
    assert isinstance(known, StorageRefuses)
    assert not known.is_proven, "the object that it may not read any more may be the only one"
    assert isinstance(refused(storage, tmp_path, "AccessDenied", is_known=False), MediaRefused)


@pytest.mark.parametrize("code", ["AccessDenied", "SignatureDoesNotMatch"])
def test_an_object_that_is_refused_while_others_are_served_is_the_jobs_own_fault(
    s3_client: S3Client, storage: FaultyStorage, tmp_path: Path, code: str
) -> None:
    for key in ("served.png", "hidden.png"):
        s3_client.put_object(Bucket="media", Key=key, Body=png(side=20))
    fetcher = fetcher_at(storage.url)
    fetched_by(fetcher, "s3://media/served.png", tmp_path)
    storage.of_object = {"hidden.png": Status(403, code)}
    with pytest.raises(MediaForbidden) as caught:
        fetched_by(fetcher, "s3://media/hidden.png", tmp_path)
    assert caught.value.component is None
    s3_client.delete_object(Bucket="media", Key="served.png")
    with pytest.raises(MediaForbidden):  # what is gone was not refused
        fetched_by(fetcher, "s3://media/hidden.png", tmp_path)


def test_a_bucket_of_others_proves_no_worker_sick_that_is_served_from_another(
    s3_client: S3Client, storage: FaultyStorage, tmp_path: Path
) -> None:
    s3_client.put_object(Bucket="media", Key="served.png", Body=png(side=20))
    fetcher = fetcher_at(storage.url)
    fetched_by(fetcher, "s3://media/served.png", tmp_path)
    unknown = Status(403, "InvalidAccessKeyId")
    storage.plan = {"HEAD": [unknown, unknown], "GET": [unknown]}
    with pytest.raises(MediaRefused) as caught:
        fetched_by(fetcher, "s3://absent/theirs.png", tmp_path)
    assert not caught.value.is_proven
    assert storage.plan == {"HEAD": [], "GET": []}


def test_no_bytes_are_corrupt_media(s3_client: S3Client, fetch) -> None:
    s3_client.put_object(Bucket="media", Key="empty.png", Body=b"")
    with pytest.raises(MediaCorrupt, match="0 bytes"):
        fetch("s3://media/empty.png")


def test_a_large_object_is_refused_by_its_length_alone(s3_client: S3Client, fetch, storage: FaultyStorage) -> None:
    s3_client.put_object(Bucket="media", Key="large.mp4", Body=b"\0" * 1_000_001)
    with pytest.raises(MediaTooLarge, match="1000001 bytes, the limit is 1000000"):
        fetch("s3://media/large.mp4")
    assert storage.seen == ["HEAD"]


def test_an_image_has_its_own_smaller_limit(s3_client: S3Client, fetch, tmp_path: Path) -> None:
    s3_client.put_object(Bucket="media", Key="large.png", Body=png().ljust(900_000, b"\0"))
    with pytest.raises(MediaTooLarge, match="has 900000 bytes, the limit is 400000"):
        fetch("s3://media/large.png")
    assert list(tmp_path.iterdir()) == []


def test_a_body_longer_than_promised_stops_at_the_limit(s3_client: S3Client, fetch, storage: FaultyStorage) -> None:
    s3_client.put_object(Bucket="media", Key="liar.png", Body=png() + bytes(400_000))
    storage.plan["HEAD"] = [Lie(1_000)]
    with pytest.raises(MediaTooLarge):
        fetch("s3://media/liar.png")
    assert storage.seen == ["HEAD", "GET"]


def test_text_named_png_is_refused_and_named(s3_client: S3Client, fetch, tmp_path: Path) -> None:
    s3_client.put_object(Bucket="media", Key="notes.png", Body=b"Dear diary,\ntoday " * 50, ContentType="image/png")
    with pytest.raises(MediaUnsupported, match=r"s3://media/notes\.png: .* but text"):
        fetch("s3://media/notes.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "plan",
    [
        {"HEAD": [Status(500), Status(503, "SlowDown")]},
        {"GET": [Status(503, "SlowDown"), Status(429)]},
        {"GET": [Truncate(1_000), Truncate(70_000)]},
        {"GET": [Stall(1_000)]},
        {"HEAD": [Silence()]},
        {"HEAD": [Reset()], "GET": [Reset()]},
        {"HEAD": [Lie(1_000)]},
    ],
    ids=["500 and 503", "503 and 429", "truncated", "stalled body", "silence", "reset", "wrong length"],
)
def test_a_passing_fault_is_retried_and_the_bytes_are_right(
    s3_client: S3Client, fetch, storage: FaultyStorage, tmp_path: Path, plan: dict[str, list[object]]
) -> None:
    body = png()
    s3_client.put_object(Bucket="media", Key="retried.png", Body=body)
    storage.plan = plan
    fetched = fetch("s3://media/retried.png")
    assert fetched.path.read_bytes() == body
    assert fetched.stored.num_bytes == len(body)
    assert not any(storage.plan.values()), "every fault was met"
    assert list(tmp_path.iterdir()) == [fetched.path]


def test_an_object_that_changes_between_head_and_get_is_read_anew(
    s3_client: S3Client, fetch, storage: FaultyStorage
) -> None:
    old, new = (png(colour, 40).ljust(9_000, b"\0") for colour in ((1, 1, 1), (2, 2, 2)))
    assert len(old) == len(new), "only the ETag tells them apart"
    s3_client.put_object(Bucket="media", Key="changing.png", Body=old)
    storage.plan["GET"] = [Before(lambda: s3_client.put_object(Bucket="media", Key="changing.png", Body=new))]
    fetched = fetch("s3://media/changing.png")
    assert fetched.path.read_bytes() == new
    assert storage.seen == ["HEAD", "GET", "HEAD", "GET"]


@pytest.mark.parametrize("fault", [Status(503, "SlowDown"), Reset()], ids=["503", "reset"])
def test_a_lasting_fault_ends_as_storage_unavailable(
    fetch, storage: FaultyStorage, tmp_path: Path, fault: Status | Reset
) -> None:
    storage.always = fault
    with pytest.raises(StorageUnavailable, match="tried 3 times") as caught:
        fetch("s3://media/any.png")
    assert storage.seen == ["HEAD"] * 3
    assert caught.value.info().code is ErrorCode.STORAGE_UNAVAILABLE
    assert caught.value.info().retryable
    assert list(tmp_path.iterdir()) == []


def test_nobody_listening_is_storage_unavailable_without_an_endpoint_in_the_message(tmp_path: Path) -> None:
    port = free_port()
    with pytest.raises(StorageUnavailable) as caught:
        fetched_by(fetcher_at(f"http://127.0.0.1:{port}"), "s3://media/any.png", tmp_path)
    assert str(port) not in str(caught.value)
    assert "test-secret" not in str(caught.value)


def test_a_job_leaves_a_silent_socket_at_once(s3_client: S3Client, storage: FaultyStorage, tmp_path: Path) -> None:
    s3_client.put_object(Bucket="media", Key="silent.png", Body=png())
    storage.plan["GET"] = [Stall(1_000)]
    patient = ObjectFetcher(s3_client_with(storage.url, timeout_s=30), POLICY, retries=5)
    stop_at = time.monotonic() + 0.3

    def should_stop() -> None:
        if time.monotonic() > stop_at:
            raise Stopped

    with pytest.raises(Stopped):
        fetched_by(patient, "s3://media/silent.png", tmp_path, should_stop)
    assert time.monotonic() < stop_at + 1.0
    assert list(tmp_path.iterdir()) == []


def test_storage_that_trickles_is_a_fault_and_leaves_no_thread_behind(
    s3_client: S3Client, storage: FaultyStorage, tmp_path: Path
) -> None:
    s3_client.put_object(Bucket="media", Key="trickle.png", Body=png())
    storage.plan["GET"] = [Drip(pause_s=0.05, piece_bytes=16)] * 2
    impatient = ObjectFetcher(s3_client_with(storage.url, timeout_s=5), POLICY, retries=1, backoff=BACKOFF, try_s=0.6)
    with pytest.raises(StorageUnavailable, match=r"not read within \d+ s .tried 2 times") as failure:
        fetched_by(impatient, "s3://media/trickle.png", tmp_path)
    assert "trickle.png" in str(failure.value)
    assert list(tmp_path.iterdir()) == []
    eventually(lambda: not fetch_threads(), 15, "the abandoned reads have ended")


def test_a_job_is_stopped_while_it_waits_for_its_next_try(storage: FaultyStorage, tmp_path: Path) -> None:
    storage.always = Status(500)
    slow = ObjectFetcher(
        s3_client_with(storage.url, timeout_s=1), POLICY, retries=20, backoff=Backoff(first_s=5, max_s=5)
    )
    stop = threading.Event()

    def should_stop() -> None:
        if len(storage.seen) == 1:
            stop.set()
        if stop.is_set():
            raise Stopped

    started = time.monotonic()
    with pytest.raises(Stopped):
        fetched_by(slow, "s3://media/any.png", tmp_path, should_stop)
    assert time.monotonic() < started + 2.0


def test_no_thread_outlives_its_fetch_for_longer_than_a_timeout(fetch, storage: FaultyStorage) -> None:
    storage.always = Silence()
    with pytest.raises(Stopped):
        fetch("s3://media/any.png", should_stop=stopper(after=2))
    eventually(lambda: not fetch_threads(), 2 * TIMEOUT_S + 3, "abandoned thread ends")


def test_an_abandoned_download_stops_in_the_middle(s3_client: S3Client, fetch, storage: FaultyStorage) -> None:
    s3_client.put_object(Bucket="media", Key="slow.mp4", Body=b"\x00\x00\x00\x20ftypisom".ljust(900_000, b"\0"))
    storage.plan["GET"] = [Drip(0.5)]
    with pytest.raises(Stopped):
        fetch("s3://media/slow.mp4", should_stop=stopper(after=4))
    eventually(lambda: not fetch_threads(), 2.0, "the rest of the 7 s is not read")


def test_many_jobs_fetch_at_once_and_get_their_own_object(s3_client: S3Client, fetch, tmp_path: Path) -> None:
    bodies = {f"many/{number}.png": png((number, 0, 0), 20 + number) for number in range(24)}
    for key, body in bodies.items():
        s3_client.put_object(Bucket="media", Key=key, Body=body)
    with ThreadPoolExecutor(12) as pool:
        fetched = dict(zip(bodies, pool.map(lambda key: fetch(f"s3://media/{key}"), bodies), strict=True))
    assert {key: media.path.read_bytes() for key, media in fetched.items()} == bodies
    assert len({media.path for media in fetched.values()}) == len(bodies)


def s3_client_with(url: str, timeout_s: float) -> S3Client:
    return s3_client(url, "us-east-1", timeout_s)


def stopper(after: int) -> Callable[[], None]:
    calls = iter(range(after))

    def should_stop() -> None:
        if next(calls, None) is None:
            raise Stopped
        return

    return should_stop


def fetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "media-fetch"]
