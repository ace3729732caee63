"""Ledgers, workers and reapers of the last release and of this one work on the same jobs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import pytest
import redis

from api_stub.contract import names
from api_stub.contract.event import parse_event
from api_stub.contract.job import VqaJob
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.reaper import Reaper
from tests.compat.earlier import Earlier
from tests.compat.workers import TEXT, EarlierWorker, OurWorker, Worker
from tests.servers import eventually

MODELS = ("default", "other")
SWEEP_S = 0.1
SIDES = ("theirs", "ours", "both")
#: What may happen to a job before it is served: it is lost on the way, its worker dies, it is given back, or nothing.
FATES = ("plain", "doorbell lost", "worker lost", "given back")


class Scene:
    """Both releases on one Redis. `sweeps` and `works` say which of them sweeps and which of them works."""

    def __init__(self, earlier: Earlier, ledger: Ledger, client: redis.Redis, sweeps: str, works: str) -> None:
        self.earlier, self.ledger, self.client = earlier, ledger, client
        workers: dict[str, Worker] = {"theirs": EarlierWorker(earlier), "ours": OurWorker(ledger)}
        reapers: dict[str, Callable[[], object]] = {
            "theirs": lambda: earlier("reaper.sweep()"),
            "ours": Reaper(ledger, SWEEP_S).sweep,
        }
        self.sweepers = [reaper for side, reaper in reapers.items() if sweeps in (side, "both")]
        self.workers = [worker for side, worker in workers.items() if works in (side, "both")]
        self._next: Iterator[Worker] = cycle(self.workers)
        self.unbegun: set[str] = set()

    def submit(self, side: str, job_id: str, *, is_rung: bool = True, **fields: Any) -> None:
        """Hand a job in. The last release rings in a second step, which may never come."""
        if side == "ours":
            self.ledger.submit(job_id, VqaJob(question="Why?", **fields))
            if not self.client.exists(names.events_key(job_id)):
                self.unbegun.add(job_id)
            return
        code = """
            asked = job.VqaJob(question="Why?", **fields)
            submission = ledger.submit(job_id, asked)
            if is_rung and submission.value != "held":
                from api_stub.ledger.rows import Bell
                doorbells.ring(Bell(job_id, asked.task, asked.model, asked.priority))
            answer = None
        """
        self.earlier(code, job_id=job_id, fields=fields, is_rung=is_rung)

    def sweep(self) -> None:
        for sweeper in self.sweepers:
            sweeper()

    def take_doorbell(self) -> tuple[str, str] | None:
        """Take the next message off the broker's lists, as a worker does: job id and model."""
        for model in MODELS:
            for step in names.PRIORITY_STEPS:
                message = self.client.rpop(names.queue_list(model, step))
                if message:
                    headers = json.loads(str(message))["headers"]
                    assert headers[names.DOORBELL_HEADER] == 1
                    return headers["id"], model
        return None

    def live(self) -> None:
        """One moment of everybody: beats and sweeps."""
        for worker in self.workers:
            for model in MODELS:
                worker.beat(model)
        self.sweep()

    def serve(self, fates: dict[str, str], timeout_s: float = 15.0) -> None:
        """Work until all jobs are final; each meets its fate once, before it is served."""
        open_jobs, ends = set(fates), time.monotonic() + timeout_s
        while open_jobs:
            assert time.monotonic() < ends, f"not served: {sorted((j, fates[j]) for j in open_jobs)}"
            self.live()
            while taken := self.take_doorbell():
                if self._serve(taken[0], fates):
                    open_jobs.discard(taken[0])
            time.sleep(0.02)

    def _serve(self, job_id: str, fates: dict[str, str]) -> bool:
        fate, fates[job_id] = fates[job_id], "plain"
        if fate == "doorbell lost":
            return False
        worker = next(self._next)
        fence = worker.claim(job_id)
        if fence is None:
            fates[job_id] = fate
            return False
        assert worker.say(job_id, fence)
        if fate == "worker lost":
            return False
        if fate == "given back":
            assert worker.give_back(job_id, fence)
            return False
        assert worker.finish(job_id, fence) == "done"
        assert worker.finish(job_id, fence) == "already"
        return True

    def check_stream(self, job_id: str) -> None:
        """The stream is whole, both releases read it alike, and the last attempt's text is the result's.

        When this release did not know of the other, it has left the first event to the claim, and theirs does not write
        it: only our readers know it.
        """
        stream = [fields["event"] for _, fields in self.client.xrange(names.events_key(job_id))]
        sent = self.ledger.replay(job_id).events
        assert stream == list(sent) or (job_id in self.unbegun and stream == list(sent[1:]))
        events = [parse_event(text) for text in sent]
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        events = events[-len(stream) :]
        finals = [event for event in events if event.type.startswith("job.") and event.type not in _RUNNING]
        assert finals == events[-1:]
        read = self.earlier("[json.loads(e.to_json()) for e in client.job(job_id).events(timeout=5)]", job_id=job_id)
        assert read == [json.loads(event.to_json()) for event in events]
        last = [event for event in events if event.attempt == events[-1].attempt and event.type == "output.delta"]
        assert "".join(event.text for event in last) == "".join(TEXT)

    def check_nothing_is_kept(self) -> None:
        """Once no worker lives any more, nothing is left of jobs that are over but what expires, and counters."""
        kept = {
            names.FENCE_KEY,
            names.SUBMITTED_KEY,
            names.COUNTS_KEY,
            names.WATCH_KEY,
            names.TURN_KEY,
            names.KNOWN_KEY,
        }
        kept |= {names.depth_key(model) for model in MODELS}

        def lasting() -> set[str]:
            self.sweep()
            self.ledger.reap()  # what only this release writes, it alone takes away
            keys = {key for key in self.client.scan_iter("visionq:*") if self.client.ttl(key) == -1}
            return keys - kept

        eventually(lambda: not lasting(), 15.0, f"nothing is kept: {lasting()}")
        assert {self.client.get(names.depth_key(model)) for model in MODELS} <= {"0", None}


