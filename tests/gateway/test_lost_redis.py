"""Redis comes back empty while jobs are read: every kind of reader ends with an error that says so, none waits on."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator

import httpx
import pytest
import redis

from api_stub.client.client import AsyncClient, Client
from api_stub.contract import names
from api_stub.errors import UnknownJob
from tests.gateway.openai_stack import openai_client
from tests.gateway.service import Service, sent_events, serving
from tests.gateway.test_jobs import QUESTION
from tests.gateway.test_openai_chat import HELLO, only_job
from tests.servers import eventually
from tests.unit.api_stub.workers import ScriptedWorker

BEAT_S = 0.5
#: Two heartbeats, and time for two idle cores that are not idle.
SOON_S = 10.0


@pytest.fixture
def beating(redis_url: str, worker: ScriptedWorker) -> Iterator[Service]:
    worker.ledger.beat("scripted@test:1", "default", [])
    with serving(redis_url, api_heartbeat_s=BEAT_S) as running:
        yield running


def outcome_of(read: Callable[[], object], service: Service, lose: Callable[[], object]) -> object:
    """Begin to read, lose everything, and return what the reader ends with."""
    ends: list[object] = []

    def run() -> None:
        try:
            ends.append(read())
        except Exception as error:  # noqa: BLE001
            ends.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    eventually(lambda: service.gateway.broadcaster.num_readers == 1, what="it reads")
    lose()
    thread.join(SOON_S)
    assert ends, "it still waits"
    return ends[0]


def test_an_event_stream_ends_with_the_problem(
    beating: Service, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    job_id = beating.http.post("/v1/jobs", json=QUESTION).json()["job_id"]
    worker.take(job_id)
    worker.say("a ")

    def read() -> list[tuple[str, object]]:
        with httpx.stream("GET", f"{beating.url}/v1/jobs/{job_id}/events", timeout=30) as answer:
            return [(sent.type, sent.data) for sent in sent_events(answer.iter_lines())]

    events = outcome_of(read, beating, redis_client.flushall)
    assert isinstance(events, list)
    assert [kind for kind, _ in events] == ["job.queued", "job.started", "output.delta", "error"]
    assert events[-1][1]["code"] == "unknown_job"
    assert events[-1][1]["status"] == 404
    assert beating.http.get(f"/v1/jobs/{job_id}/events").status_code == 404


@pytest.mark.parametrize("kind", ["events", "stream", "result", "async"])
def test_a_python_reader_behind_the_gateway_learns_that_the_job_is_unknown(
    beating: Service, redis_client: redis.Redis, kind: str
) -> None:
    job_id = beating.http.post("/v1/jobs", json=QUESTION).json()["job_id"]

    async def follow() -> None:
        async with AsyncClient(beating.url) as client:
            async for _ in client.job(job_id).events():
                pass

    def read() -> object:
        if kind == "async":
            return asyncio.run(follow())
        with Client(beating.url) as client:
            job = client.job(job_id)
            return list(getattr(job, kind)()) if kind != "result" else job.result()

    assert isinstance(outcome_of(read, beating, redis_client.flushall), UnknownJob)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_completion_ends_with_an_error_that_says_ask_again(
    beating: Service, redis_client: redis.Redis, worker: ScriptedWorker, is_stream: bool
) -> None:
    def read() -> object:
        with httpx.stream(
            "POST",
            f"{beating.url}/v1/chat/completions",
            json={"model": "default", "messages": HELLO, "stream": is_stream},
            timeout=30,
        ) as answer:
            return answer.status_code, answer.headers, answer.read().decode()

    def lose() -> None:
        worker.take(only_job(beating))
        worker.say("a ")
        redis_client.flushall()

    ended = outcome_of(read, beating, lose)
    assert isinstance(ended, tuple)
    status, headers, text = ended
    if is_stream:
        assert status == 200
        error = json.loads(text.strip().rsplit("data: ", 1)[1])["error"]
    else:
        assert status == 503
        assert "Retry-After" in headers
        error = json.loads(text)["error"]
    assert error["code"] == "store_unavailable"
    assert "ask again" in error["message"]


def test_openais_client_asks_again_by_itself(
    beating: Service, redis_client: redis.Redis, worker: ScriptedWorker
) -> None:
    def read() -> object:
        with openai_client(beating.url, max_retries=2) as client:
            return client.chat.completions.create(model="default", messages=HELLO).choices[0].message.content

    def lose() -> None:
        lost = only_job(beating)
        redis_client.flushall()
        worker.ledger.beat("scripted@test:1", "default", [])
        eventually(lambda: beating.http.get("/v1/jobs").json()["jobs"], what="the question comes again")
        again = only_job(beating)
        assert again != lost
        worker.answer(again, "red")

    assert outcome_of(read, beating, lose) == "red"


def test_an_event_that_was_not_published_comes_from_the_stream_after_a_silence(
    beating: Service, redis_client: redis.Redis, worker: ScriptedWorker
) -> None:
    job_id = beating.http.post("/v1/jobs", json=QUESTION).json()["job_id"]
    worker.take(job_id)

    def read() -> object:
        with httpx.stream("GET", f"{beating.url}/v1/jobs/{job_id}/events", timeout=30) as answer:
            return [sent.type for _, sent in zip(range(3), sent_events(answer.iter_lines()), strict=False)]

    def write_unheard() -> None:
        event = {"v": 1, "job_id": job_id, "seq": 3, "attempt": 1, "ts": 1.0, "type": "output.delta"}
        delta = json.dumps(event | {"text": "a ", "offset": 0, "num_tokens": 1})
        redis_client.xadd(names.events_key(job_id), {"event": delta}, id="3-0")

    assert outcome_of(read, beating, write_unheard) == ["job.queued", "job.started", "output.delta"]
