"""Fetches and decodes all media of one job, in the order of the conversation.

In: the job's media parts. Out: one DecodedMedia per part. Media that earlier jobs decoded from the same state of an
object come from the cache; an object that is named twice is headed, read and decoded once. A job's files are in a
directory of their own; directories that a killed worker left are removed at the next start.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from api_stub.contract.conversation import ImagePart, MediaPart, TextPart, Turn, VideoPart
from api_stub.contract.job import TaskName
from worker.errors import MediaTooLarge, MediaUnsupported, RequestError
from worker.media.cache import Made, MediaCache, MediaKey
from worker.media.decoders import Decoders
from worker.media.fetch import FetchedMedia, ObjectFetcher, StoredObject
from worker.media.sniff import MediaKind
from worker.media.types import PIXEL_BYTES, DecodedClip, DecodedMedia, MediaPolicy

_NAME = re.compile(r"visionq-media-(?P<pid>\d+)-.*")

AnyMediaPart = ImagePart | VideoPart | MediaPart


@contextmanager
def job_directory() -> Iterator[Path]:
    """Make a directory for a job's files, whose name holds this process's id; it is removed with its content."""
    with tempfile.TemporaryDirectory(prefix=f"visionq-media-{os.getpid()}-") as directory:
        yield Path(directory)


def remove_leftovers() -> int:
    """Remove the directories of processes that have ended; return their number. Call it before the first job."""
    leftovers = [path for path in Path(tempfile.gettempdir()).iterdir() if _is_leftover(path)]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return len(leftovers)


def _is_leftover(path: Path) -> bool:
    name = _NAME.fullmatch(path.name)
    if name is None:
        return False
    pid = int(name["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return pid == os.getpid()  # before the first job, such a directory is of an earlier process with this id


@dataclass(frozen=True, slots=True)
class Wanted:
    """An object that a job needs: the kinds it may have, and the frames to sample if it is a clip."""

    uri: str
    kinds: tuple[MediaKind, ...]
    num_frames: int
    task: TaskName

    @classmethod
    def of(cls, part: AnyMediaPart, task: TaskName, num_frames: int) -> Wanted:
        """Return what a part needs. A part without a kind may be an image, and in a video question a clip."""
        if isinstance(part, VideoPart):
            return cls(part.uri, (MediaKind.VIDEO,), part.num_frames or num_frames, task)
        if isinstance(part, MediaPart) and task is TaskName.VIDEO_QA:
            return cls(part.uri, (MediaKind.VIDEO, MediaKind.IMAGE), num_frames, task)
        return cls(part.uri, (MediaKind.IMAGE,), num_frames, task)

    def key(self, stored: StoredObject, kind: MediaKind, policy: MediaPolicy) -> MediaKey:
        """Return the cache key of one state of the object as one kind."""
        return MediaKey(stored.identity, kind, self.num_frames if kind is MediaKind.VIDEO else 0, policy)

    def check(self, kind: MediaKind) -> None:
        """Raise MediaUnsupported for a clip where an image is required, or the reverse."""
        if kind in self.kinds:
            return
        if kind is MediaKind.VIDEO:
            raise MediaUnsupported(f"{self.uri}: a video where {self.task.value} takes an image")
        raise MediaUnsupported(f"{self.uri}: an image where a video was named")


@dataclass(frozen=True, slots=True)
class Collected:
    """A job's media in the order of its parts.

    decode_s: seconds that this job spent decoding, without what came from the cache.
    num_bytes: bytes that this job read from storage.
    """

    media: list[DecodedMedia]
    decode_s: float
    num_bytes: int

    @property
    def num_decoded_bytes(self) -> int:
        """Memory of the pixels; a medium that is named twice counts twice."""
        return PIXEL_BYTES * sum(medium.num_pixels for medium in self.media)


class MediaCollector:
    """Fetches and decodes for many jobs at once; keeps no state of a job except in the cache."""

    def __init__(self, fetcher: ObjectFetcher, policy: MediaPolicy, cache: MediaCache, decoders: Decoders) -> None:
        self._fetcher = fetcher
        self._decoders = decoders
        self._policy = policy
        self._cache = cache

    def most_decoded_bytes(self, parts: Sequence[AnyMediaPart], *, task: TaskName, num_frames: int) -> int:
        """Return the most bytes that the pixels of `parts` may take, before any of them is read."""
        distinct = {Wanted.of(part, task, num_frames) for part in parts}
        return PIXEL_BYTES * min(
            self._policy.max_job_pixels,
            sum(
                self._policy.max_clip_pixels if MediaKind.VIDEO in wanted.kinds else self._policy.max_image_pixels
                for wanted in distinct
            ),
        )

    def collect(
        self,
        parts: Sequence[AnyMediaPart],
        *,
        task: TaskName,
        num_frames: int,
        should_stop: Callable[[], None],
        on_progress: Callable[[int, int], None],
    ) -> Collected:
        """Fetch and decode every distinct object of `parts`, in order.

        `on_progress(done, total)` is called before each object and at the end. `should_stop` raises to abort. Files are
        in a directory of the job's own, which is removed before this returns.

        Raises MediaUnsupported for a clip where an image is required, or the reverse, and for a video question without
        a clip; and what the fetcher and the decoders raise.
        """
        wanted = [Wanted.of(part, task, num_frames) for part in parts]
        uris = list(dict.fromkeys(part.uri for part in parts))
        media: dict[Wanted, DecodedMedia] = {}
        num_bytes = 0
        with job_directory() as directory:
            work = _Work(self._fetcher, self._decoders, self._policy, directory, should_stop)
            for done, uri in enumerate(uris):
                on_progress(done, len(uris))
                stored = self._fetcher.head(uri, should_stop=should_stop)
                num_bytes += stored.num_bytes
                self._check_bytes(num_bytes)
                for one in dict.fromkeys(one for one in wanted if one.uri == uri):
                    media[one] = self._one(one, stored, work)
                    self._check_pixels(media.values())
        on_progress(len(uris), len(uris))
        in_order = [media[one] for one in wanted]
        if task is TaskName.VIDEO_QA and not any(isinstance(medium, DecodedClip) for medium in in_order):
            raise MediaUnsupported(f"media: a video question needs at least 1 video, got {len(parts)} images")
        num_bytes_read = sum(fetched.stored.num_bytes for fetched in work.files.values())
        return Collected(in_order, work.decode_s, num_bytes_read)

    def _check_bytes(self, num_bytes: int) -> None:
        if num_bytes > self._policy.max_job_bytes:
            raise MediaTooLarge(
                f"media: {num_bytes} bytes stored so far, the limit of a job is {self._policy.max_job_bytes}"
            )

    def _check_pixels(self, media: Iterable[DecodedMedia]) -> None:
        num_pixels = sum(medium.num_pixels for medium in media)
        if num_pixels > self._policy.max_job_pixels:
            raise MediaTooLarge(
                f"media: {num_pixels} pixels decoded so far, the limit of a job is {self._policy.max_job_pixels} "
                "(VISIONQ_MAX_JOB_PIXELS, and a quarter of VISIONQ_DECODED_BYTES)"
            )

    def _one(self, wanted: Wanted, stored: StoredObject, work: _Work) -> DecodedMedia:
        keys = tuple(wanted.key(stored, kind, self._policy) for kind in wanted.kinds)
        return self._cache.get_or_make(keys, lambda: work.make(wanted, stored), should_stop=work.should_stop)


def media_parts(turns: Sequence[Turn]) -> list[AnyMediaPart]:
    """Return the media parts of a conversation in order."""
    return [part for turn in turns for part in turn.content if not isinstance(part, TextPart)]


@dataclass(slots=True)
class _Work:
    """The files that one job has read, by URI, and the seconds that it spent decoding."""

    fetcher: ObjectFetcher
    decoders: Decoders
    policy: MediaPolicy
    directory: Path
    should_stop: Callable[[], None]
    files: dict[str, FetchedMedia] = field(default_factory=dict)
    decode_s: float = 0.0

    def make(self, wanted: Wanted, stored: StoredObject) -> Made:
        if wanted.uri not in self.files:
            self.files[wanted.uri] = self.fetcher.read(stored, self.directory, should_stop=self.should_stop)
        fetched = self.files[wanted.uri]
        wanted.check(fetched.kind)
        started_at = time.monotonic()
        media = self._decode(wanted, fetched)
        self.decode_s += time.monotonic() - started_at
        return Made(wanted.key(fetched.stored, fetched.kind, self.policy), media)

    def _decode(self, wanted: Wanted, fetched: FetchedMedia) -> DecodedMedia:
        self.should_stop()
        try:
            return self.decoders.decode(
                fetched.path, fetched.kind, wanted.num_frames, self.policy, should_stop=self.should_stop
            )
        except RequestError as error:
            raise type(error)(f"{wanted.uri}: {error}") from error  # decoders know the file only
