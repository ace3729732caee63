"""The publisher between the engine and a real Redis."""

from __future__ import annotations

import json
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest
import redis

from api_stub.contract import names
from api_stub.contract.error import ErrorCode
from api_stub.contract.event import DeltaBody, ProgressBody, Stage
from api_stub.contract.job import VqaJob
from api_stub.contract.result import FinishReason
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Claim
from api_stub.ledger.settings import LedgerConfig
from tests.servers import RedisServer, eventually
from worker.engine.request import Ended, Finish, RequestOutput
from worker.observability.metrics import Metrics
from worker.streaming.output import AttemptStream, Outgoing, merge
from worker.streaming.publisher import Publisher
from worker.streaming.token_meter import TokenMeter


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of this test's own: it is stopped and killed here."""
    server = RedisServer(tmp_path, "--appendfsync", "always")
    yield server
    server.stop()


@pytest.fixture
def ledger(server: RedisServer) -> Iterator[Ledger]:
    ledger = Ledger.connect(server.url, LedgerConfig(), timeout_s=1.0)
    yield ledger
    ledger.close()


@pytest.fixture
def publisher(ledger: Ledger) -> Iterator[Publisher]:
    publisher = Publisher(ledger, TokenMeter(Metrics("default")))
    publisher.start()
    yield publisher
    publisher.stop(10)
    assert not publisher.is_alive


def claimed(ledger: Ledger) -> AttemptStream:
    job_id = str(uuid.uuid4())
    ledger.submit(job_id, VqaJob(question="hello").resolved(job_id))
    claim = ledger.claim(job_id, "worker-1")
    assert isinstance(claim, Claim)
    return AttemptStream(job_id, claim.fence)


def opened(publisher: Publisher, ledger: Ledger) -> AttemptStream:
    """A claimed job whose request, of the same id, is in an engine."""
    stream = claimed(ledger)
    publisher.open(stream.job_id, stream)
    return stream


def generated(stream: AttemptStream, text: str, offset: int, finish: Finish | None = None) -> RequestOutput:
    return RequestOutput(stream.job_id, text, offset, 1, finish=finish)


def delta(stream: AttemptStream, text: str, offset: int) -> Outgoing:
    return Outgoing(stream, DeltaBody(text=text, offset=offset, num_tokens=1))


def events(client: redis.Redis, stream: AttemptStream) -> list[dict[str, object]]:
    return [json.loads(fields["event"]) for _, fields in client.xrange(names.events_key(stream.job_id))]


def flush(publisher: Publisher) -> None:
    assert publisher.flush().wait(30)


def test_all_rows_of_a_step_arrive_in_stream_and_channel(
    publisher: Publisher, ledger: Ledger, server: RedisServer
) -> None:
    streams = [opened(publisher, ledger) for _ in range(8)]
    with server.client() as client, client.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe(*[names.events_key(stream.job_id) for stream in streams])
        pubsub.get_message(timeout=1)
        publisher.put_step([generated(stream, f"text {index}", 0) for index, stream in enumerate(streams)])
        flush(publisher)
        for index, stream in enumerate(streams):
            written = [event for event in events(client, stream) if event["type"] == "output.delta"]
            assert [event["text"] for event in written] == [f"text {index}"]
        heard: list[object] = []
        eventually(lambda: _hear(pubsub, heard) or len(heard) >= len(streams), 10, "every channel heard its delta")


def _hear(pubsub: redis.client.PubSub, heard: list[object]) -> None:
    message = pubsub.get_message(timeout=0.1)
    if message is not None and "output.delta" in message["data"]:
        heard.append(message)


def test_a_stopped_redis_does_not_stop_the_engine_and_loses_nothing(
    publisher: Publisher, ledger: Ledger, server: RedisServer
) -> None:
    stream = opened(publisher, ledger)
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    try:
        # Every one of these returns while Redis answers nobody: the engine's thread is never held up.
        for offset in range(5_000):
            publisher.put_step([generated(stream, "x", offset)])
    finally:
        server.process.send_signal(signal.SIGCONT)
    flush(publisher)
    with server.client() as client:
        written = [event for event in events(client, stream) if event["type"] == "output.delta"]
        assert "".join(str(event["text"]) for event in written) == "x" * 5_000
        assert sum(int(str(event["num_tokens"])) for event in written) == 5_000
        assert len(written) < 1_000, "waiting deltas are joined"
        offset = 0
        for event in written:
            assert event["offset"] == offset
            offset += len(str(event["text"]))


