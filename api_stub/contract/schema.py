"""JSON Schema (draft 2020-12) of everything that crosses a boundary, for producers and readers in any language.

The schemas are made from the wire types themselves. Limits that no schema can say (a question beside `messages`,
sizes in bytes, the spelling of media URIs) are checked by `parse_job`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import Field, JsonValue, TypeAdapter

from api_stub.contract.error import ErrorInfo
from api_stub.contract.event import Event
from api_stub.contract.job import Job
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
