"""The OpenAPI 3.1 document: what FastAPI finds out by itself, and the bodies, errors and examples that it cannot.

Jobs come from the contract's own JSON Schema. What no schema can say is checked by `parse_job` and refused with 422.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api_stub.contract.schema import schemas
from api_stub.gateway.problems import MEDIA_TYPE as PROBLEM_TYPE
from api_stub.gateway.problems import ProblemBody
from api_stub.gateway.sse import MEDIA_TYPE as EVENT_STREAM

DESCRIPTION: Final = """\
Captions and answers about images and clips, from a queue of vision-language workers. Hand in a job, follow its events,
or wait for its result. Errors are `application/problem+json` (RFC 9457) with a stable `code`."""

_OURS: Final = frozenset({"jobs", "events", "uploads", "operations"})
_SCHEMAS: Final = "#/components/schemas/"
_MEDIA: Final = "s3://media/scene.png"

#: One job of each kind. They are sent to a gateway by the tests.
JOB_EXAMPLES: Final[dict[str, dict[str, Any]]] = {
    "caption": {"task": "visionq.caption", "media": [_MEDIA]},
    "vqa": {
        "task": "visionq.vqa",
        "media": [_MEDIA],
        "question": "What colour is the circle?",
        "sampling": {"max_new_tokens": 32},
    },
    "video_qa": {
        "task": "visionq.video_qa",
        "media": ["s3://media/clip.mp4"],
        "question": "Which way does it move?",
        "num_frames": 8,
        "deadline_s": 120,
    },
    "conversation": {
        "task": "visionq.vqa",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "uri": _MEDIA}, {"type": "text", "text": "What is in the picture?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "A red circle."}]},
            {"role": "user", "content": [{"type": "text", "text": "And below it?"}]},
        ],
    },
}
_EVENTS_EXAMPLE: Final = """\
retry: 1000

id: 1
event: job.queued
data: {"v":1,"job_id":"5f0c…","seq":1,"attempt":0,"ts":1760000000.0,"type":"job.queued","model":"default","priority":6}

id: 3
event: output.delta
data: {"v":1,"job_id":"5f0c…","seq":3,"attempt":1,"ts":1760000000.4,"type":"output.delta","text":"red","offset":0,"num_tokens":1}

"""  # noqa: E501 - an event is one line
_PROBLEM_EXAMPLE: Final = {
    "type": "urn:visionq:problem:invalid_request",
    "title": "Unprocessable Entity",
    "status": 422,
    "detail": "question: required",
    "code": "invalid_request",
    "errors": [{"field": "question", "message": "required"}],
}


def describe(app: FastAPI) -> None:
    """Let the app's document say all that a client needs."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title,
        version=app.version,
        openapi_version="3.1.0",
        description=DESCRIPTION,
        routes=app.routes,
        separate_input_output_schemas=False,  # absent fields are left out of answers
    )
    components = document["components"]["schemas"]
    components.update(_components("Job", schemas()["job"]))
    components.update(_components("Event", schemas()["event"]))
    components["Problem"] = ProblemBody.model_json_schema(ref_template=_SCHEMAS + "{model}")
    components |= components["Problem"].pop("$defs")
    document["components"]["schemas"] = components
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if _OURS.intersection(operation.get("tags", ())):
                _add_problems(path, operation)
    _describe_jobs(document["paths"])
    if "HTTPValidationError" not in json.dumps(document["paths"]):
        for unused in ("HTTPValidationError", "ValidationError"):
            components.pop(unused, None)
    return document


def _components(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Make the parts of a JSON Schema components of the document."""
    moved: dict[str, Any] = json.loads(json.dumps(schema).replace("#/$defs/", _SCHEMAS))
    parts: dict[str, Any] = moved.pop("$defs", {})
    for key in ("$schema", "$id"):
        moved.pop(key, None)
    return parts | {name: moved}


def _add_problems(path: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    for status in _problems(path, operation):
        responses[str(int(status))] = {
            "description": status.phrase,
            "content": {
                PROBLEM_TYPE: {"schema": {"$ref": _SCHEMAS + "Problem"}, "example": _PROBLEM_EXAMPLE},
            },
        }


def _problems(path: str, operation: dict[str, Any]) -> Iterable[HTTPStatus]:
    if "422" in operation["responses"] or "requestBody" in operation or path == "/v1/jobs":
        yield HTTPStatus.UNPROCESSABLE_ENTITY
    if "security" not in operation:
        return
    yield HTTPStatus.UNAUTHORIZED
    yield HTTPStatus.FORBIDDEN
    yield HTTPStatus.TOO_MANY_REQUESTS
    yield HTTPStatus.SERVICE_UNAVAILABLE
    if "{job_id}" in path:
        yield HTTPStatus.NOT_FOUND
    if path.endswith("/retry"):
        yield HTTPStatus.CONFLICT
    if path in ("/v1/jobs", "/v1/uploads"):
        yield from (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.BAD_GATEWAY)
        yield HTTPStatus.UNSUPPORTED_MEDIA_TYPE


def _describe_jobs(paths: dict[str, Any]) -> None:
    job = {"$ref": _SCHEMAS + "Job"}
    submit = paths["/v1/jobs"]["post"]
    form = {
        "type": "object",
        "properties": {
            "job": {"type": "string", "contentMediaType": "application/json", "contentSchema": job},
            "media": {"type": "array", "items": {"type": "string", "format": "binary"}},
        },
        "required": ["job"],
    }
    examples = {name: {"value": value} for name, value in JOB_EXAMPLES.items()}
    submit["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": job, "examples": examples}, "multipart/form-data": {"schema": form}},
    }
    done = {"description": "Done within the time of `Prefer: wait=N`"}
    submit["responses"]["200"] = done | {"content": submit["responses"]["202"]["content"]}
    cancel = paths["/v1/jobs/{job_id}/cancel"]["post"]["responses"]
    cancel["202"] = {"description": "A worker still has to stop", "content": cancel["200"]["content"]}
    follow = paths["/v1/jobs/{job_id}/events"]["get"]["responses"]
    events = {"schema": {"type": "string"}, "itemSchema": {"$ref": _SCHEMAS + "Event"}, "example": _EVENTS_EXAMPLE}
    follow["200"] = {"description": "Server-sent events up to the final one", "content": {EVENT_STREAM: events}}
    follow["204"] = {"description": "Nothing comes after this seq, now or later"}
