"""Readers against a real Redis: late, cut off, doubled, starved, waiting. Each test runs for both clients."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from api_stub import cursor
from api_stub.client.client import Client
from api_stub.contract import names
from api_stub.contract.event import Event, parse_event
from api_stub.contract.result import Result
from api_stub.errors import JobFailed, StoreUnavailable, StreamRestarted, UnknownJob
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.settings import LedgerConfig
from tests.servers import RedisServer, eventually, free_port
from tests.unit.api_stub.ledger_kit import question
from tests.unit.api_stub.readings import KINDS, Reading
from tests.unit.api_stub.workers import ScriptedWorker

Read = Callable[..., Reading]
JOB = "job-1"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def read(kind: str, redis_url: str, ledger: Ledger) -> Read:
    """Start a reading of the job JOB, which is queued."""
    ledger.submit(JOB, question())

    def start(what: str = "stream", **fields: object) -> Reading:
        return Reading(kind, redis_url, fields.pop("job_id", JOB), what, **fields)  # type: ignore[arg-type]

    return start


def subscribed(client: redis.Redis, num: int = 1, channel: str = names.events_key(JOB)) -> None:
    eventually(lambda: dict(client.pubsub_numsub(channel))[channel] == num, what=f"{num} subscribers of {channel}")


def types(items: list[object]) -> list[str]:
    return [parse_event(item.to_json()).type for item in items]  # type: ignore[attr-defined]


def write_event(client: redis.Redis, on_channel: bool = True, in_stream: bool = True, **fields: object) -> None:
    """Write an event past the ledger: into the stream alone, or on the channel alone."""
    seq = client.hincrby(names.job_key(JOB), "seq", 1)
    event = json.dumps({"v": 1, "job_id": JOB, "seq": seq, "attempt": 1, "ts": 1.0, **fields})
    if in_stream:
        client.xadd(names.events_key(JOB), {"event": event}, id=f"{seq}-0")
    if on_channel:
        client.publish(names.events_key(JOB), event)


def test_text_is_yielded_while_it_is_written(read: Read, worker: ScriptedWorker) -> None:
    worker.take(JOB)
    reading = read()
    worker.say("It ")
    reading.wait_for(1)
    worker.say("is ", "red")
    reading.wait_for(3)
    worker.finish()
    assert reading.join() == ["It ", "is ", "red"]


def test_a_reader_that_joins_in_the_middle_gets_the_whole_text(read: Read, worker: ScriptedWorker) -> None:
    worker.take(JOB)
    worker.say("It ", "is ")
    reading = read()
    reading.wait_for(2)
    worker.say("red")
    worker.finish()
    assert reading.join() == ["It ", "is ", "red"]


def test_a_reader_that_joins_after_the_end_gets_the_same_events(read: Read, worker: ScriptedWorker) -> None:
    early = read("events")
    worker.take(JOB)
    worker.progress()
    worker.say("It ", "is ", "red")
    worker.finish()
    late = read("events")
    assert early.join() == late.join()
    assert types(late.items) == [
        "job.queued", "job.started", "job.progress", "output.delta", "output.delta", "output.delta", "job.completed"
    ]  # fmt: skip


def test_a_reader_of_an_expired_stream_gets_its_final_event_alone(
    read: Read, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    result = worker.answer(JOB, "It ", "is red")
    redis_client.delete(names.events_key(JOB))
    [event] = read("events").join()
    assert isinstance(event, Event)
    assert (event.type, event.seq) == ("job.completed", 5)
    assert read("stream").join() == ["It is red"]
    assert read("result").join() == [result]
    assert read("events", after=5).join() == []


def test_events_after_a_seq_are_the_later_ones(read: Read, worker: ScriptedWorker) -> None:
    worker.answer(JOB, "a", "b")
    assert [event.seq for event in read("events", after=3).join()] == [4, 5]  # type: ignore[attr-defined]
    assert read("events", after=5).join() == []
    assert read("events", after=99).join() == []


def test_a_reader_whose_connection_is_killed_misses_and_repeats_nothing(
    read: Read, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    worker.take(JOB)
    reading = read()
    for number in range(20):
        subscribed(redis_client)
        redis_client.client_kill_filter(_type="pubsub")
        worker.say(f"{number} ")
        reading.wait_for(number + 1)
    redis_client.client_kill_filter(_type="pubsub")
    worker.say("end")
    worker.finish()
    assert reading.join() == [f"{number} " for number in range(20)] + ["end"]


@pytest.mark.parametrize("what", ["stream", "result"])
def test_a_reader_outlives_a_restart_of_redis(kind: str, what: str, tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--appendfsync", "always")
    ledger = Ledger.connect(server.url, LedgerConfig())
    try:
        ledger.submit(JOB, question())
        worker = ScriptedWorker(ledger)
        worker.take(JOB)
        worker.say("before ")
        reading = Reading(kind, server.url, JOB, what)
        channel = names.events_key(JOB) if what == "stream" else names.result_key(JOB)
        with server.client() as client:
            subscribed(client, channel=channel)
        server.kill()
        server.start()
        worker.say("after")
        result = worker.finish()
        assert reading.join() == (["before ", "after"] if what == "stream" else [result])
    finally:
        ledger.close()
        server.stop()


def test_an_event_that_comes_twice_is_forwarded_once(
    read: Read, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    worker.take(JOB)
    reading = read("events")
    worker.say("once")
    reading.wait_for(3)
    for _, fields in redis_client.xrange(names.events_key(JOB)):
        redis_client.publish(names.events_key(JOB), fields["event"])
    worker.finish()
    assert [event.seq for event in reading.join()] == [1, 2, 3, 4]  # type: ignore[attr-defined]


def test_an_event_that_the_channel_lost_is_read_from_the_stream(
    read: Read, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    worker.take(JOB)
    reading = read()
    subscribed(redis_client)
    worker.say("a")
    reading.wait_for(1)
    write_event(redis_client, on_channel=False, type="output.delta", text="b", offset=1, num_tokens=1)
    worker.text += "b"
    worker.say("c")
    reading.wait_for(3)
    worker.finish()
    assert reading.join() == ["a", "b", "c"]


def test_a_channel_that_falls_silent_is_looked_behind(
    read: Read, worker: ScriptedWorker, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cursor, "RESUBSCRIBE_S", 0.2)
    worker.take(JOB)
    reading = read()
    subscribed(redis_client)
    worker.say("a")
    reading.wait_for(1)
    write_event(redis_client, on_channel=False, type="output.delta", text="b", offset=1, num_tokens=1)
    reading.wait_for(2)
    worker.text += "b"
    worker.finish()
    assert reading.join() == ["a", "b"]


def test_what_is_no_event_of_ours_is_passed_over(read: Read, worker: ScriptedWorker, redis_client: redis.Redis) -> None:
    worker.take(JOB)
    reading = read()
    subscribed(redis_client)
    redis_client.publish(names.events_key(JOB), "not json")
    write_event(redis_client, type="job.from_the_future", answer=42)
    worker.say("text")
    worker.finish()
    assert reading.join() == ["text"]


def test_a_second_attempt_with_the_same_beginning_goes_on_where_the_first_stopped(
    read: Read, worker: ScriptedWorker
) -> None:
    worker.take(JOB)
    reading = read()
    worker.say("It ", "is ")
    reading.wait_for(2)
    worker.give_back()
    worker.answer(JOB, "It is", " red")
    assert reading.join() == ["It ", "is ", "red"]
    assert read().join() == ["It ", "is ", "red"]


def test_a_second_attempt_with_another_text_restarts_the_stream(read: Read, worker: ScriptedWorker) -> None:
    worker.take(JOB)
    reading = read()
    worker.say("It ", "is ")
    reading.wait_for(2)
    worker.give_back()
    result = worker.answer(JOB, "Red")
    with pytest.raises(StreamRestarted):
        reading.join()
    assert read("result").join() == [result]


@pytest.mark.parametrize("what", ["stream", "result"])
def test_a_failed_job_raises_its_error(read: Read, worker: ScriptedWorker, what: str) -> None:
    reading = read(what)
    worker.take(JOB)
    worker.fail()
    with pytest.raises(JobFailed, match="media_not_found: no such object: s3://media/a") as failure:
        reading.join()
    assert not failure.value.retryable


@pytest.mark.parametrize("what", ["stream", "result"])
def test_a_cancelled_job_raises_and_its_events_end(read: Read, ledger: Ledger, what: str) -> None:
    readings = read(what), read("events")
    ledger.cancel(JOB)
    with pytest.raises(JobFailed, match=r"^cancelled: "):
        readings[0].join()
    assert types(readings[1].join()) == ["job.queued", "job.cancelled"]


def test_an_expired_job_raises(read: Read, ledger: Ledger) -> None:
    ledger.submit("hasty", question(deadline_s=0.05))
    reading = read("result", job_id="hasty")
    eventually(lambda: ledger.reap() or ledger.view("hasty").status == "expired")  # type: ignore[union-attr]
    with pytest.raises(JobFailed, match=r"^expired: "):
        reading.join()


@pytest.mark.parametrize("what", ["stream", "events", "result"])
def test_silence_longer_than_the_timeout_is_a_timeout(read: Read, worker: ScriptedWorker, what: str) -> None:
    worker.take(JOB)
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        read(what, timeout=0.3).join()
    assert 0.3 <= time.monotonic() - begin < 3


def test_a_reader_that_is_slow_itself_is_not_timed_out(client: Client, ledger: Ledger, worker: ScriptedWorker) -> None:
    job = client.vqa(question="Why?")
    worker.take(job.id)
    worker.say("a", "b")
    pieces = job.stream(timeout=0.3)
    assert next(pieces) == "a"
    time.sleep(0.5)
    assert next(pieces) == "b"
    worker.finish()
    assert list(pieces) == []


def test_a_timeout_of_zero_looks_once(read: Read, worker: ScriptedWorker) -> None:
    with pytest.raises(TimeoutError):
        read("result", timeout=0).join()
    result = worker.answer(JOB, "red")
    assert read("result", timeout=0).join() == [result]


@pytest.mark.parametrize("what", ["stream", "events", "result"])
def test_a_job_that_nobody_submitted_is_unknown(read: Read, what: str) -> None:
    with pytest.raises(UnknownJob, match="'nobody'"):
        read(what, job_id="nobody").join(5)


def test_waiting_for_a_result_wakes_by_its_channel_and_asks_nothing_meanwhile(
    read: Read, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    worker.take(JOB)
    reading = read("result")
    subscribed(redis_client, channel=names.result_key(JOB))
    worker.say(*"many pieces")
    eventually(lambda: num_commands_within(redis_client, 0.2) == 0, what="it has looked once and waits")
    worker.say(*"and some more")
    num_commands = num_commands_within(redis_client, 0.5)
    result = worker.finish()
    begin = time.monotonic()
    assert reading.join() == [result]
    assert time.monotonic() - begin < 3
    assert num_commands == 0


def num_commands_within(client: redis.Redis, seconds: float) -> int:
    """Return how many commands come from others in that time."""
    before = client.info("stats")["total_commands_processed"]
    time.sleep(seconds)
    return int(client.info("stats")["total_commands_processed"]) - before - 1


def test_a_reader_that_leaves_early_gives_its_connection_back(
    client: Client, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    job = client.vqa(question="Why?")
    worker.take(job.id)
    worker.say("a", "b")
    pieces = job.stream()
    next(pieces)
    assert len(redis_client.client_list(_type="pubsub")) == 1
    pieces.close()
    eventually(lambda: not redis_client.client_list(_type="pubsub"), what="no subscriber is left")


def test_readers_of_jobs_that_end_share_a_connection_one_after_another(
    client: Client, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    connections = set()
    for answer in ("one", "two", "three"):
        job = client.vqa(question="Why?")
        worker.take(job.id)
        worker.say(answer)
        worker.finish()
        assert "".join(job.stream()) == answer == job.result().text
        connections |= {connection["id"] for connection in redis_client.client_list(_type="pubsub")}
    assert len(connections) == 1


def test_a_kept_connection_that_was_cut_is_replaced(
    client: Client, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    for answer in ("before", "after"):
        job = client.vqa(question="Why?")
        worker.take(job.id)
        worker.say(answer)
        worker.finish()
        assert job.result(timeout=10).text == answer
        assert redis_client.client_kill_filter(_type="pubsub") == 1


@pytest.mark.parametrize("what", ["stream", "result"])
def test_a_redis_that_refuses_connections_is_unavailable_within_five_seconds(kind: str, what: str) -> None:
    begin = time.monotonic()
    with pytest.raises(StoreUnavailable, match="ConnectionError"):
        Reading(kind, f"redis://127.0.0.1:{free_port()}/0", JOB, what, timeout=None).join()
    assert time.monotonic() - begin < 5


@pytest.fixture
def silent_url() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listener:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"


def test_a_redis_that_never_answers_is_unavailable_within_five_seconds(kind: str, silent_url: str) -> None:
    begin = time.monotonic()
    with pytest.raises(StoreUnavailable):
        Reading(kind, silent_url, JOB, "stream", timeout=None).join()
    assert time.monotonic() - begin < 5


def test_results_are_read_as_the_contracts_type(read: Read, worker: ScriptedWorker) -> None:
    worker.answer(JOB, "red")
    [result] = read("result").join()
    assert isinstance(result, Result)
    assert (result.text, result.usage.completion_tokens, result.finish_reason) == ("red", 1, "stop")
