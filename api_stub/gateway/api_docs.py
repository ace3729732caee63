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
from api_stub.gateway.api_examples import (
    ANSWERS,
    CANCEL_EXAMPLE,
    EVENT_EXAMPLE,
    JOB_EXAMPLES,
    PROMOTE_EXAMPLE,
    UPLOAD_EXAMPLE,
    problem_example,
)
from api_stub.gateway.problems import MEDIA_TYPE as PROBLEM_TYPE
from api_stub.gateway.problems import ProblemBody
from api_stub.gateway.sse import MEDIA_TYPE as EVENT_STREAM

DESCRIPTION: Final = """\
Captions and answers about images and clips, from a queue of vision-language workers. Hand in a job, follow its events,
or wait for its result. Errors are `application/problem+json` (RFC 9457) with a stable `code`."""

_OURS: Final = frozenset({"jobs", "events", "uploads", "operations"})
_SCHEMAS: Final = "#/components/schemas/"
#: The body of these is read by the route itself, or may be large.
_WITH_BODY: Final = frozenset({"/v1/jobs", "/v1/jobs/cancel", "/v1/uploads", "/v1/uploads/inline"})
_RETRY_AFTER: Final = {"Retry-After": {"description": "Seconds", "schema": {"type": "integer", "minimum": 1}}}
_LOCATION: Final = {"Location": {"description": "Address of the job", "schema": {"type": "string"}}}


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
        for method, operation in operations.items():
            if _OURS.intersection(operation.get("tags", ())):
                _add_problems(path, method, operation)
    _describe_jobs(document["paths"])
    _describe_others(document["paths"])
    for operations in document["paths"].values():
        for operation in operations.values():
            _show_answers(operation["responses"])
            _show_jobs(operation.get("requestBody", {}))
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


def _add_problems(path: str, method: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    for status in _problems(path, method, operation):
        responses[str(int(status))] = {
            "description": status.phrase,
            "content": {
                PROBLEM_TYPE: {"schema": {"$ref": _SCHEMAS + "Problem"}, "example": problem_example(status)},
            },
        }
        if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            responses[str(int(status))]["headers"] = _RETRY_AFTER


def _problems(path: str, method: str, operation: dict[str, Any]) -> Iterable[HTTPStatus]:
    if "422" in operation["responses"] or "requestBody" in operation or path == "/v1/jobs":
        yield HTTPStatus.UNPROCESSABLE_ENTITY
    if "security" not in operation:
        return
    yield HTTPStatus.UNAUTHORIZED
    yield HTTPStatus.FORBIDDEN
    yield HTTPStatus.TOO_MANY_REQUESTS
    yield HTTPStatus.SERVICE_UNAVAILABLE
    if "{job_id}" in path or (method, path) == ("post", "/v1/jobs"):  # no such job, or no such model
        yield HTTPStatus.NOT_FOUND
    if path.endswith(("/retry", "/promote", "/rollback")) or (method == "delete" and path == "/v1/jobs/{job_id}"):
        yield HTTPStatus.CONFLICT
    if method == "post" and (path in _WITH_BODY or path.endswith("/promote")):
        yield from (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        yield from (HTTPStatus.UNSUPPORTED_MEDIA_TYPE, HTTPStatus.BAD_GATEWAY)


def _describe_jobs(paths: dict[str, Any]) -> None:
    job = {"$ref": _SCHEMAS + "Job"}
    submit = paths["/v1/jobs"]["post"]
    form: dict[str, Any] = {
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
    for path in ("/v1/jobs", "/v1/jobs/{job_id}/retry"):
        paths[path]["post"]["responses"]["202"]["headers"] = _LOCATION
    follow = paths["/v1/jobs/{job_id}/events"]["get"]["responses"]
    follow["200"] = {
        "description": "Server-sent events up to the final one; the schema is that of each event",
        "content": {EVENT_STREAM: {"schema": _event(), "example": EVENT_EXAMPLE}},
    }
    follow["204"] = {"description": "Nothing comes after this seq, now or later"}


def _event() -> dict[str, Any]:
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"$ref": _SCHEMAS + "Event"}}
    seq = {"type": "string", "description": "The event's seq. A `stream.gap` has none.", "pattern": "^[0-9]+$"}
    properties = {"id": seq, "event": {"type": "string"}, "data": data}
    return {"type": "object", "properties": properties, "required": ["event", "data"]}


def _describe_others(paths: dict[str, Any]) -> None:
    paths["/v1/uploads"]["post"]["requestBody"]["content"]["application/json"]["example"] = UPLOAD_EXAMPLE
    paths["/v1/jobs/cancel"]["post"]["requestBody"]["content"]["application/json"]["example"] = CANCEL_EXAMPLE
    promote = paths["/v1/models/{model}/promote"]["post"]
    promote["requestBody"]["content"]["application/json"]["example"] = PROMOTE_EXAMPLE
    absent = {"schema": {"$ref": _SCHEMAS + "Health"}, "example": {"status": "redis does not answer"}}
    paths["/readyz"]["get"]["responses"]["503"] = {
        "description": "Redis does not answer",
        "content": {"application/json": absent},
    }
    exposition = {"schema": {"type": "string"}, "example": 'visionq_queue_depth{model="default"} 5.0\n'}
    paths["/metrics"]["get"]["responses"]["200"]["content"] = {"text/plain": exposition}


def _show_jobs(body: dict[str, Any]) -> None:
    for media in body.get("content", {}).values():
        if media.get("schema", {}).get("$ref") == _SCHEMAS + "Job":
            media.setdefault("examples", {name: {"value": value} for name, value in JOB_EXAMPLES.items()})


def _show_answers(responses: dict[str, Any]) -> None:
    for status, response in responses.items():
        for media in response.get("content", {}).values():
            name = str(media.get("schema", {}).get("$ref", "")).removeprefix(_SCHEMAS)
            example = ANSWERS.get(f"{name} {status}", ANSWERS.get(name))
            if example is not None:
                media.setdefault("example", example)
