"""Jobs over HTTP: hand in, look, wait, list, cancel."""

from __future__ import annotations

import json
import threading
import uuid

import httpx
import pytest
import redis

from api_stub.contract import names
from tests.gateway.service import Service
from tests.servers import eventually
from tests.unit.api_stub.workers import ScriptedWorker

QUESTION = {"task": "visionq.vqa", "question": "What colour is it?"}


def submit(service: Service, **fields: object) -> str:
    """Hand a question in and return its id."""
    answer = service.http.post("/v1/jobs", json=QUESTION | fields)
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["job_id"]
    return job_id


def test_a_job_goes_in_comes_out_and_is_found_again(service: Service, worker: ScriptedWorker) -> None:
    answer = service.http.post("/v1/jobs", json=QUESTION | {"metadata": {"page": 7}})
    assert answer.status_code == 202
    job = answer.json()
    assert (job["status"], job["position"], job["num_workers"]) == ("queued", 0, 0)
    assert answer.headers["Location"] == job["urls"]["self"]

    worker.answer(job["job_id"], "re", "d")
    found = service.http.get(job["urls"]["self"]).json()
    assert (found["status"], found["result"]["text"]) == ("completed", "red")
    assert "position" not in found


def test_a_doorbell_is_rung(service: Service, redis_client: redis.Redis) -> None:
    job_id = submit(service)
    (message,) = redis_client.lrange(names.queue_list("default", 6), 0, -1)
    assert json.loads(message)["headers"]["id"] == job_id


def test_a_request_may_wait_for_the_end(service: Service, worker: ScriptedWorker) -> None:
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{service.url}/v1/jobs", json=QUESTION, headers={"Prefer": "wait=20"}, timeout=30))

    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: service.gateway.broadcaster.num_readers == 1, what="somebody waits")
    (known,) = service.http.get("/v1/jobs").json()["jobs"]
    worker.answer(known["job_id"], "red")
    asking.join(30)
    (answer,) = answers
    assert answer.status_code == 200
    assert answer.json()["result"]["text"] == "red"
    assert answer.headers["Preference-Applied"] == "wait=20"
    eventually(lambda: service.gateway.broadcaster.num_channels == 0, what="nobody listens any more")


def test_a_wait_that_was_too_short_is_answered_as_a_submit(service: Service) -> None:
    answer = service.http.post("/v1/jobs", json=QUESTION, headers={"Prefer": "wait=0, respond-async"})
    assert (answer.status_code, answer.headers["Preference-Applied"]) == (202, "wait=0")


def test_looking_may_wait_too(service: Service, worker: ScriptedWorker) -> None:
    job_id = submit(service)
    assert service.http.get(f"/v1/jobs/{job_id}?wait=0.05").json()["status"] == "queued"
    worker.answer(job_id, "red")
    assert service.http.get(f"/v1/jobs/{job_id}?wait=20").json()["status"] == "completed"


def test_cancelling_is_idempotent_and_tells_how_far_it_is(service: Service, worker: ScriptedWorker) -> None:
    queued, running = submit(service), submit(service)
    assert [service.http.post(f"/v1/jobs/{queued}/cancel").status_code for _ in range(2)] == [200, 200]
    assert service.http.get(f"/v1/jobs/{queued}").json()["status"] == "cancelled"

    worker.take(running)
    for _ in range(2):
        answer = service.http.post(f"/v1/jobs/{running}/cancel")
        assert (answer.status_code, answer.json()["cancelling"]) == (202, True)


def test_a_finished_job_is_retried_once(service: Service, worker: ScriptedWorker) -> None:
    job_id = submit(service)
    early = service.http.post(f"/v1/jobs/{job_id}/retry")
    assert (early.status_code, early.json()["code"]) == (409, "cannot_retry")
    worker.take(job_id)
    worker.fail()
    first, second = (service.http.post(f"/v1/jobs/{job_id}/retry") for _ in range(2))
    assert (first.status_code, second.json()["job_id"]) == (202, first.json()["job_id"])
    assert first.json()["job_id"] != job_id
    assert first.json()["status"] == "queued"


def test_jobs_are_listed_newest_first_page_by_page(service: Service) -> None:
    submitted = [submit(service) for _ in range(3)]
    first = service.http.get("/v1/jobs?limit=2").json()
    second = service.http.get(f"/v1/jobs?limit=2&cursor={first['next_cursor']}").json()
    listed = [job["job_id"] for page in (first, second) for job in page["jobs"]]
    assert listed == submitted[::-1]
    assert "next_cursor" not in second
    assert service.http.get("/v1/jobs?status=completed").json() == {"jobs": []}


@pytest.mark.parametrize("path", ["", "/events", "/cancel", "/retry"])
def test_an_unknown_job_is_not_found(service: Service, path: str) -> None:
    method = "POST" if path in ("/cancel", "/retry") else "GET"
    answer = service.http.request(method, f"/v1/jobs/{uuid.uuid4()}{path}")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_job")
    assert answer.headers["Content-Type"] == "application/problem+json"
