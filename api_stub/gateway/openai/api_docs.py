"""OpenAI's addresses in the OpenAPI document: the chat request, streams, and errors in their own shape."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI
from pydantic import BaseModel

from api_stub.gateway.openai.chat import ChatRequest
from api_stub.gateway.openai.files import CONTENT_TYPE
from api_stub.gateway.openai.routes import TAG
from api_stub.gateway.openai.shapes import (
    BatchCounts,
    BatchList,
    BatchObject,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatUsage,
    ChunkChoice,
    FileDeleted,
    FileList,
    FileObject,
    ModelList,
    ModelObject,
)
from api_stub.gateway.openai_errors import OpenAIErrorBody, error_body
from api_stub.gateway.sse import MEDIA_TYPE as EVENT_STREAM

_SCHEMAS: Final = "#/components/schemas/"
_CHAT: Final = "/v1/chat/completions"
#: Sent to a gateway by the tests.
CHAT_EXAMPLE: Final[dict[str, Any]] = {
    "model": "default",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "s3://media/scene.png"}},
                {"type": "text", "text": "What colour is the circle?"},
            ],
        }
    ],
    "max_tokens": 32,
}
_CHUNK_EXAMPLE: Final = ChatChunk(
    id="chatcmpl-5f0c",
    created=1760000000,
    model="default",
    choices=[ChunkChoice(delta=ChatDelta(content="red"))],
)
_LINE_EXAMPLE: Final = (
    '{"custom_id":"a","method":"POST","url":"/v1/chat/completions",'
    '"body":{"model":"default","messages":[{"role":"user","content":"Hello?"}]}}\n'
)
_FILE: Final = FileObject(
    id="file-5f0c", bytes=2048, created_at=1760000000, expires_at=1762592000, filename="input.jsonl", purpose="batch"
)
_BATCH: Final = BatchObject(
    id="batch_5f0c",
    endpoint=_CHAT,
    input_file_id=_FILE.id,
    completion_window="24h",
    status="in_progress",
    created_at=1760000000,
    in_progress_at=1760000001,
    expires_at=1760086400,
    request_counts=BatchCounts(total=100, completed=40, failed=1),
)
_COMPLETION: Final = ChatCompletion(
    id="chatcmpl-5f0c",
    created=1760000000,
    model="default",
    choices=[ChatChoice(message=ChatAnswer(content="It is red."), finish_reason="stop")],
    usage=ChatUsage(prompt_tokens=81, completion_tokens=4, total_tokens=85),
)
_MODEL: Final = ModelObject(id="default")
_ANSWERS: Final[dict[str, BaseModel]] = {
    "ChatCompletion": _COMPLETION,
    "ModelObject": _MODEL,
    "ModelList": ModelList(data=[_MODEL]),
    "FileObject": _FILE,
    "FileList": FileList(data=[_FILE], first_id=_FILE.id, last_id=_FILE.id, has_more=False),
    "FileDeleted": FileDeleted(id=_FILE.id),
    "BatchObject": _BATCH,
    "BatchList": BatchList(data=[_BATCH], first_id=_BATCH.id, last_id=_BATCH.id, has_more=False),
}
_BATCH_REQUEST: Final = {"input_file_id": _FILE.id, "endpoint": _CHAT, "completion_window": "24h"}


def describe(app: FastAPI) -> None:
    """Add what FastAPI cannot find out by itself. After the gateway's own `describe`."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        is_new = app.openapi_schema is None
        document = plain()
        if is_new:
            _complete(document)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any]) -> None:
    schemas, paths = document["components"]["schemas"], document["paths"]
    for model in (ChatRequest, ChatChunk, OpenAIErrorBody):
        schema = model.model_json_schema(ref_template=_SCHEMAS + "{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    for path, operations in paths.items():
        for method, operation in operations.items():
            if TAG in operation.get("tags", ()):
                _add_errors(path, method, operation)
                _add_example(operation)
    chat = paths[_CHAT]["post"]
    body = {"schema": {"$ref": _SCHEMAS + ChatRequest.__name__}, "example": CHAT_EXAMPLE}
    chat["requestBody"] = {"required": True, "content": {"application/json": body}}
    chunk = {"data": _CHUNK_EXAMPLE.model_dump_json()}
    chat["responses"]["200"]["content"][EVENT_STREAM] = {"schema": _event(), "example": chunk}
    content = paths["/v1/files/{file_id}/content"]["get"]["responses"]["200"]
    content["content"] = {CONTENT_TYPE: {"schema": {"type": "string"}, "example": _LINE_EXAMPLE}}
    paths["/v1/batches"]["post"]["requestBody"]["content"]["application/json"]["example"] = _BATCH_REQUEST


def _event() -> dict[str, Any]:
    """Describe each event of a stream: chunks, an error in the place of the rest, and the word that ends a good one."""
    kinds = [{"$ref": _SCHEMAS + model.__name__} for model in (ChatChunk, OpenAIErrorBody)]
    chunk = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
    data = {"anyOf": [chunk, {"type": "string", "const": "[DONE]"}]}
    return {"type": "object", "required": ["data"], "properties": {"data": data}}


def _add_example(operation: dict[str, Any]) -> None:
    answer = operation["responses"]["200"].get("content", {}).get("application/json")
    name = answer["schema"].get("$ref", "").removeprefix(_SCHEMAS) if answer else ""
    if name in _ANSWERS:
        answer["example"] = _ANSWERS[name].model_dump(mode="json")


def _add_errors(path: str, method: str, operation: dict[str, Any]) -> None:
    operation["responses"].pop("422", None)
    for status in _statuses(path, method):
        schema = {"$ref": _SCHEMAS + OpenAIErrorBody.__name__}
        example = error_body(HTTPStatus.BAD_REQUEST, "invalid_request", "messages: required", "messages").model_dump()
        answer = {"description": status.phrase, "content": {"application/json": {"schema": schema, "example": example}}}
        operation["responses"][str(int(status))] = answer


def _statuses(path: str, method: str) -> list[HTTPStatus]:
    found = [
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.SERVICE_UNAVAILABLE,
    ]
    if "{" in path or path in (_CHAT, "/v1/batches"):
        found.append(HTTPStatus.NOT_FOUND)
    if path in (_CHAT, "/v1/files") and method == "post":
        found += [HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNSUPPORTED_MEDIA_TYPE]
    if path == _CHAT or path.startswith("/v1/files"):
        found.append(HTTPStatus.BAD_GATEWAY)
    if path == _CHAT:
        found += [HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.GATEWAY_TIMEOUT]
    if path.endswith("/cancel"):
        found.append(HTTPStatus.CONFLICT)
    return found
