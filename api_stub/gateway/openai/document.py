"""OpenAI's addresses in the OpenAPI document: the chat request, streams, and errors in their own shape."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI

from api_stub.gateway.openai.chat import ChatRequest
from api_stub.gateway.openai.errors import OpenAIErrorBody, error_body
from api_stub.gateway.openai.files import CONTENT_TYPE
from api_stub.gateway.openai.routes import TAG
from api_stub.gateway.openai.shapes import ChatChunk
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
_STREAM_EXAMPLE: Final = """\
data: {"id":"chatcmpl-5f0c…","object":"chat.completion.chunk","created":1760000000,"model":"default","choices":[{"index":0,"delta":{"content":"red"},"logprobs":null,"finish_reason":null}],"usage":null}

data: [DONE]

"""  # noqa: E501 - an event is one line


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
    chat = paths[_CHAT]["post"]
    body = {"schema": {"$ref": _SCHEMAS + ChatRequest.__name__}, "example": CHAT_EXAMPLE}
    chat["requestBody"] = {"required": True, "content": {"application/json": body}}
    chunks = {"schema": {"type": "string"}, "itemSchema": {"$ref": _SCHEMAS + ChatChunk.__name__}}
    chat["responses"]["200"]["content"][EVENT_STREAM] = chunks | {"example": _STREAM_EXAMPLE}
    content = paths["/v1/files/{file_id}/content"]["get"]["responses"]["200"]
    content["content"] = {CONTENT_TYPE: {"schema": {"type": "string"}}}


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
