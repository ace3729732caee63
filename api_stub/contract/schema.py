"""What crosses a boundary, for any language: JSON Schema (draft 2020-12), and the broker's side as AsyncAPI 3.

The schemas are made from the wire types themselves. Limits that no schema can say (a question beside `messages`,
sizes in bytes, the spelling of media URIs) are checked by `parse_job`. The AsyncAPI document (the Celery messages, a
job's events, control, and the stored result) is told from the worker's side: it receives jobs and control, and sends
events and results.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

from api_stub.contract import names
from api_stub.contract.error import ErrorCode, ErrorInfo
from api_stub.contract.event import VERSION, Event
from api_stub.contract.job import CaptionJob, FinetuneJob, Job, VideoQaJob, VqaJob
from api_stub.contract.job_fields import TaskName
from api_stub.contract.result import Result
from api_stub.contract.view import JobView

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

_TYPES: Final[Mapping[str, TypeAdapter[object]]] = {
    "job": TypeAdapter(Annotated[Job, Field(discriminator="task")]),
    "event": TypeAdapter(Annotated[Event, Field(discriminator="type")]),
    "result": TypeAdapter(Result),
    "view": TypeAdapter(JobView),
    "error": TypeAdapter(ErrorInfo),
}
NAMES: Final = tuple(_TYPES)

SPECIFICATION: Final = "3.0.0"
SCHEMA_FORMAT: Final = "application/schema+json;version=draft-2020-12"
_JOBS: Final[Mapping[str, type[Job]]] = {
    "caption": CaptionJob,
    "vqa": VqaJob,
    "video_qa": VideoQaJob,
    "finetune": FinetuneJob,
}
_JOB_ID: Final = "Id of the job: the id of its Celery task."
_MODEL: Final = f"Model name that routes the job: {names.MODEL_NAME_PATTERN}; fine-tuning: {names.TRAINING_MODEL_NAME}"
_DESCRIPTION: Final = f"""\
Jobs go in as Celery messages (protocol 2, JSON) through kombu's Redis transport: LPUSH of one JSON object `{{body,
content-encoding, content-type, headers, properties}}`, `body` in base64, into the list `<queue>` for priority 0 and
`<queue>\\u0006\\u0016<step>` for the steps {", ".join(map(str, names.PRIORITY_STEPS[1:]))}; a priority goes to the
highest step not above it. Events are published on a channel and kept in a stream of the same name (field `event`, entry
id `<seq>-0`); `job.queued` enters the stream with the event after it. A result is a key of Celery's result backend, and
published on a channel of the same name."""


def schemas() -> dict[str, dict[str, JsonValue]]:
    """Return one schema per name in NAMES.

    `job` is the form with `task` inside; as a Celery message's kwargs a job leaves `task` out.
    """
    return {name: schema_of(name, adapter) for name, adapter in _TYPES.items()}


def schema_of(name: str, adapter: TypeAdapter[Any]) -> dict[str, JsonValue]:
    """Return the schema of one type, under a name of its own."""
    body: dict[str, JsonValue] = adapter.json_schema(by_alias=True)
    for definition in (body, *_definitions(body)):
        _require_tags(definition)
    return {"$schema": DIALECT, "$id": f"urn:visionq:v1:{name}", **body}


def _definitions(schema: dict[str, JsonValue]) -> list[dict[str, JsonValue]]:
    definitions = schema.get("$defs", {})
    assert isinstance(definitions, dict)
    return [definition for definition in definitions.values() if isinstance(definition, dict)]


def _require_tags(definition: dict[str, JsonValue]) -> None:
    """Require every constant field: it tells the members of a union apart, so a reader relies on it."""
    properties = definition.get("properties")
    if not isinstance(properties, dict):
        return
    tags = [name for name, field in properties.items() if isinstance(field, dict) and "const" in field]
    required = definition.get("required", [])
    assert isinstance(required, list)
    missing = [name for name in tags if name not in required]
    if missing:
        definition["required"] = [*required, *missing]


class CeleryFailure(BaseModel):
    """How a job without an answer is stored: Celery rebuilds `JobFailed(code, message, retryable)`."""

    exc_type: Literal["JobFailed"]
    exc_module: Literal["api_stub.errors"]
    exc_message: tuple[ErrorCode, str, bool]


class CeleryMeta(BaseModel):
    """What Celery's Redis backend keeps of a task."""

    model_config = ConfigDict(extra="forbid")

    task_id: str
    traceback: None
    children: list[JsonValue]
    date_done: str


class AnsweredMeta(CeleryMeta):
    """The job was completed."""

    status: Literal["SUCCESS"]
    result: Result


class UnansweredMeta(CeleryMeta):
    """The job failed or expired (FAILURE), or was cancelled (REVOKED)."""

    status: Literal["FAILURE", "REVOKED"]
    result: CeleryFailure


class Embedded(BaseModel):
    """The last member of a Celery message's body; visionq has no use for it."""

    callbacks: JsonValue = None
    errbacks: JsonValue = None
    chain: JsonValue = None
    chord: JsonValue = None


class NoJob(BaseModel):
    """A doorbell's kwargs."""

    model_config = ConfigDict(extra="forbid")


class CeleryHeaders(BaseModel):
    """What visionq reads of a Celery message's headers; `task` and the mark of a doorbell are added per message."""

    id: str = Field(description="Id of the task, which is the id of the job.")


def asyncapi() -> dict[str, JsonValue]:
    """Return the document."""
    messages = _messages()
    return {
        "asyncapi": SPECIFICATION,
        "info": {"title": "visionq broker", "version": str(VERSION), "description": _DESCRIPTION},
        "defaultContentType": "application/json",
        "servers": {"redis": {"host": "localhost:6379", "protocol": "redis", "description": "VISIONQ_REDIS_URL"}},
        "channels": {
            "jobs": _channel(
                names.queue("{model}"), [*_JOBS, "doorbell"], "A Celery queue; one per model name.", model=_MODEL
            ),
            "events": _channel(
                names.events_key("{job_id}"), ["event"], "Pub/sub channel and stream of one job.", job_id=_JOB_ID
            ),
            "control": _channel(names.CANCEL_CHANNEL, ["cancel"], "Pub/sub channel that all workers hear."),
            "results": _channel(
                names.result_key("{job_id}"), ["result"], "Key and pub/sub channel of one job.", job_id=_JOB_ID
            ),
        },
        "operations": {
            "receive_job": _operation("receive", "jobs", [*_JOBS, "doorbell"]),
            "send_event": _operation("send", "events", ["event"]),
            "receive_control": _operation("receive", "control", ["cancel"]),
            "send_result": _operation("send", "results", ["result"]),
        },
        "components": {"messages": messages, "schemas": _schemas()},
    }


def _messages() -> dict[str, JsonValue]:
    jobs: dict[str, JsonValue] = {
        name: _message(
            TaskName(f"visionq.{name}"),
            f"{name}_body",
            "A job from a plain Celery producer: the body is [args, kwargs, embed], the job is its kwargs.",
            headers=f"{name}_headers",
        )
        for name in _JOBS
    }
    doorbell = "A job that is in the ledger already; the message only tells a worker to look."
    return jobs | {
        "doorbell": _message("doorbell", "doorbell_body", doorbell, headers="doorbell_headers"),
        "event": _message("event", "event", "What happened to a job; `seq` grows by one from 1."),
        "cancel": _message("cancel", "cancel", "Id of a running job that was asked to stop."),
        "result": _message("result", "celery_meta", "What AsyncResult(id) reads, kept for VISIONQ_RESULT_TTL_S."),
    }


def _schemas() -> dict[str, JsonValue]:
    exported = schemas()
    made: dict[str, dict[str, JsonValue]] = {
        "event": exported["event"],
        "cancel": {"$schema": DIALECT, "type": "string", "minLength": 1},
        "celery_meta": schema_of("celery_meta", TypeAdapter(AnsweredMeta | UnansweredMeta)),
        "doorbell_body": _body("doorbell_body", NoJob),
        "doorbell_headers": _headers("doorbell_headers", [str(task) for task in TaskName], is_doorbell=True),
    }
    for name, job in _JOBS.items():
        made[f"{name}_body"] = _body(f"{name}_body", job)
        made[f"{name}_headers"] = _headers(f"{name}_headers", [f"visionq.{name}"], is_doorbell=False)
    return {name: {"schemaFormat": SCHEMA_FORMAT, "schema": schema} for name, schema in made.items()}


def _body(name: str, kwargs: type[BaseModel]) -> dict[str, JsonValue]:
    """The body of a Celery message whose kwargs are those of a type, without the `task` that the headers name."""
    schema: dict[str, Any] = schema_of(name, TypeAdapter(tuple[tuple[()], kwargs, Embedded]))  # type: ignore[valid-type]
    fields = schema["$defs"][kwargs.__name__]
    fields.get("properties", {}).pop("task", None)
    fields["required"] = [field for field in fields.get("required", []) if field != "task"]
    return schema


def _headers(name: str, tasks: list[str], *, is_doorbell: bool) -> dict[str, JsonValue]:
    schema: dict[str, Any] = schema_of(name, TypeAdapter(CeleryHeaders))
    schema["properties"]["task"] = {"enum": tasks}
    schema["properties"][names.DOORBELL_HEADER] = {"const": 1} if is_doorbell else False
    schema["required"] += ["task", *([names.DOORBELL_HEADER] if is_doorbell else [])]
    return schema


def _message(name: str, payload: str, summary: str, headers: str | None = None) -> dict[str, JsonValue]:
    message: dict[str, JsonValue] = {"name": str(name), "summary": summary, "payload": _ref("schemas", payload)}
    return message if headers is None else message | {"headers": _ref("schemas", headers)}


def _channel(address: str, messages: list[str], description: str, **parameters: str) -> dict[str, JsonValue]:
    channel: dict[str, JsonValue] = {
        "address": address,
        "description": description,
        "messages": {name: _ref("messages", name) for name in messages},
    }
    described: dict[str, JsonValue] = {name: {"description": text} for name, text in parameters.items()}
    return channel | {"parameters": described} if described else channel


def _operation(action: str, channel: str, messages: list[str]) -> dict[str, JsonValue]:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "messages": [{"$ref": f"#/channels/{channel}/messages/{name}"} for name in messages],
    }


def _ref(kind: str, name: str) -> dict[str, JsonValue]:
    return {"$ref": f"#/components/{kind}/{name}"}
