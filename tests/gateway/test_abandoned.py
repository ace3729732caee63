"""Completions whose client leaves before the answer: kept for the same question of the same caller, for nobody else."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import redis

from api_stub.gateway import abandoned
from api_stub.gateway.keys import digest_of, new_key
from tests.gateway.openai_stack import eager_worker
from tests.gateway.service import Service, serving
from tests.gateway.test_openai_chat import HELLO, only_job
from tests.servers import eventually
from tests.unit.api_stub.workers import ScriptedWorker

BODY: dict[str, Any] = {"model": "default", "messages": HELLO}
OTHER: dict[str, Any] = {"model": "default", "messages": [{"role": "user", "content": "Goodbye?"}]}
KEYS = {name: new_key() for name in ("alice", "bob")}
ENTRIES = "; ".join(f"{name}:{digest_of(key)}" for name, key in KEYS.items())


@pytest.fixture
def patient(redis_url: str, worker: ScriptedWorker) -> Iterator[Service]:
    """A gateway that keeps what is left for longer than any test takes."""
    worker.ledger.beat("scripted@test:1", "default", [])
    with serving(redis_url, api_keep_abandoned_s=60.0) as running:
        yield running


@contextmanager
def asked(service: Service, body: Mapping[str, Any] = BODY, **headers: str) -> Iterator[socket.socket]:
    """Ask for a completion; the client leaves without its answer when the block ends."""
    with socket.create_connection(service.address, timeout=30) as connection:
        content = json.dumps(body).encode()
        given = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(content))} | headers
        head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + content)
        yield connection


def abandon(service: Service, body: Mapping[str, Any] = BODY, **headers: str) -> str:
    """Ask, leave once the job is in the queue, and return its id."""
    before = set(jobs(service, **headers))
    with asked(service, body, **headers):
        eventually(lambda: set(jobs(service, **headers)) - before, what="the job is in the queue")
        eventually(lambda: service.gateway.broadcaster.num_readers == 1, what="somebody waits for it")
        (job_id,) = set(jobs(service, **headers)) - before
    eventually(lambda: service.gateway.broadcaster.num_readers == 0, what="nobody waits for it")
    return job_id


def jobs(service: Service, **headers: str) -> dict[str, str]:
    """The caller's jobs and their status."""
    mine = {name: value for name, value in headers.items() if name == "Authorization"}
    found = service.http.get("/v1/jobs", headers=mine).json()["jobs"]
    return {job["job_id"]: job["status"] for job in found}


def answer_to(service: Service, body: Mapping[str, Any] = BODY, **headers: str) -> httpx.Response:
    content = {"Content-Type": "application/json"}
    url = f"{service.url}/v1/chat/completions"
    return httpx.post(url, content=json.dumps(body), headers=content | headers, timeout=60)


def test_the_same_question_again_gets_the_job_that_kept_its_place(patient: Service, worker: ScriptedWorker) -> None:
    for _ in range(3):
        job_id = only_job(patient) if jobs(patient) else abandon(patient)
        with asked(patient):
            eventually(lambda: patient.gateway.broadcaster.num_readers == 1, what="somebody waits again")
            assert jobs(patient) == {job_id: "queued"}
        eventually(lambda: patient.gateway.broadcaster.num_readers == 0, what="nobody waits")
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(answer_to(patient)))
    thread.start()
    eventually(lambda: patient.gateway.broadcaster.num_readers == 1, what="somebody waits again")
    worker.answer(job_id, "red")
    thread.join(30)
    assert (answers[0].status_code, answers[0].json()["id"]) == (200, f"chatcmpl-{job_id}")
    assert answers[0].json()["choices"][0]["message"]["content"] == "red"
    assert list(jobs(patient)) == [job_id]


def test_a_running_job_and_its_answer_are_kept_too(patient: Service, worker: ScriptedWorker) -> None:
    with asked(patient):
        job_id = only_job(patient)
        worker.take(job_id)
    eventually(lambda: patient.gateway.broadcaster.num_readers == 0, what="nobody waits for it")
    worker.say("red")
    worker.finish()
    assert answer_to(patient).json()["choices"][0]["message"]["content"] == "red"
    assert jobs(patient) == {job_id: "completed"}


def test_another_gateway_hands_it_over_as_well(patient: Service, redis_url: str, worker: ScriptedWorker) -> None:
    job_id = abandon(patient)
    with serving(redis_url) as other, asked(other):
        eventually(lambda: other.gateway.broadcaster.num_readers == 1, what="somebody waits again")
        assert jobs(other) == {job_id: "queued"}


def test_what_is_kept_is_handed_out_once(patient: Service) -> None:
    job_id = abandon(patient)
    with asked(patient), asked(patient):
        eventually(lambda: patient.gateway.broadcaster.num_readers == 2, what="two wait")
        assert len(jobs(patient)) == 2
        assert job_id in jobs(patient)


@pytest.mark.parametrize(
    "body", [OTHER, BODY | {"max_tokens": 7}, BODY | {"stream": True}, {"messages": HELLO, "model": "default"}]
)
def test_another_body_is_another_job(patient: Service, body: dict[str, Any]) -> None:
    job_id = abandon(patient)
    with asked(patient, body):
        eventually(lambda: len(jobs(patient)) == 2, what="a job of its own")
    assert jobs(patient)[job_id] == "queued"


