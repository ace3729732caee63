"""Read one object from S3 into a file: allow-listed buckets only, sizes capped, faults retried.

In: a media URI and a directory of the caller's. Out: a file there and what its first bytes say it is. The name of the
file never comes from the key. Decoding is not done here.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkstemp
from typing import IO, TYPE_CHECKING, Any

import boto3
from botocore.config import Config

from api_stub.contract.media import S3Object
from worker.errors import (
    InvalidRequest,
    MediaCorrupt,
    MediaForbidden,
    MediaTooLarge,
    MediaUnsupported,
    StorageUnavailable,
    WorkerError,
)
from worker.media.faults import STORAGE_ERRORS, is_passing, translate
from worker.media.policy import MediaPolicy
from worker.media.sniff import HEAD_BYTES, MediaFormat, MediaKind, sniff

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client

logger = logging.getLogger(__name__)

CHUNK_BYTES = 64 * 1024
POLL_S = 0.1
FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 5.0


@dataclass(frozen=True, slots=True)
class FetchedMedia:
    """An object on disk. The file belongs to the caller's directory and goes with it."""

    path: Path
    format: MediaFormat
    num_bytes: int
    etag: str
    version_id: str | None

    @property
    def kind(self) -> MediaKind:
        """Image or clip, by the object's own bytes."""
        return self.format.kind


def s3_client(endpoint_url: str | None, region: str, timeout_s: float, *, max_connections: int = 256) -> S3Client:
    """Build the client that `MediaFetcher` reads with; it may be shared by threads.

    Path-style addresses work on every S3 server. botocore's own retries are off: they would be invisible to
    deadlines and multiply ours. Credentials come from the usual AWS chain.
    """
    config = Config(
        connect_timeout=timeout_s,
        read_timeout=timeout_s,
        retries={"total_max_attempts": 1},
        max_pool_connections=max_connections,
        s3={"addressing_style": "path"},
    )
    client: S3Client = boto3.client("s3", endpoint_url=endpoint_url, region_name=region, config=config)
    return client


class _Passing(Exception):
    """Raised when a try failed in a way that the next one may not; carries what to say if none succeeds."""

    def __init__(self, final: WorkerError) -> None:
        super().__init__(str(final))
        self.final = final


class MediaFetcher:
    """Fetches media for many jobs at once; holds no state of any of them."""

    def __init__(
        self, client: S3Client, policy: MediaPolicy, *, retries: int, first_backoff_s: float = FIRST_BACKOFF_S
    ) -> None:
        self._client = client
        self._policy = policy
        self._retries = retries
        self._first_backoff_s = first_backoff_s

    def fetch(self, uri: str, directory: Path, *, should_stop: Callable[[], None]) -> FetchedMedia:
        """Read the object at `uri` into a new file in `directory`, which must exist.

        `should_stop` raises to give the job up (cancel, deadline, lost lease); it is called on the calling thread at
        least every `POLL_S`, also while storage is silent, and what it raises passes through.
        Each try heads the object and reads exactly that state (If-Match); an object that changes meanwhile is read
        anew. Passing faults are retried up to `retries` times with exponential backoff and jitter.

        Raises InvalidRequest, MediaForbidden (before any network for a foreign bucket), MediaNotFound, MediaTooLarge,
        MediaCorrupt (no bytes), MediaUnsupported (first bytes of no known format), StorageUnavailable.
        """
        media = self._allowed(uri)
        failed_tries = 0
        while True:
            should_stop()
            try:
                return self._try_once(media, directory, should_stop)
            except _Passing as fault:
                failed_tries += 1
                if failed_tries > self._retries:
                    raise StorageUnavailable(f"{fault.final} (tried {failed_tries} times)") from fault
                logger.warning("storage fault, trying again", extra={"action": "retry_fetch", "attempt": failed_tries})
            _wait(self._backoff_s(failed_tries), should_stop)

    def _allowed(self, uri: str) -> S3Object:
        try:
            media = S3Object.parse(uri)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        if media.bucket not in self._policy.buckets:
            raise MediaForbidden(f"bucket {media.bucket!r} is not one that this worker may read")
        return media

    def _backoff_s(self, failed_tries: int) -> float:
        """Exponential, capped, with "equal jitter" (AWS Architecture Blog, Exponential Backoff And Jitter)."""
        ceiling = min(MAX_BACKOFF_S, self._first_backoff_s * 2 ** (failed_tries - 1))
        return random.uniform(ceiling / 2, ceiling)

    def _try_once(self, media: S3Object, directory: Path, should_stop: Callable[[], None]) -> FetchedMedia:
        """Read on a thread of its own: a job must be able to leave a silent socket behind.

        An abandoned thread ends at its next chunk or its socket's timeout; it writes only to the file it was given.
        """
        descriptor, name = mkstemp(dir=directory, prefix="media-")
        path = Path(name)
        download = _Download(self._client, self._policy, media, path, descriptor)
        download.start()
        try:
            while not download.is_done(POLL_S):
                should_stop()
            return download.outcome()
        except BaseException:
            download.abandoned.set()
            path.unlink(missing_ok=True)
            raise


