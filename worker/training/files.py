"""The files of a data set: fetched, hashed and decoded once before training, and decoded again for every step.

In: names relative to a folder or an S3 prefix. Out: `DataFile`s on this machine's disk, or what is wrong with a file.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from worker.errors import MediaCorrupt, MediaNotFound, MediaTooLarge, MediaUnsupported, RequestError
from worker.media.access import MediaAccess
from worker.media.decoders import Decoders
from worker.media.sniff import HEAD_BYTES, MediaKind, sniff
from worker.media.types import DecodedClip, DecodedMedia, MediaPolicy
from worker.training.example import DatasetBroken, Example, Finding

S3: Final = "s3://"

State = tuple[int, int]


@dataclass(frozen=True, slots=True)
class DataFile:
    """A picture or clip on this machine's disk, as it was checked.

    sizes: width and height of the picture, or of each sampled frame. timestamps_s, duration_s, fps: of a clip.
    state: of the file on disk, by which a later change shows.
    """

    path: Path
    kind: MediaKind
    sha256: str
    state: State
    sizes: tuple[tuple[int, int], ...]
    timestamps_s: tuple[float, ...] = ()
    duration_s: float = 0.0
    fps: float = 0.0


@dataclass(frozen=True, slots=True)
class Source:
    """Where files come from: a folder, or an S3 prefix (`s3://…/`) whose objects are kept in `directory`."""

    place: str
    access: MediaAccess
    directory: Path
    num_frames: int
    should_stop: Callable[[], None]

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return a file that is no medium. Raises RequestError, and what storage raises."""
        if self.place.startswith(S3):
            return self.access.fetcher.read_bytes(f"{self.place}{quote(name)}", max_bytes, should_stop=self.should_stop)
        path = Path(self.place, name)
        _check_regular(path, max_bytes)
        return path.read_bytes()

    def check(self, name: str) -> DataFile:
        """Fetch, hash and decode one file. Any thread. Raises RequestError for the file's fault."""
        path = self._local(name)
        with path.open("rb") as file:
            kind = sniff(file.read(HEAD_BYTES)).kind
        _check_regular(path, _max_bytes(kind, self.access.policy))
        state = state_of(path)
        assert state is not None
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        medium = self.access.decoders.decode(
            path, kind, self.num_frames, self.access.policy, should_stop=self.should_stop
        )
        if isinstance(medium, DecodedClip):
            sizes = tuple(frame.size for frame in medium.frames)
            return DataFile(path, kind, digest, state, sizes, medium.timestamps_s, medium.duration_s, medium.fps)
        return DataFile(path, kind, digest, state, (medium.pixels.size,))

    def _local(self, name: str) -> Path:
        if self.place.startswith(S3):
            fetcher = self.access.fetcher
            stored = fetcher.head(f"{self.place}{quote(name)}", should_stop=self.should_stop)
            return fetcher.read(stored, self.directory, should_stop=self.should_stop).path
        path = Path(self.place, name).resolve()
        _check_regular(path, max(self.access.policy.max_image_bytes, self.access.policy.max_video_bytes))
        return path


def check_files(
    source: Source, names: Sequence[str], on_progress: Callable[[int, int], None]
) -> tuple[dict[str, DataFile], dict[str, str]]:
    """Check all files, several at once; return the good ones, and the message for each other one."""
    good, wrong = dict[str, DataFile](), dict[str, str]()
    with ThreadPoolExecutor(source.access.decoders.num_processes, "dataset") as pool:
        futures = {pool.submit(source.check, name): name for name in names}
        try:
            for done, future in enumerate(as_completed(futures)):
                source.should_stop()
                on_progress(done, len(names))
                try:
                    good[futures[future]] = future.result()
                except RequestError as error:
                    wrong[futures[future]] = str(error)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    on_progress(len(names), len(names))
    return good, wrong


class MediaReader:
    """Decodes examples' files again. Any thread; a forked process gets decoders of its own at its first call."""

    def __init__(self, access: MediaAccess, num_frames: int) -> None:
        self._policy = access.policy
        self._num_frames = num_frames
        self._decoders = access.decoders
        self._pid = os.getpid()

    def media(self, example: Example, files: Mapping[str, DataFile]) -> tuple[DecodedMedia, ...]:
        """Decode the files of an example, in order. Raises DatasetBroken for a file that has changed."""
        return tuple(self._decoded(name, files[name]) for name in example.files)

    def _decoded(self, name: str, file: DataFile) -> DecodedMedia:
        if state_of(file.path) != file.state:
            raise DatasetBroken([Finding(name, None, "the file has changed since the data set was checked")])
        return self._own_decoders().decode(
            file.path, file.kind, self._num_frames, self._policy, should_stop=lambda: None
        )

    def _own_decoders(self) -> Decoders:
        if self._pid != os.getpid():
            # The parent's pipes and locks are its own.
            self._decoders, self._pid = Decoders(1, self._decoders.limits), os.getpid()
        return self._decoders


def state_of(path: Path) -> State | None:
    """Return a file's size and time of change; None when there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _check_regular(path: Path, max_bytes: int) -> None:
    """Check what is at a path before it is opened: a pipe would be waited for."""
    try:
        found = path.stat()
    except OSError as error:
        raise MediaNotFound(f"cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise MediaUnsupported("not a file")
    if found.st_size == 0:
        raise MediaCorrupt("empty (0 bytes)")
    if found.st_size > max_bytes:
        raise MediaTooLarge(f"{found.st_size} bytes, the limit is {max_bytes}")
    if not os.access(path, os.R_OK):
        raise MediaNotFound("cannot be read: Permission denied")


def _max_bytes(kind: MediaKind, policy: MediaPolicy) -> int:
    return policy.max_video_bytes if kind is MediaKind.VIDEO else policy.max_image_bytes
