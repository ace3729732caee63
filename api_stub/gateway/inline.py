"""Media that come inside a request: data URLs and the files of a form, on their way to S3.

Their keys are made of the tenant and of the content, so the same request again names the same objects.
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
from typing import Any, BinaryIO, Final

from starlette.datastructures import UploadFile

from api_stub.contract.media import S3Object
from api_stub.gateway.problems import invalid
from api_stub.storage import UPLOAD_PREFIX

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
