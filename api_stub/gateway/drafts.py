"""A job on its way in: its media are typed by where they are now, and all are in S3 before the job is made.

A chat becomes a `ChatDraft` (openai/chat.py), the body of `/v1/jobs` a `JsonDraft`. `intake.accept` names an S3 object
for each source, makes the job of the draft once, and stores what was not in S3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from starlette.datastructures import UploadFile

from api_stub.contract.job import Job
from api_stub.gateway.media_hosts import MediaAddress, MediaKind
from api_stub.gateway.problems import invalid
from api_stub.submit import checked


@dataclass(frozen=True, slots=True, eq=False)
class Inline:
    """Media inside the request: a data URL. `place` is the field that holds it."""

    place: str
    url: str


@dataclass(frozen=True, slots=True, eq=False)
class Attached:
    """Media beside the request: a file of its form."""

    place: str
    file: UploadFile


@dataclass(frozen=True, slots=True, eq=False)
class Remote:
    """Media at an http(s) address of a listed host."""

    place: str
    kind: MediaKind
    address: MediaAddress


@dataclass(frozen=True, slots=True)
class S3:
    """A reference as the client wrote it; whether it is an s3:// URI is checked with the job."""

    uri: str


#: Told apart by identity: a data URL may have megabytes, and the same part twice is two sources.
Unstored = Inline | Attached | Remote
Source = Unstored | S3
#: The s3:// URI that each source gets.
Uris = Mapping[Unstored, str]


class Draft(Protocol):
    """What `intake.accept` takes."""

    @property
    def tenant(self) -> object:
        """Whose job the client says it is; empty when it says nothing."""

    @property
    def sources(self) -> Sequence[Unstored]:
        """The media that are not in S3."""

    def job(self, uris: Uris, tenant: str | None) -> Job:
        """Make the job; `tenant` replaces the draft's own unless it is None. Raises InvalidRequest."""


def uri_of(source: Source, uris: Uris) -> str:
    """Return the s3:// URI of a source."""
    return source.uri if isinstance(source, S3) else uris[source]


class JsonDraft:
    """A job as the client wrote it: any JSON object, whose shape is checked when the job is made of it.

    A form's files follow the `media` that the JSON lists. Raises Problem when that is no list.
    """

    def __init__(self, fields: Mapping[str, object], files: Sequence[UploadFile] = ()) -> None:
        if files and not isinstance(fields.get("media", []), list):
            raise invalid("media", "a list is required")
        self._fields = fields
        self._inline = {place: Inline(place, url) for place, url in _data_urls(fields)}
        self._attached = [Attached(f"media.{at}", file) for at, file in enumerate(files)]

    @property
    def tenant(self) -> object:
        return self._fields.get("tenant", "")

    @property
    def sources(self) -> Sequence[Unstored]:
        return [*self._inline.values(), *self._attached]

    def job(self, uris: Uris, tenant: str | None) -> Job:
        def in_s3(place: str, written: object) -> object:
            return uris[self._inline[place]] if place in self._inline else written

        fields = _with_references(self._fields, in_s3)
        if self._attached:
            listed = cast("list[object]", fields.get("media", []))
            fields["media"] = [*listed, *(uris[file] for file in self._attached)]
        return checked(fields if tenant is None else fields | {"tenant": tenant})


def _data_urls(fields: Mapping[str, object]) -> Sequence[tuple[str, str]]:
    """Return the data URLs that stand where a job's media references may stand, each after its field."""
    found: list[tuple[str, str]] = []

    def note(place: str, written: object) -> object:
        if isinstance(written, str) and written[:5].lower() == "data:":
            found.append((place, written))
        return written

    _with_references(fields, note)
    return found


def _with_references(fields: Mapping[str, object], replaced: Callable[[str, object], object]) -> dict[str, object]:
    """Return a job's fields with other media references. What is not shaped like a job's field stays as it is."""
    changed = dict(fields)
    media, messages = fields.get("media"), fields.get("messages")
    if isinstance(media, list):
        changed["media"] = [replaced(f"media.{at}", uri) for at, uri in enumerate(media)]
    if isinstance(messages, list):
        changed["messages"] = [_message(f"messages.{at}", message, replaced) for at, message in enumerate(messages)]
    return changed


def _message(place: str, message: object, replaced: Callable[[str, object], object]) -> object:
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = [
        part | {"uri": replaced(f"{place}.content.{at}.uri", part["uri"])}
        if isinstance(part, dict) and "uri" in part
        else part
        for at, part in enumerate(message["content"])
    ]
    return message | {"content": parts}
