"""OpenAI's addresses."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Final, Literal

from anyio import to_thread
from fastapi import APIRouter, Form, Header, Path, Query, Request, Response, UploadFile
from starlette.responses import StreamingResponse

from api_stub.contract.error import ErrorCode
from api_stub.contract.names import queue_model
from api_stub.gateway.abandoned import question_of
from api_stub.gateway.access import CallerHere, GatewayHere
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.intake import accept, keyed_id, read_json
from api_stub.gateway.keys import Caller
from api_stub.gateway.openai import files
from api_stub.gateway.openai.batches.lines import is_text
from api_stub.gateway.openai.batches.store import BatchRequest, BatchStore
from api_stub.gateway.openai.chat import ChatRequest, parse_chat
from api_stub.gateway.openai.chat_draft import ChatDraft
from api_stub.gateway.openai.completions import Asked, ChatStream, whole_answer
from api_stub.gateway.openai.models import check_model, known_models
from api_stub.gateway.openai.shapes import (
    BatchList,
    BatchObject,
    ChatCompletion,
    FileDeleted,
    FileList,
    FileObject,
    ModelList,
    ModelObject,
)
from api_stub.gateway.problems import Problem, invalid, unavailable_now

TAG: Final = "openai"
router = APIRouter(prefix="/v1", tags=[TAG])

_Id = Annotated[str, Path(min_length=1, max_length=100)]
_After = Annotated[str | None, Query(max_length=100, description="The last id of the page before.")]
#: When a client of a paused queue should ask again.
PAUSED_RETRY_S: Final = 5.0
_CANCELLABLE: Final = frozenset({"validating", "in_progress", "finalizing", "cancelling", "cancelled"})


@router.post("/chat/completions", response_model=ChatCompletion)
async def complete_chat(
    request: Request,
    gateway: GatewayHere,
    caller: CallerHere,
    idempotency_key: Annotated[
        str | None, Header(alias="Idempotency-Key", description="The same key and body again is the same job.")
    ] = None,
) -> Response:
    """Answer a conversation, whole or with `stream` in pieces.

    A stream's job is cancelled when its client leaves. A whole answer's is kept for some seconds and handed to the same
    body again; with an Idempotency-Key the job goes on, and the key brings its answer.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", "send application/json")
    chat = parse_chat(await read_json(request))
    await check_model(gateway, caller, chat.model)
    keyed = None if idempotency_key is None else keyed_id(idempotency_key, caller.tenant)
    question = None if chat.stream or keyed else await to_thread.run_sync(question_of, await request.body())
    kept = None if question is None else await gateway.abandoned.take(caller.tenant, question)
    if kept is None and (keyed is None or await gateway.ledger.view(keyed) is None):
        await _check_running(gateway, queue_model(chat.model))
    job_id = kept or await _submitted(request, gateway, caller, chat, idempotency_key)
    asked = Asked(job_id, caller.tenant, question, keyed is not None)
    if chat.stream:
        return ChatStream(gateway, asked, chat.model, chat.wants_usage)
    return await whole_answer(request, gateway, asked)


async def _check_running(gateway: Gateway, model: str) -> None:
    """Raise Problem (503) when nobody would answer: an operator has paused the queue."""
    if await gateway.queues.is_paused(model):
        detail = f"model: the queue of {model!r} is paused; ask again later"
        raise unavailable_now(ErrorCode.QUEUE_PAUSED, detail, PAUSED_RETRY_S)


async def _submitted(
    request: Request, gateway: Gateway, caller: Caller, chat: ChatRequest, idempotency_key: str | None
) -> str:
    draft = ChatDraft.of(chat, gateway.remote.rules.hosts)
    return await accept(gateway, caller, draft, idempotency_key, receive=request.receive)


@router.get("/models")
async def list_models(gateway: GatewayHere, caller: CallerHere) -> ModelList:
    """List the models that may be asked."""
    return ModelList(data=await known_models(gateway, caller))