class _Download(threading.Thread):
    """One try at one object."""

    def __init__(self, client: S3Client, policy: MediaPolicy, media: S3Object, path: Path, descriptor: int) -> None:
        super().__init__(name="media-fetch", daemon=True)
        self.abandoned = threading.Event()
        self._client = client
        self._policy = policy
        self._media = media
        self._path = path
        self._descriptor = descriptor
        self._outcome: Future[FetchedMedia] = Future()

    def is_done(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s`; return whether the try has ended."""
        return bool(wait([self._outcome], timeout=timeout_s).done)

    def outcome(self) -> FetchedMedia:
        """Return what was fetched, or raise _Passing or the job's error."""
        return self._outcome.result()

    def run(self) -> None:
        try:
            with open(self._descriptor, "wb") as sink:  # noqa: PTH123 - a descriptor has no Path
                fetched = self._read(sink)
        except STORAGE_ERRORS as error:
            final = translate(error, self._media)
            self._outcome.set_exception(_Passing(final) if is_passing(error) else final)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised where the job runs
            self._outcome.set_exception(error)
        else:
            self._outcome.set_result(fetched)

    def _read(self, sink: IO[bytes]) -> FetchedMedia:
        media = self._media
        version: dict[str, Any] = {"VersionId": media.version_id} if media.version_id else {}
        head = self._client.head_object(Bucket=media.bucket, Key=media.key, **version)
        num_bytes, etag = head["ContentLength"], head["ETag"]
        self._check_size(num_bytes, max(self._policy.max_image_bytes, self._policy.max_video_bytes))
        answer = self._client.get_object(Bucket=media.bucket, Key=media.key, IfMatch=etag, **version)
        with closing(answer["Body"]) as body:
            found = self._save(body, sink, num_bytes)
        return FetchedMedia(self._path, found, num_bytes, etag.strip('"'), answer.get("VersionId"))

    def _save(self, body: StreamingBody, sink: IO[bytes], num_bytes: int) -> MediaFormat:
        """Copy the body; the first chunk decides the format, and so the cap, before the rest is read."""
        chunk = body.read(CHUNK_BYTES)
        try:
            found = sniff(chunk[:HEAD_BYTES])
        except MediaUnsupported as error:
            raise MediaUnsupported(f"{self._media.uri}: {error}") from error
        max_bytes = self._policy.max_image_bytes
        if found.kind is MediaKind.VIDEO:
            max_bytes = self._policy.max_video_bytes
        self._check_size(num_bytes, max_bytes)
        num_read = 0
        while chunk and not self.abandoned.is_set():
            num_read += len(chunk)
            self._check_size(num_read, max_bytes)
            sink.write(chunk)
            chunk = body.read(CHUNK_BYTES)
        if num_read != num_bytes:
            raise _Passing(StorageUnavailable(f"{self._media.uri}: {num_read} of {num_bytes} bytes arrived"))
        return found

    def _check_size(self, num_bytes: int, max_bytes: int) -> None:
        if num_bytes == 0:
            raise MediaCorrupt(f"{self._media.uri} is empty (0 bytes)")
        if num_bytes > max_bytes:
            raise MediaTooLarge(f"{self._media.uri} has {num_bytes} bytes, the limit is {max_bytes}")


def _wait(seconds: float, should_stop: Callable[[], None]) -> None:
    """Let a backoff pass, looking up every `POLL_S`."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        should_stop()
        time.sleep(min(POLL_S, left))