def test_a_killed_redis_gets_each_delta_once_after_its_restart(
    publisher: Publisher, ledger: Ledger, server: RedisServer
) -> None:
    stream = claimed(ledger)
    publisher.put(delta(stream, "before ", 0))
    flush(publisher)
    server.kill()
    publisher.put(delta(stream, "during ", 7))
    server.start()
    publisher.put(delta(stream, "after", 14))
    flush(publisher)
    with server.client() as client:
        written = [event for event in events(client, stream) if event["type"] == "output.delta"]
        assert "".join(str(event["text"]) for event in written) == "before during after"


def test_an_attempt_that_lost_its_job_publishes_nothing(
    publisher: Publisher, ledger: Ledger, server: RedisServer
) -> None:
    stale = claimed(ledger)
    stale.fence += 1_000
    publisher.put(delta(stale, "not mine", 0))
    flush(publisher)
    assert stale.is_lost
    with server.client() as client:
        assert [event["type"] for event in events(client, stale)] == ["job.queued", "job.started"]


@pytest.mark.parametrize("key_of", [names.events_key, names.job_key], ids=["stream", "row"])
def test_a_key_of_the_wrong_type_costs_its_own_job_its_events_and_no_other(
    key_of: Callable[[str], str],
    publisher: Publisher,
    ledger: Ledger,
    server: RedisServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before, broken, behind = (opened(publisher, ledger) for _ in range(3))
    with server.client() as client:
        key = key_of(broken.job_id)
        client.rename(key, "aside")
        client.set(key, "somebody else's")
        for offset in range(3):
            publisher.put_step([generated(stream, "x", offset) for stream in (before, broken, behind)])
            flush(publisher)
        for stream in (before, behind):
            written = [event for event in events(client, stream) if event["type"] == "output.delta"]
            assert "".join(str(event["text"]) for event in written) == "xxx"
        client.rename("aside", key)
        publisher.put(delta(broken, "mended", 3))
        flush(publisher)
        last = events(client, broken)[-1]
        assert (last["text"], last["offset"]) == ("mended", 3)
        seqs = [event["seq"] for event in events(client, broken)]
        assert seqs == list(range(1, len(seqs) + 1))
    refused = [record for record in caplog.records if record.message == "events of a job are refused"]
    assert [(vars(record)["action"], vars(record)["job_id"]) for record in refused] == [("publish", broken.job_id)]


def test_an_event_that_may_not_be_called_out_stands_in_the_stream_once(
    publisher: Publisher, ledger: Ledger, server: RedisServer
) -> None:
    stream = opened(publisher, ledger)
    with server.client() as client:
        try:
            client.execute_command("ACL", "SETUSER", "default", "resetchannels")
            publisher.put_step([generated(stream, "one", 0)])
            flush(publisher)
        finally:
            client.execute_command("ACL", "SETUSER", "default", "allchannels")
        publisher.put(delta(stream, " two", 3))
        flush(publisher)
        written = [event for event in events(client, stream) if event["type"] == "output.delta"]
        assert [event["text"] for event in written] == ["one", " two"]
        seqs = [event["seq"] for event in events(client, stream)]
        assert seqs == list(range(1, len(seqs) + 1))


def test_a_publisher_with_work_that_it_does_not_do_can_be_seen(ledger: Ledger, server: RedisServer) -> None:
    begun, may_go_on = threading.Event(), threading.Event()

    class SlowMeter(TokenMeter):
        def count(self, outputs: Sequence[RequestOutput], at: float) -> None:
            begun.set()
            assert may_go_on.wait(60)

    publisher = Publisher(ledger, SlowMeter(Metrics("default")))
    publisher.start()
    try:
        assert not publisher.is_busy
        stream = opened(publisher, ledger)
        server.kill()
        publisher.put_step([generated(stream, "x", 0)])
        assert begun.wait(20)
        assert publisher.is_busy
        stuck_at = publisher.num_turns
        may_go_on.set()
        eventually(lambda: publisher.num_turns > stuck_at + 2, 20, "trying again is a sign of life")
        assert publisher.is_busy
        server.start()
        eventually(lambda: not publisher.is_busy, 20, "all is sent")
    finally:
        may_go_on.set()
        publisher.stop(10)


def test_a_step_that_cannot_be_read_does_not_end_the_publisher(publisher: Publisher, ledger: Ledger) -> None:
    stream = opened(publisher, ledger)
    publisher.put_step([cast("RequestOutput", "nonsense")])
    publisher.put_step([generated(stream, "more", 0)])
    flush(publisher)
    assert publisher.is_alive
    assert [event["text"] for event in events(ledger.client, stream) if event["type"] == "output.delta"] == ["more"]


def test_an_output_that_no_event_can_hold_costs_its_own_job_and_no_other(publisher: Publisher, ledger: Ledger) -> None:
    streams = [claimed(ledger) for _ in range(3)]
    before, broken, behind = (publisher.open(stream.job_id, stream) for stream in streams)
    finish = Finish(FinishReason.STOP, 7, 2, first_token_s=0.1, generate_s=1.0)
    publisher.put_step([generated(stream, "It is ", 0) for stream in streams])
    texts = ("blue", cast("str", 7), "red")
    publisher.put_step([generated(stream, said, 6, finish) for stream, said in zip(streams, texts, strict=True)])
    failed = broken.wait(20)
    assert failed is not None, "nobody waits for the rest of it until a deadline"
    assert failed.reason is Ended.FAILED
    assert failed.error is not None
    assert (failed.error.code, failed.num_completion_tokens) == (ErrorCode.INTERNAL, 2)
    for output, said in ((before, "It is blue"), (behind, "It is red")):
        assert output.wait(20) == finish
        assert output.text == said
        written = [event for event in events(ledger.client, output.stream) if event["type"] == "output.delta"]
        assert "".join(str(event["text"]) for event in written) == said
    publisher.put_step([generated(streams[1], "more", 7)])
    flush(publisher)
    assert broken.text == "It is ", "what its readers have seen, and nothing after the end"
    assert publisher.is_alive


def test_an_error_in_counting_costs_no_text(ledger: Ledger) -> None:
    class BrokenMeter(TokenMeter):
        def count(self, outputs: Sequence[RequestOutput], at: float) -> None:
            raise KeyError("a request that nobody knows")

    publisher = Publisher(ledger, BrokenMeter(Metrics("default")))
    publisher.start()
    try:
        stream = claimed(ledger)
        output = publisher.open(stream.job_id, stream)
        finish = Finish(FinishReason.STOP, 7, 1, first_token_s=0.1, generate_s=1.0)
        publisher.put_step([generated(stream, "blue", 0, finish)])
        assert output.wait(20) == finish
        assert output.text == "blue"
    finally:
        publisher.stop(10)


def test_a_generation_has_ended_only_when_its_last_text_is_in_redis(
    publisher: Publisher, ledger: Ledger, server: RedisServer
) -> None:
    stream = claimed(ledger)
    output = publisher.open(stream.job_id, stream)
    finish = Finish(FinishReason.STOP, 7, 2, first_token_s=0.1, generate_s=1.0)
    publisher.put_step([generated(stream, "It is ", 0)])
    flush(publisher)
    server.kill()
    publisher.put_step([generated(stream, "blue", 6, finish)])
    eventually(lambda: output.text == "It is blue", 20, "the publisher has read the step")
    assert output.wait(0.2) is None
    server.start()
    assert output.wait(30) == finish
    with server.client() as client:
        written = [event for event in events(client, stream) if event["type"] == "output.delta"]
    assert [event["text"] for event in written] == ["It is ", "blue"]
    assert output.num_tokens == 2


def test_what_is_generated_for_a_request_that_was_closed_is_dropped(publisher: Publisher, ledger: Ledger) -> None:
    stream = claimed(ledger)
    output = publisher.open(stream.job_id, stream)
    publisher.put_step([generated(stream, "kept", 0)])
    flush(publisher)
    publisher.close(output)
    publisher.put_step([generated(stream, "dropped", 4)])
    flush(publisher)
    assert output.text == "kept"
    assert [event["text"] for event in events(ledger.client, stream) if event["type"] == "output.delta"] == ["kept"]


def test_only_neighbours_that_say_the_same_are_joined() -> None:
    first, second = DeltaBody(text="a", offset=0, num_tokens=1), DeltaBody(text="bc", offset=1, num_tokens=2)
    assert merge(first, second) == DeltaBody(text="abc", offset=0, num_tokens=3)
    fetching = ProgressBody(stage=Stage.FETCHING, done=0, total=2)
    assert merge(fetching, ProgressBody(stage=Stage.FETCHING, done=1, total=2)) == ProgressBody(
        stage=Stage.FETCHING, done=1, total=2
    )
    assert merge(fetching, ProgressBody(stage=Stage.PREFILL, done=0, total=9)) is None
    assert merge(fetching, first) is None