def test_another_caller_gets_a_job_of_its_own(redis_url: str, worker: ScriptedWorker) -> None:
    worker.ledger.beat("scripted@test:1", "default", [])
    alice, bob = ({"Authorization": f"Bearer {key}"} for key in KEYS.values())
    with serving(redis_url, api_keys=ENTRIES, api_keep_abandoned_s=60.0) as service:
        job_id = abandon(service, **alice)
        with asked(service, **bob):
            eventually(lambda: len(jobs(service, **bob)) == 1, what="a job of his own")
            assert job_id not in jobs(service, **bob)
        with asked(service, **alice):
            eventually(lambda: service.gateway.broadcaster.num_readers == 1, what="she waits again")
            assert list(jobs(service, **alice)) == [job_id]


def test_a_job_that_nobody_asks_for_again_is_cancelled(redis_url: str, worker: ScriptedWorker) -> None:
    worker.ledger.beat("scripted@test:1", "default", [])
    with serving(redis_url, api_keep_abandoned_s=1.0) as service:
        job_id = abandon(service)
        assert jobs(service) == {job_id: "queued"}
        eventually(lambda: jobs(service) == {job_id: "cancelled"}, what="it is cancelled")
        with asked(service):
            eventually(lambda: len(jobs(service)) == 2, what="the question is a new job")


def test_a_job_that_was_handed_over_is_not_cancelled_under_its_new_reader(
    redis_url: str, worker: ScriptedWorker
) -> None:
    worker.ledger.beat("scripted@test:1", "default", [])
    with serving(redis_url, api_keep_abandoned_s=1.0) as service:
        job_id = abandon(service)
        with asked(service):
            eventually(lambda: service.gateway.broadcaster.num_readers == 1, what="somebody waits again")
            time.sleep(1.5)  # what must not happen has no event to wait for
            assert jobs(service) == {job_id: "queued"}


def test_a_job_that_is_left_again_is_kept_for_the_whole_time_again(redis_url: str, worker: ScriptedWorker) -> None:
    """The time of the first leaving passes while the question is away for the second time."""
    worker.ledger.beat("scripted@test:1", "default", [])
    with serving(redis_url, api_keep_abandoned_s=4.0) as service:
        job_id = abandon(service)
        first_ends = time.monotonic() + 4.0
        time.sleep(2.0)
        assert abandon_again(service) == job_id
        time.sleep(max(0.0, first_ends - time.monotonic()) + 0.6)
        assert jobs(service) == {job_id: "queued"}
        eventually(lambda: jobs(service) == {job_id: "cancelled"}, what="it is cancelled in the end")


def test_a_kept_job_that_was_cancelled_is_not_handed_over(patient: Service) -> None:
    job_id = abandon(patient)
    patient.http.post(f"/v1/jobs/{job_id}/cancel")
    with asked(patient):
        eventually(lambda: sorted(jobs(patient).values()) == ["cancelled", "queued"], what="a new job")


def test_a_tenant_keeps_a_bounded_number(
    patient: Service, monkeypatch: pytest.MonkeyPatch, redis_client: redis.Redis
) -> None:
    monkeypatch.setattr(abandoned, "MAX_KEPT", 2)
    ids = [abandon(patient, BODY | {"max_tokens": number}) for number in (1, 2, 3)]
    eventually(lambda: jobs(patient)[ids[2]] == "cancelled", what="the third is cancelled at once")
    assert [jobs(patient)[job_id] for job_id in ids[:2]] == ["queued", "queued"]
    (key,) = redis_client.keys("visionq:gateway:kept:*")
    assert redis_client.zcard(key) == 2
    assert 0 < int(redis_client.pttl(key)) <= 120_000


def test_with_an_idempotency_key_the_job_goes_on_and_the_key_brings_its_answer(
    redis_url: str, worker: ScriptedWorker
) -> None:
    worker.ledger.beat("scripted@test:1", "default", [])
    key = {"Idempotency-Key": "once"}
    with serving(redis_url, api_keep_abandoned_s=0.0) as service:
        job_id = abandon(service, **key)
        assert abandon_again(service, **key) == job_id
        worker.answer(job_id, "red")
        first, second = answer_to(service, **key), answer_to(service, **key)
        assert first.json() == second.json()
        assert first.json()["choices"][0]["message"]["content"] == "red"
        streamed = answer_to(service, BODY | {"stream": True}, **key)
        assert "red" in streamed.text
        assert streamed.text.endswith("[DONE]\n\n")
        assert jobs(service) == {job_id: "completed"}
        refused = answer_to(service, OTHER, **key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "idempotency_key_reused")


def abandon_again(service: Service, **headers: str) -> str:
    with asked(service, **headers):
        eventually(lambda: service.gateway.broadcaster.num_readers == 1, what="somebody waits again")
    eventually(lambda: service.gateway.broadcaster.num_readers == 0, what="nobody waits")
    (job_id,) = jobs(service)
    assert jobs(service) == {job_id: "queued"}
    return job_id


def test_a_gateway_that_stops_leaves_the_job_to_the_next(patient: Service, redis_url: str) -> None:
    with serving(redis_url, api_keep_abandoned_s=60.0) as first:
        results: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: results.append(answer_to(first)))
        thread.start()
        job_id = only_job(first)
        eventually(lambda: first.gateway.broadcaster.num_readers == 1, what="somebody waits")
    thread.join(30)
    assert results[0].status_code == 503
    with eager_worker(redis_url):
        assert answer_to(patient).json()["id"] == f"chatcmpl-{job_id}"
