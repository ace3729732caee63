"""Media on their way to S3: uploads with a presigned URL, data URLs inside a request, and the files of a form.

What a presigned upload was promised is kept in Redis, and held against the object when a job uses it. Keys of media
that come inside a request are made of the tenant and of the content, so the same request again names the same objects.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import mimetypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, BinaryIO, Final

from starlette.datastructures import UploadFile

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


_DATA_URL: Final = re.compile(r"data:(?P<type>(?:image|video)/[A-Za-z0-9][A-Za-z0-9.+-]{0,63});base64,", re.IGNORECASE)
_CONTENT_TYPE: Final = re.compile(r"(image|video)/[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", re.IGNORECASE)
_CHUNK: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class InlineMedia:
    """One object that must be stored before its job. `content` stands at its beginning."""

    uri: str
    content: BinaryIO
    content_type: str


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a tenant's inline media go."""

    bucket: str
    tenant: str

    def media(self, content: BinaryIO, content_type: str) -> InlineMedia:
        """Name an object after its content. Reads all of it."""
        digest = hashlib.sha256()
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
        content.seek(0)
        folder = hashlib.sha256(self.tenant.encode(errors="surrogatepass")).hexdigest()[:16]
        suffix = mimetypes.guess_extension(content_type) or ""
        key = f"{UPLOAD_PREFIX}inline/{folder}/{digest.hexdigest()}{suffix}"
        return InlineMedia(S3Object(self.bucket, key).uri, content, content_type)


def take_data_urls(fields: dict[str, Any], where: Destination) -> tuple[dict[str, Any], list[InlineMedia]]:
    """Return a job's fields with an s3:// URI in the place of every data URL, and what must be stored there.

    Raises Problem for a data URL that cannot be read. Blocks: decodes and hashes all of it.
    """
    found: list[InlineMedia] = []

    def stored(value: object, place: str) -> object:
        if not isinstance(value, str) or value[:5].lower() != "data:":
            return value
        found.append(_of_data_url(value, place, where))
        return found[-1].uri

    changed = dict(fields)
    if isinstance(changed.get("media"), list):
        changed["media"] = [stored(uri, f"media.{index}") for index, uri in enumerate(changed["media"])]
    if isinstance(changed.get("messages"), list):
        changed["messages"] = [
            _message(message, lambda uri, place, at=index: stored(uri, f"messages.{at}.{place}"))
            for index, message in enumerate(changed["messages"])
        ]
    return changed, found


def take_files(files: Sequence[UploadFile], where: Destination) -> list[InlineMedia]:
    """Return the objects that a form's files become. Raises Problem for one that is no image or clip. Blocks."""
    found = []
    for index, file in enumerate(files):
        content_type = (file.content_type or "").partition(";")[0].strip()
        if not _CONTENT_TYPE.fullmatch(content_type):
            raise invalid(f"media.{index}", "a file of the form needs a Content-Type of image/… or video/…")
        found.append(where.media(file.file, content_type.lower()))
    return found


def _message(message: object, stored: Any) -> object:
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = [
        part | {"uri": stored(part["uri"], f"content.{index}.uri")}
        if isinstance(part, dict) and "uri" in part
        else part
        for index, part in enumerate(message["content"])
    ]
    return message | {"content": parts}


def _of_data_url(url: str, place: str, where: Destination) -> InlineMedia:
    head = _DATA_URL.match(url)
    if head is None:
        raise invalid(place, "a data URL must begin with data:image/…;base64, or data:video/…;base64,")
    try:
        content = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(place, "the data URL's base64 cannot be read") from error
    if not content:
        raise invalid(place, "the data URL is empty")
    return where.media(io.BytesIO(content), head["type"].lower())
