"""Reads one object from S3 into a file: from allow-listed buckets only, with size limits and retries.

In: a media URI. Out, in two steps: the object's current state, then a file in the caller's directory with the format
that its first bytes show. The file's name is never derived from the key. Does not decode.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import mkstemp
from typing import IO, TYPE_CHECKING, Final, TypeVar

from botocore.exceptions import ClientError

from api_stub.contract.media import S3Object
from api_stub.ledger.backoff import Backoff
from worker.errors import (
    InvalidRequest,
    MediaCorrupt,
    MediaForbidden,
    MediaTooLarge,
    MediaUnsupported,
    StorageUnavailable,
    WorkerError,
)
from worker.media.cache import ObjectIdentity
from worker.media.sniff import HEAD_BYTES, MediaFormat, MediaKind, sniff
from worker.media.storage import STORAGE_ERRORS, Refusals, is_passing, version_of
from worker.media.types import MediaPolicy

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Sizes of one read: small while storage is slow, so that an abandoned read ends soon; large while it is fast.
MIN_READ_BYTES, MAX_READ_BYTES = 512, 1024 * 1024
FAST_READ_S, SLOW_READ_S = 0.05, 0.5
#: A try may take this long plus the object's size at this rate; then it counts as failed.
TRY_S = 30.0
SLOWEST_BYTES_PER_S = 64 * 1024
POLL_S = 0.1
RETRIES: Final = Backoff(first_s=0.2, max_s=5.0, jitter=0.5)


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One state of an object, as storage reported it. `media` is the reference in the job."""

    media: S3Object
    num_bytes: int
    etag: str
    version_id: str | None

    @property
    def identity(self) -> ObjectIdentity:
        """The identity of this state for the cache."""
        return ObjectIdentity(self.media.bucket, self.media.key, self.version_id, self.etag)


@dataclass(frozen=True, slots=True)
class FetchedMedia:
    """An object on disk, in the caller's directory."""

    path: Path
    format: MediaFormat
    stored: StoredObject

    @property
    def kind(self) -> MediaKind:
        """Image or clip, by the object's first bytes."""
        return self.format.kind


class _TransientFault(Exception):
    """Raised when a try failed and the next one may succeed. `final` is the error if none does."""

    def __init__(self, final: WorkerError) -> None:
        super().__init__(str(final))
        self.final = final


