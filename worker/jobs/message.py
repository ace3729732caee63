"""Decodes a message's body: it is a doorbell, a plain message with a job, or a message that cannot become a job.

In: an `Entry` of the broker's list, from any producer in any language. Out: a `JobMessage`; Unreadable when the message
has no job id, so that nobody can be answered. Inflates and parses bodies of up to `MAX_BODY_BYTES`, so it is called on
a job's thread, never on the event loop. Knows no Celery.
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

#: The task in a job's row when its message names none that is served; such a job is refused.
FALLBACK_TASK: Final = TaskName.VQA
_JSON_TYPES: Final = frozenset({"application/json", "json"})
_CHARSETS: Final[Mapping[str, str]] = {
    "utf8": "utf-8", "binary": "utf-8", "ascii": "ascii", "usascii": "ascii", "latin1": "latin-1",
    "iso88591": "latin-1", "utf16": "utf-16", "utf32": "utf-32",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class JobMessage:
    """A decoded message.

    fields: the kwargs of a plain message; None for a doorbell, whose job is in the ledger already.
    problem: why a plain message is no valid job; its fields are then empty.
    links: the Celery signatures to send once the job is over, also when it is refused.
    """

    job_id: str
    task: TaskName
    priority: int
    fields: Mapping[str, object] | None
    problem: str | None = None
    links: Links | None = None


def read_message(entry: Entry) -> JobMessage:
    """Decode an entry. Raises Unreadable when neither its headers nor its body have an id."""
    if entry.is_doorbell and entry.job_id is not None:
        return JobMessage(entry.job_id, known_task(entry.task) or FALLBACK_TASK, entry.priority, None)
    body, problem = None, entry.problem
    if problem is None:
        try:
            body = _body(entry)
        except _BadBody as error:
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
    return JobMessage(job_id, task or FALLBACK_TASK, entry.priority, {} if problem else fields, problem, links)


class _BadBody(Exception):
    """Raised when a body cannot be decoded. `str()` names the field, and what to send instead."""


def _body(entry: Entry) -> object:
    """Return the decoded body. Raises _BadBody."""
    if (entry.content_type or "application/json").lower() not in _JSON_TYPES:
        raise _BadBody(f"content-type: {_brief(entry.content_type)} is not read; send application/json")
    charset = _CHARSETS.get((entry.content_encoding or "utf-8").lower().replace("-", "").replace("_", ""))
    if charset is None:
        raise _BadBody(f"content-encoding: {_brief(entry.content_encoding)} is not read; send utf-8")
    raw = _bytes(entry)
    if len(raw) > MAX_BODY_BYTES:
        raise _BadBody(f"job: {len(raw)} bytes of JSON in the message, the limit is {MAX_BODY_BYTES}")
    try:
        return read_json(raw.decode(charset))
    except TooManyContainers as error:
        raise _BadBody(f"job: {error}") from None
    except RecursionError:
        raise _BadBody("job: the message's body is nested too deep") from None
    except Exception as error:  # noqa: BLE001 - a codec or json, whatever they raise
        raise _BadBody(f"job: the message's body is no JSON that can be read ({type(error).__name__})") from None


def _bytes(entry: Entry) -> bytes:
    encoding = (entry.body_encoding or "utf-8").lower()
    if encoding not in {"base64", "utf-8"}:
        raise _BadBody(f"body_encoding: {_brief(entry.body_encoding)} is not read; send base64")
    try:
        raw = base64.b64decode(entry.body) if encoding == "base64" else entry.body.encode()
    except ValueError:  # also half a character, which UTF-8 has no bytes for
        raise _BadBody(f"body_encoding: the body is no {encoding}") from None
    if not entry.compression:
        return raw
    try:
        return inflate(raw, entry.compression, MAX_BODY_BYTES)
    except (ValueError, MemoryError) as error:
        raise _BadBody(f"compression: {error}") from None


def _fields(body: object) -> tuple[Mapping[str, object], str | None]:
    """Return the kwargs of a body and what is wrong with it.

    Celery's protocol 1 sends an object with `args` and `kwargs`, protocol 2 a list `[args, kwargs, embed]`.
    """
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
    """Return the links of a body (protocol 1: of the object itself), and what is wrong with those left out."""
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
