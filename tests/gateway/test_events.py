"""Event streams: whole, resumable, bounded, and gone when nobody reads."""

from __future__ import annotations

import asyncio
import http.client
import random
import socket
import threading

import httpx
import pytest
import redis

from api_stub.contract import names
from api_stub.gateway import broadcaster as broadcaster_module
from tests.gateway.service import Sent, Service, sent_events, serving, text_of
from tests.gateway.test_jobs import submit
from tests.servers import eventually
from tests.unit.api_stub.workers import ScriptedWorker


def read(service: Service, job_id: str, query: str = "", **headers: str) -> list[Sent]:
    """Read a stream to its end."""
    with httpx.stream("GET", f"{service.url}/v1/jobs/{job_id}/events{query}", headers=headers, timeout=30) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        return list(sent_events(answer.iter_lines()))


def nobody_reads(service: Service, client: redis.Redis) -> None:
    """Wait until the gateway has forgotten its readers, and Redis their channels."""
    eventually(lambda: service.gateway.broadcaster.num_channels == 0, what="no reader is left")
    idle = [names.events_key("")]
    eventually(lambda: client.pubsub_channels(names.events_key("*")) == idle, what="no channel is left")


def test_a_stream_begins_at_the_beginning_and_ends_with_the_job(
    service: Service, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    job_id = submit(service)
    with httpx.stream("GET", f"{service.url}/v1/jobs/{job_id}/events", timeout=30) as answer:
        events = sent_events(answer.iter_lines())
        assert next(events).type == "job.queued"
        worker.answer(job_id, "a ", "red ", "circle")
        rest = list(events)
    assert [event.type for event in rest] == ["job.started", *["output.delta"] * 3, "job.completed"]
    assert [event.id for event in rest] == ["2", "3", "4", "5", "6"]
    assert text_of(rest) == "a red circle"
    nobody_reads(service, redis_client)


def test_a_finished_job_is_streamed_as_it_was(service: Service, worker: ScriptedWorker) -> None:
    job_id = submit(service)
    worker.answer(job_id, "re", "d")
    assert text_of(read(service, job_id)) == "red"
    assert [event.id for event in read(service, job_id, "?after=3")] == ["4", "5"]
    assert [event.id for event in read(service, job_id, "?after=1", **{"Last-Event-ID": "4"})] == ["5"]


def test_a_browser_that_has_everything_is_told_not_to_come_back(service: Service, worker: ScriptedWorker) -> None:
    job_id = submit(service)
    worker.answer(job_id, "red")
    answer = service.http.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": "4"})
    assert (answer.status_code, answer.content) == (204, b"")


def test_once_the_stream_has_expired_the_stored_result_is_its_one_event(
    service: Service, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    job_id = submit(service)
    worker.answer(job_id, "re", "d")
    redis_client.delete(names.events_key(job_id))
    (event,) = read(service, job_id)
    assert (event.type, event.id) == ("job.completed", "5")
    result = event.data["result"]
    assert isinstance(result, dict)
    assert result["text"] == "red"


def test_a_second_attempt_follows_the_first(service: Service, worker: ScriptedWorker) -> None:
    job_id = submit(service)
    worker.take(job_id)
    worker.say("blu")
    worker.give_back()
    eventually(lambda: worker.ledger.reap() or True)
    worker.answer(job_id, "red")
    events = read(service, job_id)
    assert text_of(events) == "red"
    assert "job.retrying" in [event.type for event in events]


@pytest.mark.parametrize("given", ["?after=-1", "?after=x"])
def test_a_wrong_place_is_refused_by_name(service: Service, given: str) -> None:
    answer = service.http.get(f"/v1/jobs/{submit(service)}/events{given}")
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "after")


def test_a_wrong_last_id_is_refused_by_name(service: Service) -> None:
    answer = service.http.get(f"/v1/jobs/{submit(service)}/events", headers={"Last-Event-ID": "x"})
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "Last-Event-ID")


def test_a_quiet_stream_says_that_it_lives(redis_url: str) -> None:
    with serving(redis_url, api_heartbeat_s=0.05) as running:
        path = f"{running.url}/v1/jobs/{submit(running)}/events"
        with httpx.stream("GET", path, timeout=30) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("retry: ")
            assert sum(1 for line, _ in zip(filter(lambda line: line == ": alive", lines), range(3), strict=False)) == 3


