"""Whatever is asked in whatever order: the decoded-media cache stays in its bytes and forgets as a model LRU does."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from PIL import Image

from worker.errors import MediaCorrupt
from worker.media.cache import Made, MediaCache, MediaKey, ObjectIdentity, entry_bytes
from worker.media.sniff import MediaKind
from worker.media.types import DecodedClip, DecodedImage, DecodedMedia, MediaPolicy

POLICY = MediaPolicy(frozenset({"media"}))
NAMES = st.integers(0, 5)
NUM_FRAMES = st.integers(0, 3)
SIDES = st.integers(1, 40)


def key_of(name: int, num_frames: int, etag: str) -> MediaKey:
    kind = MediaKind.VIDEO if num_frames else MediaKind.IMAGE
    return MediaKey(ObjectIdentity("media", str(name), None, etag), kind, num_frames, POLICY)


def decoded(num_frames: int, side: int) -> DecodedMedia:
    if num_frames == 0:
        return DecodedImage(Image.new("RGB", (side, side)))
    frames = tuple(Image.new("RGB", (side, side)) for _ in range(num_frames))
    return DecodedClip(frames, tuple(map(float, range(num_frames))), float(num_frames), 1.0)


class CacheAndModel(RuleBasedStateMachine):
    """One thread asks; the model is an ordered dict, oldest use first. A write gives an object another ETag."""

    @initialize(max_bytes=st.integers(1, 30_000))
    def start(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.cache = MediaCache(max_bytes)
        self.model: OrderedDict[MediaKey, DecodedMedia] = OrderedDict()
        self.writes: dict[int, int] = {}
        self.hits = self.misses = self.evictions = 0

    @rule(name=NAMES, num_frames=NUM_FRAMES, side=SIDES)
    def a_job_asks(self, name: int, num_frames: int, side: int) -> None:
        key = key_of(name, num_frames, str(self.writes.get(name, 0)))
        fresh = decoded(num_frames, side)
        given = self.cache.get_or_make((key,), lambda: Made(key, fresh), should_stop=lambda: None)
        if key in self.model:
            self.hits += 1
            assert given is self.model[key]
            self.model.move_to_end(key)
        else:
            self.misses += 1
            assert given is fresh
            self.remember(key, fresh)

    @rule(name=NAMES)
    def an_object_is_written(self, name: int) -> None:
        self.writes[name] = self.writes.get(name, 0) + 1

    @rule(name=NAMES)
    def a_job_fails(self, name: int) -> None:
        key = key_of(name, 0, "never read")

        def fail() -> Made:
            raise MediaCorrupt("broken")

        try:
            self.cache.get_or_make((key,), fail, should_stop=lambda: None)
        except MediaCorrupt:
            self.misses += 1
        else:
            raise AssertionError("a failure was taken for a medium")

    def remember(self, key: MediaKey, media: DecodedMedia) -> None:
        if entry_bytes(media) > self.max_bytes:
            return
        self.model[key] = media
        while sum(map(entry_bytes, self.model.values())) > self.max_bytes:
            self.model.popitem(last=False)
            self.evictions += 1

    @invariant()
    def bytes_and_counts_agree(self) -> None:
        stats = self.cache.stats()
        assert stats.num_bytes <= self.max_bytes
        assert stats.num_bytes == sum(map(entry_bytes, self.model.values()))
        assert stats.num_entries == len(self.model)
        assert (stats.hits, stats.misses, stats.evictions) == (self.hits, self.misses, self.evictions)


TestCacheAndModel = CacheAndModel.TestCase
TestCacheAndModel.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
