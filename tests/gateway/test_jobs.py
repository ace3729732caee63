"""Jobs over HTTP: hand in, look, wait, list, cancel."""

from __future__ import annotations

import threading
import uuid

import httpx
import pytest

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


def test_a_doorbell_is_rung(service: Service) -> None:
    job_id = submit(service)
    ((_, message),) = [service_redis_pop(service)]
    assert job_id in message


def service_redis_pop(service: Service) -> tuple[str, str]:
    import redis

    url = service.gateway.settings.redis_url.get_secret_value()
    with redis.Redis.from_url(url, decode_responses=True) as client:
        popped = client.brpop(["visionq.default\x06\x166"], timeout=10)
    assert isinstance(popped, (list, tuple))
    return popped[0], popped[1]


def test_a_request_may_wait_for_the_end(service: Service, worker: ScriptedWorker) -> None:
    answers: list[httpx.Response] = []
    job = {**QUESTION}

    def ask() -> None:
        answers.append(service.http.post("/v1/jobs", json=job, headers={"Prefer": "wait=20"}))

    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: service.gateway.hub.num_readers == 1, what="somebody waits")
    (known,) = httpx.get(f"{service.url}/v1/jobs").json()["jobs"]
    worker.answer(known["job_id"], "red")
    asking.join(30)
    (answer,) = answers
    assert answer.status_code == 200
    assert answer.json()["result"]["text"] == "red"
    assert answer.headers["Preference-Applied"] == "wait=20"
    eventually(lambda: service.gateway.hub.num_channels == 0, what="nobody listens any more")


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


def test_jobs_are_listed_newest_first_page_by_page(service: Service) -> None:
    submitted = [submit(service) for _ in range(3)]
    first = service.http.get("/v1/jobs?limit=2").json()
    second = service.http.get(f"/v1/jobs?limit=2&cursor={first['next_cursor']}").json()
    listed = [job["job_id"] for page in (first, second) for job in page["jobs"]]
    assert listed == submitted[::-1]
    assert "next_cursor" not in second
    assert service.http.get("/v1/jobs?status=completed").json() == {"jobs": []}


@pytest.mark.parametrize("path", ["", "/events", "/cancel"])
def test_an_unknown_job_is_not_found(service: Service, path: str) -> None:
    method = "POST" if path == "/cancel" else "GET"
    answer = service.http.request(method, f"/v1/jobs/{uuid.uuid4()}{path}")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_job")
    assert answer.headers["Content-Type"] == "application/problem+json"