@router.get("/models/{model}")
async def show_model(gateway: GatewayHere, caller: CallerHere, model: _Id) -> ModelObject:
    """Tell whether a model may be asked."""
    await check_model(gateway, caller, model)
    return ModelObject(id=model)


@router.post("/files", form_limits={"max_files": 1, "max_fields": 8})
async def create_file(
    request: Request,
    gateway: GatewayHere,
    caller: CallerHere,
    file: UploadFile,
    purpose: Annotated[Literal["batch"], Form()],
) -> FileObject:
    """Store the input of a batch: one JSON object per line."""
    try:
        if not file.size:
            raise invalid("file", "it is empty")
        name = (file.filename or "input.jsonl")[:255]
        if not is_text(name):
            raise invalid("file", "its name cannot be decoded")
        return (await files.store(gateway, caller, file.file, file.size, name)).public
    finally:
        await request.close()


@router.get("/files")
async def list_files(
    gateway: GatewayHere,
    caller: CallerHere,
    after: _After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
) -> FileList:
    """List the caller's files, newest first."""
    found, has_more = await files.list_files(gateway, caller, after, limit)
    first, last = _ends([record.id for record in found])
    return FileList(data=[record.public for record in found], first_id=first, last_id=last, has_more=has_more)


@router.get("/files/{file_id}")
async def show_file(gateway: GatewayHere, caller: CallerHere, file_id: _Id) -> FileObject:
    """Tell about a file."""
    return (await files.find(gateway, caller, file_id)).public


@router.get("/files/{file_id}/content", response_class=Response)
async def read_file(gateway: GatewayHere, caller: CallerHere, file_id: _Id) -> Response:
    """Give a file's bytes."""
    record = await files.find(gateway, caller, file_id)
    headers = {"Content-Length": str(record.num_bytes)}
    return StreamingResponse(await files.opened(gateway, record), headers=headers, media_type=files.CONTENT_TYPE)


@router.delete("/files/{file_id}")
async def delete_file(gateway: GatewayHere, caller: CallerHere, file_id: _Id) -> FileDeleted:
    """Delete a file. A batch that still needs it fails."""
    await files.delete(gateway, await files.find(gateway, caller, file_id))
    return FileDeleted(id=file_id)


@router.post("/batches")
async def create_batch(gateway: GatewayHere, caller: CallerHere, batch: BatchRequest) -> BatchObject:
    """Answer every line of a file; the answers come in another file."""
    record = await files.find(gateway, caller, batch.input_file_id)
    if record.purpose != "batch":
        raise invalid("input_file_id", "not a file with the purpose 'batch'")
    return (await _store(gateway).create(caller, batch)).public


@router.get("/batches")
async def list_batches(
    gateway: GatewayHere, caller: CallerHere, after: _After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> BatchList:
    """List the caller's batches, newest first."""
    found, has_more = await _store(gateway).list_batches(caller, after, limit)
    first, last = _ends([batch.order.id for batch in found])
    return BatchList(data=[batch.public for batch in found], first_id=first, last_id=last, has_more=has_more)


@router.get("/batches/{batch_id}")
async def show_batch(gateway: GatewayHere, caller: CallerHere, batch_id: _Id) -> BatchObject:
    """Tell how far a batch is."""
    return (await _store(gateway).find(caller, batch_id)).public


@router.post("/batches/{batch_id}/cancel")
async def cancel_batch(gateway: GatewayHere, caller: CallerHere, batch_id: _Id) -> BatchObject:
    """Ask for a batch's end; may be repeated. What was answered by then is in its files."""
    store = _store(gateway)
    await store.find(caller, batch_id)
    status = await store.cancel(batch_id)
    if status not in _CANCELLABLE:
        detail = f"the batch is {status}"
        raise Problem(HTTPStatus.CONFLICT, "cannot_cancel", detail, headers={"x-should-retry": "false"})
    return (await store.find(caller, batch_id)).public


def _store(gateway: Gateway) -> BatchStore:
    return BatchStore(gateway.commands, gateway.settings.lease_s)


def _ends(ids: list[str]) -> tuple[str | None, str | None]:
    return (ids[0], ids[-1]) if ids else (None, None)