def test_a_reader_that_leaves_frees_everything(service: Service, redis_client: redis.Redis) -> None:
    job_id = submit(service)
    for _ in range(3):
        with httpx.stream("GET", f"{service.url}/v1/jobs/{job_id}/events", timeout=30) as answer:
            events = sent_events(answer.iter_lines())
            assert next(events).type == "job.queued"
            assert service.gateway.broadcaster.num_readers == 1
        nobody_reads(service, redis_client)


def test_a_waiting_request_that_leaves_frees_everything(service: Service, redis_client: redis.Redis) -> None:
    job_id = submit(service)
    with socket.create_connection(service.address) as connection:
        connection.sendall(f"GET /v1/jobs/{job_id}?wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        eventually(lambda: service.gateway.broadcaster.num_readers == 1, what="it waits")
    nobody_reads(service, redis_client)


def test_readers_survive_the_loss_of_their_subscription(
    service: Service, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    job_id = submit(service)
    worker.take(job_id)
    with httpx.stream("GET", f"{service.url}/v1/jobs/{job_id}/events", timeout=30) as answer:
        events = sent_events(answer.iter_lines())
        assert [next(events).type for _ in range(2)] == ["job.queued", "job.started"]
        for piece in ("a ", "red ", "circle"):
            eventually(lambda: redis_client.client_kill_filter(_type="pubsub") >= 1, what="there is one to lose")
            worker.say(piece)
        worker.finish()
        assert text_of(list(events)) == "a red circle"


def test_a_slow_reader_is_told_of_its_gap_and_still_gets_all(
    service: Service, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcaster_module, "MAX_MAILBOX", 4)
    job_id = submit(service)
    worker.take(job_id)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(30)
        slow.connect(service.address)
        slow.sendall(f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        eventually(lambda: service.gateway.broadcaster.num_readers == 1, what="it reads")
        # More than both sockets hold; one by one, so that the gateway sends what it can before more comes.
        while not dropped(service):
            worker.say("x" * 100_000)
        assert max(mailbox_sizes(service)) <= 4
        worker.finish()
        answer = http.client.HTTPResponse(slow)
        answer.begin()
        events = list(sent_events(iter(answer.read().decode().splitlines())))
    gaps = [event for event in events if event.type == "stream.gap"]
    assert gaps
    assert all(int(str(gap.data["to"])) >= int(str(gap.data["from"])) > 1 for gap in gaps)
    assert {gap.id for gap in gaps} == {""}
    assert text_of(events) == worker.text
    assert events[-1].type == "job.completed"


def dropped(service: Service) -> bool:
    """Tell whether the gateway had no room for an event of some reader."""
    return any(mailbox.dropped_to for mailbox in mailboxes(service))


def mailbox_sizes(service: Service) -> list[int]:
    """How many frames the gateway keeps for each of its readers."""
    return [len(mailbox._frames) for mailbox in mailboxes(service)]


def mailboxes(service: Service) -> list[broadcaster_module.Mailbox]:
    return [
        mailbox for topic in list(service.gateway.broadcaster._topics.values()) for mailbox in list(topic.mailboxes)
    ]


def test_readers_that_are_cut_again_and_again_read_the_whole_text(
    service: Service, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    job_ids = [submit(service) for _ in range(5)]
    words = [f"word {number} " for number in range(40)]
    writing = threading.Thread(target=lambda: [worker.answer(job_id, *words) for job_id in job_ids])

    async def read_all() -> list[list[Sent]]:
        async with httpx.AsyncClient(base_url=service.url, timeout=60, limits=httpx.Limits(max_connections=60)) as http:
            readers = [read_in_pieces(http, job_id, random.Random(seed)) for seed in range(10) for job_id in job_ids]
            reading = asyncio.gather(*readers)
            writing.start()
            return await reading

    for events in asyncio.run(read_all()):
        assert [int(event.id) for event in events] == list(range(1, len(events) + 1))
        assert text_of(events) == "".join(words)
        assert events[-1].type == "job.completed"
    writing.join(30)
    nobody_reads(service, redis_client)


async def read_in_pieces(http: httpx.AsyncClient, job_id: str, dice: random.Random) -> list[Sent]:
    """Read a job to its end, leaving now and then and coming back with the last id."""
    events: list[Sent] = []
    while not events or not events[-1].type.startswith("job.comp"):
        headers = {"Last-Event-ID": events[-1].id} if events else {}
        patience = dice.randint(1, 30)
        async with http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
            assert answer.status_code == 200
            lines: list[str] = []
            async for line in answer.aiter_lines():
                lines.append(line)
                if not line:
                    events.extend(sent_events(iter(lines)))
                    lines = []
                    patience -= 1
                    if patience < 0:
                        break
    return events