_RUNNING = {"job.queued", "job.started", "job.progress", "job.retrying"}


@pytest.fixture
def scene(earlier: Earlier, ledger: Ledger, redis_client: redis.Redis, request: pytest.FixtureRequest) -> Scene:
    sweeps, works = request.param
    return Scene(earlier, ledger, redis_client, sweeps, works)


@pytest.mark.parametrize("scene", [(a, b) for a in SIDES for b in SIDES], indirect=True, ids=lambda p: "-".join(p))
def test_every_job_of_either_release_ends_once_and_streams_whole(scene: Scene) -> None:
    fates = {}
    for side in ("theirs", "ours"):
        for number in range(8):
            fate = FATES[number % len(FATES)]
            job_id = f"{side}-{number}"
            fates[job_id] = fate
            scene.submit(
                side, job_id, is_rung=fate != "doorbell lost", model=MODELS[number % 3 == 2],
                tenant=("", "a", "b")[number % 3], priority=(6, 0)[number % 2],
            )  # fmt: skip
    jobs = list(fates)
    scene.serve(fates)
    for job_id in jobs:
        scene.check_stream(job_id)
    scene.check_nothing_is_kept()


@pytest.mark.parametrize("scene", [("ours", "theirs")], indirect=True, ids=["ours"])
def test_beside_the_last_release_a_stream_begins_with_its_job(scene: Scene) -> None:
    scene.live()
    scene.live()  # it is noticed
    scene.submit("ours", "a")
    read = """
        reader = client.job("a").events(timeout=5)
        answer = next(reader).type
        reader.close()
    """
    assert scene.earlier(read) == "job.queued"
    scene.serve({"a": "plain"})
    assert not scene.unbegun
    scene.check_stream("a")


@pytest.mark.parametrize("scene", [(a, "theirs") for a in SIDES], indirect=True, ids=lambda p: p[0])
@pytest.mark.parametrize("side", ["theirs", "ours"])
def test_a_doorbell_that_a_worker_of_the_last_release_lost_is_found_again(scene: Scene, side: str) -> None:
    """It took it off the list, where sweeps had seen it, and died before it had claimed the job."""
    scene.submit(side, "a")
    for _ in range(3):
        scene.live()
    assert scene.take_doorbell() == ("a", "default")
    eventually(lambda: (scene.sweep(), scene.take_doorbell())[1], 5.0, "it is rung again")


