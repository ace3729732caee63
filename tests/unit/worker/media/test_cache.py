"""The decoded-media cache alone: what is kept and for whom, who works and who waits."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

import pytest
from PIL import Image

from tests.servers import eventually
from worker.errors import MediaCorrupt
from worker.media.cache import ENTRY_BYTES, Made, MediaCache, MediaCacheStats, MediaKey, ObjectIdentity, entry_bytes
from worker.media.sniff import MediaKind
from worker.media.types import DecodedClip, DecodedImage, DecodedMedia, MediaPolicy

POLICY = MediaPolicy(frozenset({"media"}))
STILL = MediaKey(ObjectIdentity("media", "scene.png", None, '"a"'), MediaKind.IMAGE, 0, POLICY)
CLIP = MediaKey(ObjectIdentity("media", "clip.mp4", None, '"b"'), MediaKind.VIDEO, 8, POLICY)
PLENTY = 1 << 20
TIMEOUT_S = 5.0


class Stopped(Exception):
    """What a cancelled job's `should_stop` raises."""


def go_on() -> None:
    """A job that nobody cancels."""


def picture(width: int = 8, height: int = 4) -> DecodedImage:
    return DecodedImage(Image.new("RGB", (width, height)))


class Maker:
    """Makes a new medium per call and counts; made to wait, it tells when it has begun."""

    def __init__(self, key: MediaKey = STILL, media: DecodedMedia | None = None) -> None:
        self.key = key
        self.media = media
        self.num_calls = 0
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Event()
        self.may_end.set()
        self.error: BaseException | None = None

    def __call__(self) -> Made:
        self.num_calls += 1
        self.begun.release()
        assert self.may_end.wait(TIMEOUT_S)
        if self.error is not None:
            raise self.error
        return Made(self.key, self.media or picture())


def ask(cache: MediaCache, make: Callable[[], Made], *keys: MediaKey, should_stop: Callable[[], None] = go_on):
    return cache.get_or_make(keys or (STILL,), make, should_stop=should_stop)


def waiting() -> Callable[[], None]:
    """Return a `should_stop` that counts its calls, which only a waiting job makes."""

    def should_stop() -> None:
        should_stop.num_calls += 1

    should_stop.num_calls = 0
    return should_stop


def test_the_second_job_is_given_what_the_first_made() -> None:
    cache, make = MediaCache(PLENTY), Maker()
    assert ask(cache, make) is ask(cache, make)
    assert make.num_calls == 1
    assert cache.stats() == MediaCacheStats(hits=1, misses=1, num_entries=1, num_bytes=ENTRY_BYTES + 8 * 4 * 4)


@pytest.mark.parametrize(
    "other",
    [
        replace(CLIP, num_frames=4),
        replace(CLIP, kind=MediaKind.IMAGE, num_frames=0),
        replace(CLIP, identity=replace(CLIP.identity, etag='"c"')),
        replace(CLIP, identity=replace(CLIP.identity, version_id="2")),
        replace(CLIP, identity=replace(CLIP.identity, key="other.mp4")),
        replace(CLIP, identity=replace(CLIP.identity, bucket="other")),
        replace(CLIP, policy=replace(POLICY, max_video_seconds=1)),
        replace(CLIP, policy=replace(POLICY, buckets=frozenset())),
    ],
    ids=["frames", "kind", "etag", "version", "key", "bucket", "limit", "allow-list"],
)
def test_whatever_differs_is_another_entry(other: MediaKey) -> None:
    cache = MediaCache(PLENTY)
    first, second = Maker(CLIP), Maker(other)
    ask(cache, first, CLIP)
    ask(cache, second, other)
    assert (first.num_calls, second.num_calls, cache.stats().num_entries) == (1, 1, 2)


def test_a_job_that_takes_either_kind_finds_the_one_that_is_kept() -> None:
    cache, make = MediaCache(PLENTY), Maker()
    ask(cache, make)
    ask(cache, make, replace(STILL, kind=MediaKind.VIDEO, num_frames=8), STILL)
    assert make.num_calls == 1


def test_the_least_recently_used_goes_first() -> None:
    names = [replace(STILL, identity=replace(STILL.identity, key=name)) for name in "abc"]
    cache = MediaCache(2 * entry_bytes(picture()))
    makers = [Maker(name) for name in names]
    for at in (0, 1, 0, 2, 0, 1):  # c drives b out, for a was used after it
        ask(cache, makers[at], names[at])
    assert [make.num_calls for make in makers] == [1, 2, 1]
    assert cache.stats().evictions == 2


def test_what_is_larger_than_the_cache_is_handed_out_and_drives_nothing_out() -> None:
    cache = MediaCache(2 * entry_bytes(picture()))
    large = Maker(CLIP, picture(100, 100))
    ask(cache, Maker())
    ask(cache, large, CLIP)
    assert cache.stats().num_entries == 1
    ask(cache, large, CLIP)
    assert (large.num_calls, cache.stats().evictions) == (2, 0)


def test_all_frames_of_a_clip_count() -> None:
    frames = tuple(Image.new("RGB", (10, 20)) for _ in range(3))
    assert entry_bytes(DecodedClip(frames, (0.0, 1.0, 2.0), 3.0, 1.0)) == ENTRY_BYTES + 3 * 10 * 20 * 4


def test_no_bytes_switch_the_cache_off() -> None:
    cache, make = MediaCache(0), Maker()
    assert ask(cache, make) is not ask(cache, make)
    assert cache.stats() == MediaCacheStats(misses=2)


