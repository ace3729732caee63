"""Which model names exist over HTTP, what is said of a name that nobody serves, and who sees whose queues."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from api_stub.client.client import Client
from api_stub.contract.status import JobStatus
from api_stub.errors import InvalidRequest, InvalidSettings
from api_stub.gateway.keys import digest_of, new_key
from api_stub.settings import GatewaySettings
from tests.gateway.openai_stack import openai_client
from tests.gateway.service import Service, serving
from tests.gateway.test_jobs import QUESTION
from tests.servers import RedisServer
from tests.unit.api_stub.workers import ScriptedWorker

HELLO: Any = [{"role": "user", "content": "hello"}]
WARNING = "no worker serves the model 'default' now; the job waits for one"
KEYS = {name: new_key() for name in ("alice", "bob", "narrow", "root")}
OPTIONS = {"narrow": "models=other", "root": "role=operator"}
ENTRIES = "; ".join(f"{name}:{digest_of(key)} {OPTIONS.get(name, '')}" for name, key in KEYS.items())


@pytest.fixture(scope="module")
def closed_gateway(redis_server: RedisServer) -> Iterator[Service]:
    with serving(redis_server.url, api_keys=ENTRIES, api_models="default,other") as running:
        yield running


@pytest.fixture
def guarded(closed_gateway: Service, redis_url: str) -> Service:
    """A gateway with keys."""
    closed_gateway.gateway.queues.forget()
    return closed_gateway


@pytest.fixture
def hasty(redis_url: str) -> Iterator[Service]:
    """A gateway whose completions wait half a second for a worker to appear."""
    with serving(redis_url, api_no_worker_s=0.5) as running:
        yield running


def as_(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


def queues_of(service: Service, headers: dict[str, str]) -> dict[str, tuple[int, int, int]]:
    found = service.http.get("/v1/queues", headers=headers).json()["queues"]
    return {queue["model"]: (queue["depth"], queue["waiting"], queue["num_workers"]) for queue in found}


@pytest.mark.parametrize(("method", "path"), [("POST", ""), ("PUT", "/7b6a5c7e-35d2-4a4f-9a0e-54b6f4b1f7aa")])
def test_an_unknown_name_is_no_job(service: Service, redis_url: str, method: str, path: str) -> None:
    answer = service.http.request(method, f"/v1/jobs{path}", json=QUESTION | {"model": "typo"})
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem["errors"][0]["field"]) == (404, "model_not_found", "model")
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert "'typo'" in problem["detail"]
    assert "VISIONQ_API_MODELS" in problem["detail"]
    assert service.http.get("/v1/jobs").json() == {"jobs": []}
    with Client(service.url) as client, pytest.raises(InvalidRequest, match="'typo' is not known"):
        client.vqa(question="What?", model="typo")


def test_a_retry_asks_again_whether_the_name_is_known(service: Service, worker: ScriptedWorker, redis_url: str) -> None:
    with Client(redis_url) as client:
        job_id = client.vqa(question="What?", model="typo").id
    worker.answer(job_id, "red")
    answer = service.http.post(f"/v1/jobs/{job_id}/retry")
    assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")
    worker.ledger.loading("typo")
    assert service.http.post(f"/v1/jobs/{job_id}/retry").status_code == 202


def test_a_name_is_known_from_the_moment_its_worker_loads_it(service: Service, worker: ScriptedWorker) -> None:
    new = QUESTION | {"model": "new-one"}
    assert service.http.post("/v1/jobs", json=new).status_code == 404
    worker.ledger.loading("new-one")
    assert service.http.post("/v1/jobs", json=new).status_code == 202
    assert openai_client(service.url).models.retrieve("new-one").id == "new-one"


def test_a_job_for_a_name_without_a_worker_is_taken_with_a_warning(
    service: Service, worker: ScriptedWorker, redis_url: str
) -> None:
    answer = service.http.post("/v1/jobs", json=QUESTION)
    assert (answer.status_code, answer.json()["num_workers"], answer.json()["warnings"]) == (202, 0, [WARNING])
    job_id = answer.json()["job_id"]
    assert service.http.get(f"/v1/jobs/{job_id}").json()["warnings"] == [WARNING]
    for url in (service.url, redis_url):
        with Client(url) as client:
            assert client.job(job_id).status().warnings == (WARNING,)
    worker.ledger.beat("scripted@test:1", "default", [])
    assert "warnings" not in service.http.get(f"/v1/jobs/{job_id}").json()
    assert "warnings" not in service.http.post("/v1/jobs", json=QUESTION).json()


def test_a_typo_over_redis_is_in_nobodys_menu(guarded: Service, redis_url: str, worker: ScriptedWorker) -> None:
    with Client(redis_url) as client:
        for tenant in ("alice", "bob"):
            client.vqa(question="What?", tenant=tenant, model="typo")
    worker.ledger.beat("scripted@test:1", "served", [])
    guarded.gateway.queues.forget()
    for name in ("alice", "root"):
        assert set(queues_of(guarded, as_(name))) == {"default", "other", "served"}
        menu = [model.id for model in openai_client(guarded.url, KEYS[name]).models.list()]
        assert menu == ["default", "other", "served"]
        assert "typo" not in guarded.http.get("/metrics", headers=as_(name)).text
    assert set(queues_of(guarded, as_("narrow"))) == {"other"}
    assert [model.id for model in openai_client(guarded.url, KEYS["narrow"]).models.list()] == ["other"]


def test_a_key_counts_its_own_jobs_and_an_operators_all(
    guarded: Service, redis_url: str, worker: ScriptedWorker
) -> None:
    worker.ledger.beat("scripted@test:1", "default", [])
    with Client(redis_url) as client:
        first, *_ = [client.vqa(question="What?", tenant="alice").id for _ in range(20)]  # of which 8 have doorbells
        client.vqa(question="What?", tenant="alice", priority=0)
        client.vqa(question="What?", tenant="bob", priority=0)
    worker.take(first)
    assert queues_of(guarded, as_("root"))["default"] == (22, 10, 1)
    assert queues_of(guarded, as_("alice"))["default"] == (21, 9, 1)
    assert queues_of(guarded, as_("bob"))["default"] == (1, 1, 1)
    assert queues_of(guarded, as_("bob"))["other"] == (0, 0, 0)


def test_metrics_show_a_key_its_own_and_an_operator_everything(guarded: Service) -> None:
    for name in ("alice", "alice", "bob"):
        assert guarded.http.post("/v1/jobs", json=QUESTION, headers=as_(name)).status_code == 202

    def metrics(headers: dict[str, str]) -> str:
        return guarded.http.get("/metrics", headers=headers).text

    everything, own, public = metrics(as_("root")), metrics(as_("alice")), metrics({})
    assert 'visionq_queue_depth{model="default"} 3.0' in everything
    assert 'visionq_api_jobs_submitted_total{model="default"}' in everything
    assert 'visionq_queue_depth{model="default"} 2.0' in own
    assert "jobs_submitted" not in own
    assert "model=" not in public
    for text in (everything, own, public):
        assert "visionq_api_requests_total" in text
    wrong = guarded.http.get("/metrics", headers={"Authorization": "Bearer vq_wrong"})
    assert wrong.status_code == 401


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_that_nobody_takes_ends_with_no_worker(
    hasty: Service, worker: ScriptedWorker, stream: bool
) -> None:
    with pytest.raises(openai.InternalServerError) as refused:
        openai_client(hasty.url).chat.completions.create(model="default", messages=HELLO, stream=stream)
    assert (refused.value.status_code, refused.value.code) == (503, "no_worker")
    assert refused.value.response.headers["x-should-retry"] == "true"
    for word in ("'default'", "0.5 s", "VISIONQ_API_NO_WORKER_S"):
        assert word in refused.value.message
    (job,) = hasty.http.get("/v1/jobs").json()["jobs"]
    assert job["status"] == "cancelled"  # so that nobody works for nobody


def test_a_stream_that_has_begun_ends_with_no_worker(redis_url: str) -> None:
    with serving(redis_url, api_no_worker_s=1.0, api_heartbeat_s=0.2) as running:
        body = {"model": "default", "messages": HELLO, "stream": True}
        answer = running.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    assert '"code":"no_worker"' in answer.text
    assert "[DONE]" not in answer.text


def test_a_completion_waits_for_its_turn_as_long_as_a_worker_is_there(hasty: Service, worker: ScriptedWorker) -> None:
    body = {"model": "default", "messages": HELLO}
    worker.ledger.beat("scripted@test:1", "default", [])
    with pytest.raises(httpx.ReadTimeout):
        hasty.http.post("/v1/chat/completions", json=body, timeout=3)


def test_a_completion_with_an_idempotency_key_waits_on_in_the_queue(hasty: Service, worker: ScriptedWorker) -> None:
    body, key = {"model": "default", "messages": HELLO}, {"Idempotency-Key": "one"}
    answer = hasty.http.post("/v1/chat/completions", json=body, headers=key)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker")
    (job,) = hasty.http.get("/v1/jobs").json()["jobs"]
    assert job["status"] == JobStatus.QUEUED
    worker.answer(job["job_id"], "hello yourself")
    again = hasty.http.post("/v1/chat/completions", json=body, headers=key)
    assert again.json()["choices"][0]["message"]["content"] == "hello yourself"


def test_listed_models_are_model_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONQ_API_MODELS", "default, No!")
    with pytest.raises(InvalidSettings, match="VISIONQ_API_MODELS: not a model name: 'No!'"):
        GatewaySettings.load()