@pytest.mark.parametrize("scene", [(a, "theirs") for a in SIDES], indirect=True, ids=lambda p: p[0])
@pytest.mark.parametrize("side", ["theirs", "ours"])
def test_a_doorbell_that_later_ones_overtook_is_found_again(scene: Scene, side: str) -> None:
    """The list is not empty: only the mark that the claim of a later job left tells that one is missing."""
    for job_id in ("a", "b"):
        scene.submit(side, job_id)
    for _ in range(3):
        scene.live()
    assert scene.take_doorbell() == ("a", "default")
    worker = scene.workers[0]
    for _ in range(3):
        scene.live()
    taken = scene.take_doorbell()
    assert taken == ("b", "default")
    fence = worker.claim("b")
    assert fence is not None
    scene.client.lpush(names.queue_list("default", 6), "kept busy")
    found = lambda: (scene.sweep(), scene.client.hget(names.job_key("a"), "bell"))[1] != "1"  # noqa: E731
    eventually(found, 5.0, "it is rung again")


@pytest.mark.parametrize("scene", [(a, "both") for a in SIDES], indirect=True, ids=lambda p: p[0])
def test_a_job_whose_producer_of_the_last_release_died_before_ringing_is_rung_for(scene: Scene) -> None:
    scene.submit("ours", "before")  # so that this release has swept the list, and known it
    for _ in range(3):
        scene.sweep()
    scene.submit("theirs", "a", is_rung=False)
    assert scene.take_doorbell() == ("before", "default")
    eventually(lambda: (scene.sweep(), (scene.take_doorbell() or ("",))[0] == "a")[1], 5.0, "it is rung for")


@pytest.mark.parametrize("scene", [("ours", "ours")], indirect=True, ids=["ours"])
def test_a_list_that_this_release_has_swept_is_still_known_to_a_reaper_of_the_last_one(scene: Scene) -> None:
    """This release goes away, a message with it; who stays must know the list."""
    scene.submit("ours", "a")
    for _ in range(3):
        scene.live()
    assert scene.take_doorbell() == ("a", "default")
    sweep = lambda: scene.earlier("reaper.sweep()")  # noqa: E731
    eventually(lambda: (sweep(), scene.take_doorbell())[1], 5.0, "it is rung again")


@pytest.mark.parametrize("scene", [("both", "both")], indirect=True, ids=["both"])
def test_a_cancel_of_either_release_reaches_a_worker_of_the_other(scene: Scene) -> None:
    theirs, ours = scene.workers
    for job_id, worker, cancel in (
        ("a", theirs, lambda: scene.ledger.cancel("a")),
        ("b", ours, lambda: scene.earlier('ledger.cancel("b").value')),
    ):
        scene.submit("ours", job_id)
        fence = worker.claim(job_id)
        assert fence is not None
        assert worker.beat("default", (job_id, fence)) == ["held"]
        cancel()
        assert worker.beat("default", (job_id, fence)) == ["cancel"]
        assert worker.give_back(job_id, fence)
        view = scene.ledger.view(job_id)
        assert view is not None
        assert view.status == scene.earlier("ledger.view(job_id).status.value", job_id=job_id) == "cancelled"


@pytest.mark.parametrize("scene", [("ours", "ours")], indirect=True, ids=["ours"])
@pytest.mark.parametrize("sign", ["ledger.beat('theirs@host:1', 'default', [])", "ledger.reap()", "ledger.submit"])
def test_sweeps_look_at_every_list_while_the_last_release_is_about_and_not_for_ever(scene: Scene, sign: str) -> None:
    def walks() -> bool:
        before = _calls(scene.client, "smembers")
        scene.ledger.reap()
        return _calls(scene.client, "smembers") > before

    scene.submit("ours", "a")
    scene.live()
    assert not walks()
    if sign == "ledger.submit":
        scene.submit("theirs", "b", is_rung=False)
    else:
        scene.earlier(f"answer = {sign} and None")
    assert walks()
    assert walks()
    scene.client.hincrbyfloat(names.WATCH_KEY, "older", -601)
    assert not walks()


def _calls(client: redis.Redis, command: str) -> int:
    stats = client.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})
    return int(stats["calls"])
