"""The AsyncAPI document is a valid one, and the messages that really travel are as it says."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from jsonschema import Draft7Validator, Draft202012Validator

from api_stub.client.client import Client
from api_stub.contract import names
from api_stub.contract.job import TaskName
from api_stub.contract.schema import asyncapi
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.lua import message_template
from api_stub.ledger.settings import LedgerConfig
from tests.golden.samples import DIRECTORY, EVENTS, JOBS
from tests.servers import eventually
from tests.unit.api_stub.workers import ScriptedWorker

SPECIFICATION = Path(__file__).parents[2] / "structure" / "asyncapi_spec" / "asyncapi-3.0.0.json"
DOCUMENT: Any = asyncapi()
QUEUE = names.queue("default")


def at(reference: str) -> Any:
    """What a $ref of the document leads to."""
    node = DOCUMENT
    for part in reference.removeprefix("#/").split("/"):
        node = node[part]
    return at(node["$ref"]) if isinstance(node, dict) and "$ref" in node else node


def references(node: object) -> Iterator[str]:
    """The document's own references: those inside a schema lead to places inside it."""
    if isinstance(node, dict) and "schemaFormat" not in node:
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for child in node.values():
            yield from references(child)
    elif isinstance(node, list):
        for child in node:
            yield from references(child)


def fits(message: str, part: str, value: object) -> bool:
    """Tell whether a value is what the document says about a message's `payload` or `headers`."""
    schema = at(at(f"#/components/messages/{message}")[part]["$ref"])["schema"]
    return Draft202012Validator(schema).is_valid(value)


def taken(message: Any) -> tuple[object, object]:
    """Headers and body of a message from kombu's list."""
    parsed = json.loads(message)
    return parsed["headers"], json.loads(base64.b64decode(parsed["body"]))


def test_the_document_is_valid_and_leads_nowhere_else() -> None:
    Draft7Validator(json.loads(SPECIFICATION.read_text("utf-8"))).validate(DOCUMENT)
    assert {at(reference) is not None for reference in references(DOCUMENT)} == {True}
    for made in DOCUMENT["components"]["schemas"].values():
        Draft202012Validator.check_schema(made["schema"])


def test_the_specification_would_refuse_a_wrong_document() -> None:
    wrong = json.loads(json.dumps(DOCUMENT))
    wrong["operations"]["send_event"]["action"] = "shout"
    assert not Draft7Validator(json.loads(SPECIFICATION.read_text("utf-8"))).is_valid(wrong)


def test_addresses_are_those_of_the_code() -> None:
    addresses = {name: channel["address"] for name, channel in DOCUMENT["channels"].items()}
    assert addresses == {
        "jobs": "visionq.{model}",
        "events": "visionq:events:{job_id}",
        "control": "visionq:cancel",
        "results": "celery-task-meta-{job_id}",
    }
    for channel in DOCUMENT["channels"].values():
        assert set(channel.get("parameters", {})) == set(re.findall(r"{(\w+)}", channel["address"]))


@pytest.mark.parametrize("name", JOBS)
def test_what_a_celery_producer_sends_is_as_documented(name: str, redis_client: redis.Redis, redis_url: str) -> None:
    job = JOBS[name]
    kwargs = json.loads(job.to_json())
    kind = kwargs.pop("task")
    with Celery(broker=redis_url, set_as_current=False) as producer:
        producer.send_task(kind, kwargs=kwargs, queue=QUEUE, task_id="job-1")
    headers, body = taken(redis_client.rpop(QUEUE))
    message = kind.removeprefix("visionq.")
    assert fits(message, "headers", headers)
    assert fits(message, "payload", body)
    other = "vqa" if message != "vqa" else "caption"
    assert not fits(other, "headers", headers)
    assert not fits("doorbell", "payload", body)
    assert not fits(message, "payload", [[], kwargs | {"colour": "red"}, {}])


def test_doorbells_of_client_and_ledger_are_as_documented(redis_client: redis.Redis, redis_url: str) -> None:
    with Client(redis_url) as client:
        client.vqa(question="Why?")
    rung = redis_client.rpop(names.queue_list("default", names.priority_step(6)))
    own = message_template()
    for name, value in (("task", TaskName.VQA), ("id", "job-1"), ("queue", QUEUE), ("tag", "t"), ("priority", 6)):
        own = own.replace(f"<{name}>", json.dumps(value))
    for message in (rung, own):
        headers, body = taken(message)
        assert fits("doorbell", "headers", headers)
        assert fits("doorbell", "payload", body)
        assert not fits("vqa", "headers", headers)


@pytest.mark.parametrize("name", EVENTS)
def test_events_are_as_documented(name: str) -> None:
    assert fits("event", "payload", json.loads((DIRECTORY / f"{name}.json").read_text("utf-8")))
    assert not fits("event", "payload", {"type": "job.queued"})


@pytest.mark.parametrize("name", ["success", "failure", "revoked"])
def test_results_are_as_documented(name: str) -> None:
    meta = json.loads((DIRECTORY / "celery" / f"{name}.json").read_text("utf-8"))
    assert fits("result", "payload", meta)
    assert not fits("result", "payload", meta | {"status": "PENDING"})


def test_what_is_published_is_as_documented(redis_client: redis.Redis, redis_url: str) -> None:
    ledger = Ledger.connect(redis_url, LedgerConfig())
    worker = ScriptedWorker(ledger)
    with Client(redis_url) as client, redis_client.pubsub(ignore_subscribe_messages=True) as heard:
        job = client.vqa(question="Why?")
        channels = {
            names.events_key(job.id): "event",
            names.result_key(job.id): "result",
            names.CANCEL_CHANNEL: "cancel",
        }
        heard.subscribe(*channels)
        worker.take(job.id)
        worker.say("red")
        job.cancel()
        worker.finish()
        messages: list[tuple[str, Any]] = []

        def hear() -> bool:
            if (message := heard.get_message(timeout=1)) is not None:
                messages.append((channels[message["channel"]], message["data"]))
            return {kind for kind, _ in messages} == set(channels.values())

        eventually(hear, what="events, result and cancel were heard")
    ledger.close()
    for kind, data in messages:
        assert fits(kind, "payload", data if kind == "cancel" else json.loads(data)), data