def test_a_hundred_jobs_at_once_make_it_once() -> None:
    cache, make = MediaCache(PLENTY), Maker()
    make.may_end.clear()
    waits = [waiting() for _ in range(100)]
    with ThreadPoolExecutor(100) as pool:
        asked = [pool.submit(ask, cache, make, should_stop=stop) for stop in waits]
        eventually(lambda: sum(stop.num_calls > 0 for stop in waits) == 99, TIMEOUT_S, "all others wait")
        make.may_end.set()
    assert len({id(done.result()) for done in asked}) == 1
    assert make.num_calls == 1
    assert (cache.stats().hits, cache.stats().misses) == (99, 1)


def test_those_who_wait_are_given_also_what_is_too_large_to_keep() -> None:
    cache, make = MediaCache(1), Maker()
    make.may_end.clear()
    stop = waiting()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, cache, make)
        assert make.begun.acquire(timeout=TIMEOUT_S)
        second = pool.submit(ask, cache, make, should_stop=stop)
        eventually(lambda: stop.num_calls > 0, TIMEOUT_S, "the second job waits")
        make.may_end.set()
    assert first.result() is second.result()
    assert cache.stats().num_entries == 0


def test_a_job_that_waits_is_stopped_by_its_own_cancel_and_disturbs_nobody() -> None:
    cache, make = MediaCache(PLENTY), Maker()
    make.may_end.clear()

    def cancelled() -> None:
        raise Stopped

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, cache, make)
        assert make.begun.acquire(timeout=TIMEOUT_S)
        with pytest.raises(Stopped):
            ask(cache, make, should_stop=cancelled)
        assert not first.done()
        make.may_end.set()
        assert first.result(TIMEOUT_S) is ask(cache, make)
    assert make.num_calls == 1


def waiters_behind(
    pool: ThreadPoolExecutor, cache: MediaCache, leader: Maker, follower: Maker, num_waiters: int
) -> tuple[Future[DecodedMedia], list[Future[DecodedMedia]]]:
    """Start one job that works, and others that wait for it."""
    leader.may_end.clear()
    first = pool.submit(ask, cache, leader)
    assert leader.begun.acquire(timeout=TIMEOUT_S)
    stops = [waiting() for _ in range(num_waiters)]
    others = [pool.submit(ask, cache, follower, should_stop=stop) for stop in stops]
    eventually(lambda: all(stop.num_calls for stop in stops), TIMEOUT_S, "all others wait")
    return first, others


def test_one_other_takes_over_when_the_job_that_works_is_stopped() -> None:
    cache, leader, follower = MediaCache(PLENTY), Maker(), Maker()
    leader.error = Stopped()
    with ThreadPoolExecutor(9) as pool:
        first, others = waiters_behind(pool, cache, leader, follower, 8)
        leader.may_end.set()
        assert isinstance(first.exception(TIMEOUT_S), Stopped)
        assert len({id(other.result(TIMEOUT_S)) for other in others}) == 1
    assert follower.num_calls == 1


def test_a_failure_is_nobody_elses_and_the_others_do_not_queue_up_behind_each_other() -> None:
    cache, leader, follower = MediaCache(PLENTY), Maker(), Maker()
    leader.error = MediaCorrupt("broken")
    follower.may_end.clear()
    with ThreadPoolExecutor(5) as pool:
        first, others = waiters_behind(pool, cache, leader, follower, 4)
        leader.may_end.set()
        assert isinstance(first.exception(TIMEOUT_S), MediaCorrupt)
        eventually(lambda: follower.num_calls == 4, TIMEOUT_S, "all others work at once")
        follower.may_end.set()
        assert all(other.result(TIMEOUT_S) for other in others)
    assert cache.stats().num_entries == 1


def test_a_job_that_waits_is_not_given_another_state_of_the_object() -> None:
    newer = replace(STILL, identity=replace(STILL.identity, etag='"newer"'))
    cache, leader, follower = MediaCache(PLENTY), Maker(newer), Maker()
    with ThreadPoolExecutor(2) as pool:
        first, (other,) = waiters_behind(pool, cache, leader, follower, 1)
        leader.may_end.set()
        assert other.result(TIMEOUT_S) is not first.result(TIMEOUT_S)
    assert follower.num_calls == 1
    assert ask(cache, leader, newer) is first.result(), "kept as what it is"
    assert leader.num_calls == 1


def test_jobs_with_the_same_two_media_in_opposite_order_never_block_each_other() -> None:
    cache = MediaCache(1)  # keeps nothing, so that every round meets in flight

    def job(keys: tuple[MediaKey, MediaKey]) -> None:
        for _ in range(200):
            for key in keys:
                ask(cache, lambda key=key: Made(key, picture()), key)

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(job, keys) for keys in ((STILL, CLIP), (CLIP, STILL)) * 2]
        assert not wait(jobs, timeout=20).not_done
    for done in jobs:
        done.result()


def test_the_counters_are_logged_for_whoever_debugs(caplog: pytest.LogCaptureFixture) -> None:
    cache = MediaCache(PLENTY)
    with caplog.at_level(logging.DEBUG, logger="worker.media.cache"):
        ask(cache, Maker())
        ask(cache, Maker())
    assert [(record.outcome, record.hits, record.misses) for record in caplog.records] == [
        ("miss", 0, 1),
        ("hit", 1, 1),
    ]
    assert "scene.png" not in caplog.text