class ObjectFetcher:
    """Fetches media for many jobs at once; keeps no state of a job. Any thread."""

    def __init__(
        self,
        client: S3Client,
        policy: MediaPolicy,
        *,
        retries: int,
        backoff: Backoff = RETRIES,
        try_s: float = TRY_S,
    ) -> None:
        self._client = client
        self._refusals = Refusals(client)
        self._try_s = try_s
        self._policy = policy
        self._retries = retries
        self._backoff = backoff

    def head(self, uri: str, *, should_stop: Callable[[], None]) -> StoredObject:
        """Ask for the state of the object at `uri` without reading it.

        `should_stop` raises to abort (cancel, deadline, lost lease); it is called on the calling thread at least every
        `POLL_S`, also while storage does not answer. Transient faults are retried up to `retries` times, with
        exponential backoff and jitter.

        Raises InvalidRequest, MediaForbidden (before any network for a foreign bucket), MediaNotFound, MediaTooLarge,
        MediaCorrupt (no bytes), StorageUnavailable.
        """
        media = self._allowed(uri)
        return self._retrying(
            lambda _: self._on_own_thread(media, 0, lambda _: self._head(media), should_stop), should_stop
        )

    def read(self, stored: StoredObject, directory: Path, *, should_stop: Callable[[], None]) -> FetchedMedia:
        """Read an object in the state that `head` returned into a new file in `directory`, which must exist.

        The request has an If-Match for that state. Each retry heads the object again, so that a later state is read if
        the object changed meanwhile: `FetchedMedia.stored` is the state that was read.

        Stops and raises as `head`, and MediaUnsupported (first bytes of no known format).
        """

        def one_try(failed_tries: int) -> FetchedMedia:
            descriptor, name = mkstemp(dir=directory, prefix="media-")

            def download(abandoned: threading.Event) -> FetchedMedia:
                with open(descriptor, "wb") as sink:  # noqa: PTH123 - a descriptor has no Path
                    state = self._head(stored.media) if failed_tries else stored
                    return self._download(state, sink, Path(name), abandoned)

            try:
                return self._on_own_thread(stored.media, stored.num_bytes, download, should_stop)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise

        return self._retrying(one_try, should_stop)

    def read_bytes(self, uri: str, max_bytes: int, *, should_stop: Callable[[], None]) -> bytes:
        """Return the content of an object of any format. Stops and raises as `head`."""
        media = self._allowed(uri)

        def ask(abandoned: threading.Event) -> bytes:
            answer = self._client.get_object(Bucket=media.bucket, Key=media.key, **version_of(media))
            stored = StoredObject(media, answer["ContentLength"], answer["ETag"], answer.get("VersionId"))
            _check_size(stored, stored.num_bytes, max_bytes)
            with closing(answer["Body"]) as body:
                content = b"".join(_chunks(body, abandoned))
            _check_whole(stored, len(content))
            return content

        return self._retrying(lambda _: self._on_own_thread(media, max_bytes, ask, should_stop), should_stop)

    def is_served(self) -> bool:
        """Return whether storage serves this worker from all its buckets, as far as can be tested without a job."""
        return all(self._refusals.is_served(bucket) for bucket in self._policy.buckets)

    def _allowed(self, uri: str) -> S3Object:
        try:
            media = S3Object.parse(uri)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        if media.bucket not in self._policy.buckets:
            raise MediaForbidden(f"bucket {media.bucket!r} is not one that this worker may read")
        return media

    def _retrying(self, one_try: Callable[[int], T], should_stop: Callable[[], None]) -> T:
        """Call `one_try` with the number of failed tries, until one succeeds or fails for good."""
        failed_tries = 0
        while True:
            should_stop()
            try:
                return one_try(failed_tries)
            except _TransientFault as fault:
                failed_tries += 1
                if failed_tries > self._retries:
                    raise StorageUnavailable(f"{fault.final} (tried {failed_tries} times)") from fault
                logger.warning("storage fault, trying again", extra={"action": "retry_fetch", "attempt": failed_tries})
            _wait(self._backoff.delay_s(failed_tries), should_stop)

    def _on_own_thread(
        self, media: S3Object, num_bytes: int, ask: Callable[[threading.Event], T], should_stop: Callable[[], None]
    ) -> T:
        """Call `ask` on a thread of its own, so that a job can abandon a socket that is silent or slow.

        The event that `ask` gets is set when it is abandoned; its thread then ends at its next read or its socket's
        timeout. Raises _TransientFault, also when `num_bytes` take too long, or the job's error.
        """
        limit_s = self._try_s + num_bytes / SLOWEST_BYTES_PER_S
        give_up_at = time.monotonic() + limit_s
        abandoned, outcome = threading.Event(), Future[T]()

        def run() -> None:
            try:
                answer = ask(abandoned)
            except STORAGE_ERRORS as error:
                final = self._refusals.judge(error, media)
                is_over = (
                    isinstance(error, ClientError) and type(final) is StorageUnavailable
                )  # a refusal that has passed
                outcome.set_exception(_TransientFault(final) if is_passing(error) or is_over else final)
            except BaseException as error:  # noqa: BLE001 - re-raised on the job's thread
                outcome.set_exception(error)
            else:
                outcome.set_result(answer)

        threading.Thread(target=run, name="media-fetch", daemon=True).start()
        try:
            while not wait([outcome], timeout=POLL_S).done:
                should_stop()
                if time.monotonic() > give_up_at:
                    raise _TransientFault(StorageUnavailable(f"{media.uri} was not read within {limit_s:.0f} s"))
            return outcome.result()
        except BaseException:
            abandoned.set()
            raise

    def _head(self, media: S3Object) -> StoredObject:
        answer = self._client.head_object(Bucket=media.bucket, Key=media.key, **version_of(media))
        stored = StoredObject(media, answer["ContentLength"], answer["ETag"], answer.get("VersionId"))
        _check_size(stored, stored.num_bytes, max(self._policy.max_image_bytes, self._policy.max_video_bytes))
        return stored

    def _download(self, stored: StoredObject, sink: IO[bytes], path: Path, abandoned: threading.Event) -> FetchedMedia:
        media = stored.media
        answer = self._client.get_object(Bucket=media.bucket, Key=media.key, IfMatch=stored.etag, **version_of(media))
        with closing(answer["Body"]) as body:
            found = self._save(body, sink, stored, abandoned)
        self._refusals.served(media)
        return FetchedMedia(path, found, replace(stored, etag=answer["ETag"], version_id=answer.get("VersionId")))

    def _save(
        self, body: StreamingBody, sink: IO[bytes], stored: StoredObject, abandoned: threading.Event
    ) -> MediaFormat:
        """Copy the body. The first chunk shows the format, and so the size limit, before the rest is read."""
        first = next(chunks := _chunks(body, abandoned), b"")
        try:
            found = sniff(first[:HEAD_BYTES])
        except MediaUnsupported as error:
            raise MediaUnsupported(f"{stored.media.uri}: {error}") from error
        is_video = found.kind is MediaKind.VIDEO
        max_bytes = self._policy.max_video_bytes if is_video else self._policy.max_image_bytes
        _check_size(stored, stored.num_bytes, max_bytes)
        num_read = 0
        for chunk in chain((first,), chunks):
            num_read += len(chunk)
            _check_size(stored, num_read, max_bytes)
            sink.write(chunk)
        _check_whole(stored, num_read)
        return found


def _chunks(body: StreamingBody, abandoned: threading.Event) -> Iterator[bytes]:
    """Read a body in chunks whose size adapts to its speed; end early when the read is abandoned."""
    num_bytes = HEAD_BYTES  # the first chunk decides the format
    while not abandoned.is_set():
        started_at = time.monotonic()
        chunk = body.read(num_bytes)
        if not chunk:
            return
        yield chunk
        took_s = time.monotonic() - started_at
        if took_s > SLOW_READ_S:
            num_bytes = max(MIN_READ_BYTES, num_bytes // 8)
        elif took_s < FAST_READ_S:
            num_bytes = min(MAX_READ_BYTES, num_bytes * 2)


def _check_whole(stored: StoredObject, num_read: int) -> None:
    if num_read != stored.num_bytes:
        raise _TransientFault(StorageUnavailable(f"{stored.media.uri}: {num_read} of {stored.num_bytes} bytes arrived"))


def _check_size(stored: StoredObject, num_bytes: int, max_bytes: int) -> None:
    if num_bytes == 0:
        raise MediaCorrupt(f"{stored.media.uri} is empty (0 bytes)")
    if num_bytes > max_bytes:
        raise MediaTooLarge(f"{stored.media.uri} has {num_bytes} bytes, the limit is {max_bytes}")


def _wait(seconds: float, should_stop: Callable[[], None]) -> None:
    """Wait, calling `should_stop` every `POLL_S`."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        should_stop()
        time.sleep(min(POLL_S, left))
