"""An LRU cache of decoded media, bounded in bytes, so that many questions about one image read and decode it once.

In: keys (the object's state, the kind of result and the limits) and a function that makes a medium. Out: media, which
are shared between jobs and must not be changed. Concurrent requests for one key are made once ("single flight"). Knows
no storage: the caller asks for the object's current state, for every job.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Final, Literal

from cachetools import LRUCache

from worker.errors import WorkerError
from worker.media.sniff import MediaKind
from worker.media.types import PIXEL_BYTES, DecodedClip, DecodedMedia, MediaPolicy

logger = logging.getLogger(__name__)

#: How often a job that waits for another's work checks whether it was cancelled or its deadline has passed.
POLL_S: Final = 0.1
#: Counted for an entry beside its pixels, so that a cache of tiny pictures is bounded, too.
ENTRY_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class ObjectIdentity:
    """One state of one object: every write changes the ETag, and the version id in a versioned bucket."""

    bucket: str
    key: str
    version_id: str | None
    etag: str


@dataclass(frozen=True, slots=True)
class MediaKey:
    """The key of a decoded medium: the object's state, what was made of it and under which limits. `num_frames` is 0
    for a still.
    """

    identity: ObjectIdentity
    kind: MediaKind
    num_frames: int
    policy: MediaPolicy


@dataclass(frozen=True, slots=True)
class Made:
    """A medium that was just decoded, with the key of the object's state that was read."""

    key: MediaKey
    media: DecodedMedia


@dataclass(frozen=True, slots=True)
class MediaCacheStats:
    """Counts since boot, and the current size. A hit is a medium that this job neither read nor decoded."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    num_entries: int = 0
    num_bytes: int = 0


@dataclass(slots=True)
class _Flight:
    """One job's work that others may wait for. Its job writes it before it sets `is_done`, never after."""

    is_done: threading.Event = field(default_factory=threading.Event)
    made: Made | None = None
    was_stopped: bool = False


class MediaCache:
    """Shared by all jobs of a worker; every method may be called from any thread. `max_bytes` of 0 keeps nothing."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: LRUCache[MediaKey, DecodedMedia] = LRUCache(max_bytes, getsizeof=entry_bytes)
        self._flights: dict[MediaKey, _Flight] = {}
        self._hits = self._misses = self._evictions = 0

    def stats(self) -> MediaCacheStats:
        """Return the counters at this moment."""
        with self._lock:
            return self._snapshot()

    def get_or_make(
        self, keys: tuple[MediaKey, ...], make: Callable[[], Made], *, should_stop: Callable[[], None]
    ) -> DecodedMedia:
        """Return the medium cached under one of `keys`, any of which will do, else the one that `make` returns.

        Of several jobs that ask for the same first key at once, one calls `make`, on its own thread, and the others
        wait for it. `should_stop` is the waiting job's own; what it raises affects no other job. If the working job is
        stopped, a waiting one takes over. If it fails (a WorkerError), or the object had changed so that the result has
        another key, each waiting job calls its own `make`: no job gets another's error, and jobs that will all fail do
        not fail one after the other. No job waits while others wait for it, so jobs cannot deadlock.
        """
        if self._max_bytes == 0:
            self._count("miss")
            return make().media
        may_wait = True
        while True:
            flight, is_ours = _Flight(), True
            with self._lock:
                kept = self._lookup(keys)
                in_flight = self._flights.get(keys[0])
                if in_flight is not None and may_wait:
                    flight, is_ours = in_flight, False
                elif kept is None:
                    self._flights.setdefault(keys[0], flight)
            if kept is not None:
                self._count("hit")
                return kept
            if is_ours:
                self._count("miss")
                return self._make_and_share(flight, keys[0], make)
            while not flight.is_done.wait(POLL_S):
                should_stop()
            if flight.made is not None and flight.made.key in keys:
                self._count("hit")
                return flight.made.media
            may_wait = flight.was_stopped

    def _lookup(self, keys: tuple[MediaKey, ...]) -> DecodedMedia | None:
        for key in keys:
            if key in self._entries:
                return self._entries[key]
        return None

    def _make_and_share(self, flight: _Flight, name: MediaKey, make: Callable[[], Made]) -> DecodedMedia:
        """Make the medium, cache it and wake the waiting jobs."""
        try:
            made = make()
        except BaseException as error:
            flight.was_stopped = not isinstance(error, WorkerError)
            self._finish(flight, name)
            raise
        flight.made = made
        self._finish(flight, name)
        return made.media

    def _finish(self, flight: _Flight, name: MediaKey) -> None:
        """Cache the result and remove the flight under one lock, so that no other job sees neither."""
        with self._lock:
            if flight.made is not None:
                self._insert(flight.made)
            if self._flights.get(name) is flight:
                del self._flights[name]
        flight.is_done.set()

    def _insert(self, made: Made) -> None:
        if self._lookup((made.key,)) is not None or entry_bytes(made.media) > self._max_bytes:
            return
        num_before = len(self._entries)
        self._entries[made.key] = made.media
        self._evictions += num_before + 1 - len(self._entries)

    def _count(self, outcome: Literal["hit", "miss"]) -> None:
        with self._lock:
            self._hits += outcome == "hit"
            self._misses += outcome == "miss"
            stats = self._snapshot()
        logger.debug("media cache looked up", extra={"action": "media_cache", "outcome": outcome, **asdict(stats)})

    def _snapshot(self) -> MediaCacheStats:
        return MediaCacheStats(
            self._hits, self._misses, self._evictions, len(self._entries), int(self._entries.currsize)
        )


def entry_bytes(media: DecodedMedia) -> int:
    """Return the bytes that a medium counts in the cache."""
    pictures = media.frames if isinstance(media, DecodedClip) else (media.pixels,)
    return ENTRY_BYTES + PIXEL_BYTES * sum(picture.width * picture.height for picture in pictures)
