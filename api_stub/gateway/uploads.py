"""Uploads with a presigned URL: what was announced is kept in Redis and held against the object when a job uses it."""

from __future__ import annotations

import mimetypes
from collections.abc import Sequence
from http import HTTPStatus
from typing import Final

from api_stub.contract import names
from api_stub.contract.media import S3Object
from api_stub.contract.wire import WireModel
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.keys import Caller
from api_stub.gateway.problems import FieldError, Problem, invalid
from api_stub.gateway.schemas import UploadReply, UploadRequest
from api_stub.storage import UPLOAD_PREFIX

#: How long a promise is remembered, and with it whose upload it is.
PROMISE_TTL_S: Final = 86_400


class _Promise(WireModel):
    tenant: str
    content_type: str
    num_bytes: int


async def promise_upload(gateway: Gateway, caller: Caller, request: UploadRequest) -> UploadReply:
    """Sign a PUT to a new object and remember what may be put there."""
    limit = gateway.settings.api_max_upload_bytes
    if request.num_bytes > limit:
        raise invalid("num_bytes", f"{request.num_bytes} bytes, the limit is {limit}")
    suffix = mimetypes.guess_extension(request.content_type) or ""
    put = await gateway.in_storage(lambda: gateway.storage.presign_put(suffix, request.content_type, request.num_bytes))
    promise = _Promise(tenant=caller.tenant, content_type=request.content_type, num_bytes=request.num_bytes)
    await gateway.commands.set(_key(S3Object.parse(put.uri).key), promise.to_json(), ex=PROMISE_TTL_S)
    return UploadReply(uri=put.uri, url=put.url, headers=put.headers, expires_s=put.expires_s)


async def check_uploads(gateway: Gateway, caller: Caller, media: Sequence[str]) -> None:
    """Hold every presigned upload among `media` against its promise. Raises Problem.

    An object without a promise (it was put there by somebody else, or long ago) is left to the worker's own checks.
    """
    bucket = gateway.settings.media_bucket
    sources = [(index, S3Object.parse(uri)) for index, uri in enumerate(media)]
    ours = [
        (i, source) for i, source in sources if source.bucket == bucket and _plain(source).startswith(UPLOAD_PREFIX)
    ]
    if not ours:
        return
    promises = await gateway.commands.mget([_key(_plain(source)) for _, source in ours])
    for (index, source), kept in zip(ours, promises, strict=True):
        if kept is not None:
            await _check(gateway, caller, f"media.{index}", source.uri, _Promise.model_validate_json(kept))


async def _check(gateway: Gateway, caller: Caller, field: str, uri: str, promise: _Promise) -> None:
    head = None
    if caller.sees(promise.tenant):
        head = await gateway.in_storage(lambda: gateway.storage.head(uri))
    if head is None:
        message = "nothing has been uploaded there"
        errors = [FieldError(field=field, message=message)]
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "media_not_found", f"{field}: {message}", errors=errors)
    if head.num_bytes != promise.num_bytes:
        raise invalid(field, f"{head.num_bytes} bytes were uploaded, {promise.num_bytes} were announced")
    if head.content_type.partition(";")[0].strip().lower() != promise.content_type.lower():
        raise invalid(field, f"{head.content_type[:80]!r} was uploaded, {promise.content_type!r} was announced")


def _plain(source: S3Object) -> str:
    """Return an object's key without empty segments: storage that keeps keys as files does not see them."""
    return "/".join(filter(None, source.key.split("/")))


def _key(object_key: str) -> str:
    return f"{names.PREFIX}gateway:upload:{object_key}"
