"""What a message says, whatever is wrong with it: a doorbell, a job, or something that is no job.

In: an entry of the broker's list, from any producer in any language. Out: a `Knock`, or Unreadable when there is no id
under which anybody could be answered. Decodes bodies, so it belongs on a thread. Knows no Celery.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from api_stub.contract.job import TaskName
from worker.jobs.entry import (
    MAX_BODY_BYTES,
    DropReason,
    Entry,
    TooManyContainers,
    Unreadable,
    inflate,
    read_json,
    usable_id,
)
from worker.jobs.links import Links, UnusableLinks, read_links

#: What the row of a job names as its task when its message named none of ours.
STAND_IN: Final = TaskName.VQA
_JSON_TYPES: Final = frozenset({"application/json", "json"})
_CHARSETS: Final[Mapping[str, str]] = {
    "utf8": "utf-8", "binary": "utf-8", "ascii": "ascii", "usascii": "ascii", "latin1": "latin-1",
    "iso88591": "latin-1", "utf16": "utf-16", "utf32": "utf-32",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Knock:
    """`fields` is None for a doorbell, else the kwargs of a plain message; `problem` says why they are no job.

    `links` is what Celery sends once the job is over, also when that is at once because it is none.
    """

    job_id: str
    task: TaskName
    priority: int
    fields: Mapping[str, object] | None
    problem: str | None = None
    links: Links | None = None


def read_knock(entry: Entry) -> Knock:
    """Read a message. Raises Unreadable when it has no id, not even in its body."""
    if entry.is_doorbell and entry.job_id is not None:
        return Knock(entry.job_id, known_task(entry.task) or STAND_IN, entry.priority, None)
    body, problem = None, entry.problem
    if problem is None:
        try:
            body = _body(entry)
        except _NotRead as error:
            problem = str(error)
    job_id, name = entry.job_id, entry.task
    if isinstance(body, Mapping) and name is None:
        job_id, name = job_id or usable_id(body.get("id")), body.get("task")
    if job_id is None:
        raise Unreadable(DropReason.NO_ID)
    task = known_task(name)
    fields: Mapping[str, object] = {}
    links = None
    if problem is None:
        fields, problem = _fields(body)
        links, unusable = _links(body, entry.root_id)
        problem = problem or unusable
    if task is None:
        problem = f"task: {_brief(name)} is not served here; send {', '.join(TaskName)}"
    return Knock(job_id, task or STAND_IN, entry.priority, {} if problem else fields, problem, links)


class _NotRead(Exception):
    """Raised when a body cannot be decoded. `str()` names the field."""


def _body(entry: Entry) -> object:
    """Return the decoded body. Raises _NotRead."""
    if (entry.content_type or "application/json").lower() not in _JSON_TYPES:
        raise _NotRead(f"content-type: {_brief(entry.content_type)} is not read; send application/json")
    charset = _CHARSETS.get((entry.content_encoding or "utf-8").lower().replace("-", "").replace("_", ""))
    if charset is None:
        raise _NotRead(f"content-encoding: {_brief(entry.content_encoding)} is not read; send utf-8")
    raw = _bytes(entry)
    if len(raw) > MAX_BODY_BYTES:
        raise _NotRead(f"job: {len(raw)} bytes of JSON in the message, the limit is {MAX_BODY_BYTES}")
    try:
        return read_json(raw.decode(charset))
    except TooManyContainers as error:
        raise _NotRead(f"job: {error}") from None
    except RecursionError:
        raise _NotRead("job: the message's body is nested too deep") from None
    except Exception as error:  # noqa: BLE001 - a codec or json, whatever they raise
        raise _NotRead(f"job: the message's body is no JSON that can be read ({type(error).__name__})") from None


def _bytes(entry: Entry) -> bytes:
    encoding = (entry.body_encoding or "utf-8").lower()
    if encoding not in {"base64", "utf-8"}:
        raise _NotRead(f"body_encoding: {_brief(entry.body_encoding)} is not read; send base64")
    try:
        raw = base64.b64decode(entry.body) if encoding == "base64" else entry.body.encode()
    except ValueError:  # also half a character, which UTF-8 has no bytes for
        raise _NotRead(f"body_encoding: the body is no {encoding}") from None
    if not entry.compression:
        return raw
    try:
        return inflate(raw, entry.compression, MAX_BODY_BYTES)
    except (ValueError, MemoryError) as error:
        raise _NotRead(f"compression: {error}") from None


def _fields(body: object) -> tuple[Mapping[str, object], str | None]:
    """Return the kwargs of a body and what is wrong with it; protocol 1 names its parts, protocol 2 orders them."""
    if isinstance(body, Mapping):
        args, kwargs = body.get("args", []), body.get("kwargs", {})
    elif isinstance(body, list) and len(body) >= 2:
        args, kwargs = body[0], body[1]
    else:
        return {}, "job: the message's body is not [args, kwargs, …]"
    if not isinstance(args, list) or args:
        count = len(args) if isinstance(args, list) else "odd"
        return {}, f"args: {count} positional arguments, send keyword arguments only"
    if not isinstance(kwargs, Mapping):
        return {}, f"kwargs: an object is required, got {type(kwargs).__name__}"
    return kwargs, None


def _links(body: object, root_id: str | None) -> tuple[Links | None, str | None]:
    """Return what is to be sent when the job is over, and why that cannot be all; protocol 1 has it beside the rest."""
    embed = body[2] if isinstance(body, list) and len(body) > 2 else body
    try:
        return read_links(embed, root_id), None
    except UnusableLinks as error:
        return error.usable, str(error)


def known_task(name: object) -> TaskName | None:
    """Return the task of the contract that a message names."""
    return TaskName(name) if isinstance(name, str) and name in set(TaskName) else None


def _brief(value: object) -> str:
    return repr(value[:80]) if isinstance(value, str) else f"a {type(value).__name__}"
