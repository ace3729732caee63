"""/openapi.json says what the gateway does; health, queues and metrics tell how it fares."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import jsonschema
import pytest
from fastapi import Response
from openapi_spec_validator import OpenAPIV31SpecValidator

from api_stub.connections import MAX_COMMANDS
from api_stub.gateway.api_examples import EVENT_EXAMPLE, JOB_EXAMPLES
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.keys import KeyRing
from api_stub.gateway.metrics import Metrics
from api_stub.gateway.routes import operations
from api_stub.ledger.aio import AsyncLedger
from api_stub.settings import GatewaySettings
from tests.gateway.service import Service, sent_events, serving
from tests.gateway.test_jobs import QUESTION, submit
from tests.servers import free_port
from tests.unit.api_stub.workers import ScriptedWorker


@pytest.fixture
def document(service: Service) -> dict[str, Any]:
    found: dict[str, Any] = service.http.get("/openapi.json").json()
    return found


def check(document: dict[str, Any], name: str, value: object) -> None:
    """Hold a value against a component's schema."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


def references(node: object) -> set[str]:
    """Every $ref of a document."""
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*map(references, node.values()))
    return set().union(*map(references, node)) if isinstance(node, list) else set()


def test_the_document_is_whole(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert references(document) <= known
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for path in ("/v1/jobs", "/v1/jobs/{job_id}/events", "/v1/uploads", "/v1/queues", "/healthz", "/metrics"):
        assert path in document["paths"]
    (own_id,) = document["paths"]["/v1/jobs/{job_id}"]["put"]["parameters"]
    assert (own_id["schema"]["format"], own_id["schema"]["pattern"][-6:]) == ("uuid", "]{12}$")


def test_the_document_follows_the_specification(document: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(document).validate()


def test_every_body_has_an_example_that_fits(document: dict[str, Any]) -> None:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
            for kind, body in ((kind, body) for each in bodies for kind, body in each.get("content", {}).items()):
                if kind == "multipart/form-data":
                    continue
                examples = [each["value"] for each in body.get("examples", {}).values()] or [body.get("example")]
                schema = body["schema"] | {"components": document["components"]}
                for example in examples:
                    assert example is not None, (method, path, kind)
                    jsonschema.Draft202012Validator(schema).validate(example)


def test_the_example_of_an_event_is_one(document: dict[str, Any]) -> None:
    check(document, "Event", json.loads(EVENT_EXAMPLE["data"]))


@pytest.mark.parametrize("name", JOB_EXAMPLES)
def test_every_example_is_taken_and_answered_as_documented(
    service: Service, document: dict[str, Any], name: str
) -> None:
    check(document, "Job", JOB_EXAMPLES[name])
    answer = service.http.post("/v1/jobs", json=JOB_EXAMPLES[name])
    assert answer.status_code == 202
    check(document, "JobReply", answer.json())


def test_answers_are_as_documented(service: Service, document: dict[str, Any], worker: ScriptedWorker) -> None:
    done, failed = submit(service, metadata={"a": [1]}), submit(service)
    worker.answer(done, "red")
    worker.take(failed)
    worker.fail()
    for job_id in (done, failed):
        check(document, "JobReply", service.http.get(f"/v1/jobs/{job_id}").json())
    check(document, "JobList", service.http.get("/v1/jobs").json())
    check(document, "QueueList", service.http.get("/v1/queues").json())
    for refused in (service.http.get("/v1/jobs/none"), service.http.post("/v1/jobs", json={}), service.http.get("/x")):
        check(document, "Problem", refused.json())
    with httpx.stream("GET", f"{service.url}/v1/jobs/{done}/events", timeout=30) as stream:
        for event in sent_events(stream.iter_lines()):
            check(document, "Event", event.data)
    upload = service.http.post("/v1/uploads", json={"content_type": "image/png", "num_bytes": 5})
    check(document, "UploadReply", upload.json())


def test_queues_and_metrics_tell_depth_workers_and_errors(service: Service, worker: ScriptedWorker) -> None:
    worker.ledger.loading("mine")
    for _ in range(3):
        submit(service, model="mine")
    running = submit(service, model="other")
    worker.take(running)
    worker.ledger.beat("scripted@test:1", "other", [])
    service.gateway.queues.forget()
    queues = {queue["model"]: queue for queue in service.http.get("/v1/queues").json()["queues"]}
    assert queues["mine"] == {"model": "mine", "depth": 3, "waiting": 3, "num_workers": 0}
    assert queues["other"] == {"model": "other", "depth": 1, "waiting": 0, "num_workers": 1}

    service.http.get("/v1/jobs/none")
    text = service.http.get("/metrics").text
    assert 'visionq_queue_depth{model="mine"} 3.0' in text
    assert 'visionq_api_requests_total{method="GET",route="/v1/jobs/{job_id}",status="404"}' in text
    assert 'visionq_api_errors_total{code="unknown_job"}' in text
    assert "visionq_api_request_duration_seconds_bucket" in text
    assert "visionq_api_open_readers 0.0" in text


def test_an_absent_redis_is_told_apart_from_a_dead_process() -> None:
    with serving(f"redis://127.0.0.1:{free_port()}/0") as running:
        assert running.http.get("/healthz").status_code == 200
        assert running.http.get("/readyz").status_code == 503
        assert running.http.get("/metrics").status_code == 200
        for answer in (running.http.post("/v1/jobs", json=QUESTION), running.http.get("/v1/jobs/x/events")):
            assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
            assert "Retry-After" in answer.headers
            assert "127.0.0.1" not in answer.text


def test_readiness_is_told_while_all_connections_of_commands_are_busy(redis_url: str) -> None:
    settings = GatewaySettings.model_validate({"redis_url": redis_url})

    async def ask() -> str:
        gateway = await Gateway.open(settings, KeyRing(), Metrics())
        waiting = [asyncio.ensure_future(gateway.commands.blpop(["nothing"], 30)) for _ in range(MAX_COMMANDS)]
        try:
            async with asyncio.timeout(4):
                while sum(each["cmd"] == "blpop" for each in await gateway.prober.client_list()) < MAX_COMMANDS:
                    await asyncio.sleep(0.01)
            return (await operations.readyz(gateway, Response())).status
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await gateway.close()

    assert asyncio.run(ask()) == "ok"


def test_a_mistake_of_ours_tells_nothing_of_itself(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("secret-detail")

    monkeypatch.setattr(AsyncLedger, "view", fail)
    answer = httpx.get(f"{service.url}/v1/jobs/x", timeout=30)  # its connection is not used again
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "secret-detail" not in answer.text


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("DELETE", "/v1/jobs", 405)])
def test_a_wrong_address_is_a_problem_too(service: Service, method: str, path: str, status: int) -> None:
    answer = service.http.request(method, path)
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/problem+json")
