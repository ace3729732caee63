"""Decoded media kept between jobs, so that a hundred questions about one image read and decode it once.

In: keys, which hold the state of the object, what is made of it and under which limits, and a way to make a medium.
Out: media, shared between jobs: nobody changes their pixels. Bounded in bytes, least recently used goes first. Knows
no storage: that the object is still in the state a key names is the caller's to ask, for each job anew.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Final, Literal

from worker.errors import WorkerError
from worker.media.sniff import MediaKind
from worker.media.types import PIXEL_BYTES, DecodedClip, DecodedMedia, MediaPolicy

logger = logging.getLogger(__name__)

#: How often a job that waits for another's work looks at its own cancel and deadline.
POLL_S: Final = 0.1
#: Counted for an entry beside its pixels: also a cache of tiny pictures is bounded.
ENTRY_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class ObjectIdentity:
    """One state of one object: a write changes the ETag, and the version where the bucket keeps versions."""

    bucket: str
    key: str
    version_id: str | None
    etag: str


@dataclass(frozen=True, slots=True)
class MediaKey:
    """What was made of an object, and under which limits. `num_frames` is 0 for a still."""

    identity: ObjectIdentity
    kind: MediaKind
    num_frames: int
    policy: MediaPolicy


@dataclass(frozen=True, slots=True)
class Made:
    """A medium that was just decoded, under the key of the object's state that was really read."""

    key: MediaKey
    media: DecodedMedia


@dataclass(frozen=True, slots=True)
class MediaCacheStats:
    """Counts since boot, and what is held now. A hit is an answer that cost no reading and no decoding."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    num_entries: int = 0
    num_bytes: int = 0


@dataclass(slots=True)
class _Flight:
    """One job's work that others wait for. Written by that job before `landed` is set, never after."""

    landed: threading.Event = field(default_factory=threading.Event)
    made: Made | None = None
    was_stopped: bool = False


class MediaCache:
    """Shared by all jobs of a worker; every method may be called from any thread. `max_bytes` of 0 keeps nothing."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[MediaKey, DecodedMedia] = OrderedDict()  # least recently used first
        self._flights: dict[MediaKey, _Flight] = {}
        self._num_bytes = 0
        self._hits = self._misses = self._evictions = 0

    def stats(self) -> MediaCacheStats:
        """Return the counters at this moment."""
        with self._lock:
            return self._snapshot()

    def get_or_make(
        self, asked: tuple[MediaKey, ...], make: Callable[[], Made], *, should_stop: Callable[[], None]
    ) -> DecodedMedia:
        """Return the medium kept under one of `asked`, any of which will do, else what `make` makes.

        Of several jobs that ask for the same first key at once, one calls `make`, on its own thread, and the others
        wait for it. `should_stop` is the waiting job's own; what it raises passes through and disturbs nobody else.
        If the one that works is stopped, one of those that wait takes over; if it fails (a WorkerError), or what it
        made is of another key (the object changed), each of them calls its own `make`: nobody gets another's error,
        and lasting faults do not queue up. Nobody waits while others wait for it, so jobs with several media cannot
        block each other.
        """
        if self._max_bytes == 0:
            self._count("miss")
            return make().media
        may_wait = True
        while True:
            flight, is_ours = _Flight(), True
            with self._lock:
                kept = self._find(asked)
                flying = self._flights.get(asked[0])
                if flying is not None and may_wait:
                    flight, is_ours = flying, False
                elif kept is None:
                    self._flights.setdefault(asked[0], flight)
            if kept is not None:
                self._count("hit")
                return kept
            if is_ours:
                self._count("miss")
                return self._fly(flight, asked[0], make)
            while not flight.landed.wait(POLL_S):
                should_stop()
            if flight.made is not None and flight.made.key in asked:
                self._count("hit")
                return flight.made.media
            may_wait = flight.was_stopped

    def _find(self, asked: tuple[MediaKey, ...]) -> DecodedMedia | None:
        for key in asked:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        return None

    def _fly(self, flight: _Flight, name: MediaKey, make: Callable[[], Made]) -> DecodedMedia:
        """Make the medium, keep it, and let those go on who wait."""
        try:
            made = make()
        except BaseException as error:
            flight.was_stopped = not isinstance(error, WorkerError)
            self._land(flight, name)
            raise
        flight.made = made
        self._land(flight, name)
        return made.media

    def _land(self, flight: _Flight, name: MediaKey) -> None:
        """In one step for all others: the entry is there and the flight is gone."""
        with self._lock:
            if flight.made is not None:
                self._keep(flight.made)
            if self._flights.get(name) is flight:
                del self._flights[name]
        flight.landed.set()

    def _keep(self, made: Made) -> None:
        num_bytes = entry_bytes(made.media)
        if self._find((made.key,)) is not None or num_bytes > self._max_bytes:
            return
        while self._num_bytes + num_bytes > self._max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self._num_bytes -= entry_bytes(evicted)
            self._evictions += 1
        self._entries[made.key] = made.media
        self._num_bytes += num_bytes

    def _count(self, outcome: Literal["hit", "miss"]) -> None:
        with self._lock:
            self._hits += outcome == "hit"
            self._misses += outcome == "miss"
            stats = self._snapshot()
        logger.debug("media cache asked", extra={"action": "media_cache", "outcome": outcome, **asdict(stats)})

    def _snapshot(self) -> MediaCacheStats:
        return MediaCacheStats(self._hits, self._misses, self._evictions, len(self._entries), self._num_bytes)


def entry_bytes(media: DecodedMedia) -> int:
    """Return the memory that a medium takes in the cache."""
    pictures = media.frames if isinstance(media, DecodedClip) else (media.pixels,)
    return ENTRY_BYTES + PIXEL_BYTES * sum(picture.width * picture.height for picture in pictures)
