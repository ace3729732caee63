"""What a Celery message says, whatever is wrong with it: a doorbell, a job, or something that is no job.

In: a message's headers, properties and decoded body, from any producer in any language. Out: a `Knock`, or None when
there is no id under which anybody could be answered. Knows no Celery: plain values in, plain values out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

from api_stub.contract import names
from api_stub.contract.job import TaskName

MAX_ID_CHARS: Final = 255
FIRST_PRIORITY, LAST_PRIORITY = 0, 9


@dataclass(frozen=True, slots=True)
class Knock:
    """`fields` is None for a doorbell, else the kwargs of a plain message; `problem` says why they are no job."""

    job_id: str
    task: TaskName
    priority: int
    fields: Mapping[str, object] | None
    problem: str | None = None

    def to_json(self) -> str:
        """Return the knock as JSON, for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Knock:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        return cls(**values | {"task": TaskName(values["task"])})


def read_knock(
    task: TaskName, headers: Mapping[str, object], properties: Mapping[str, object], body: object
) -> Knock | None:
    """Read a message.

    `body` is (args, kwargs, …) of protocol 2, the mapping of protocol 1, or the error that decoding it raised.
    """
    if isinstance(body, Mapping) and "id" in body:
        headers, body = body, (body.get("args", ()), body.get("kwargs", {}))
    job_id = _id(headers.get("id"))
    if job_id is None:
        return None
    priority = _priority(properties.get("priority"))
    if headers.get(names.DOORBELL_HEADER):
        return Knock(job_id, task, priority, None)
    fields, problem = _fields(body)
    return Knock(job_id, task, priority, fields, problem)


def _id(value: object) -> str | None:
    """Return an id that can be part of a Redis key."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    text = str(value)
    is_usable = 0 < len(text) <= MAX_ID_CHARS and text.isprintable()
    return text if is_usable else None


def _priority(value: object) -> int:
    """Return the priority list the message came through; a producer that says nothing gets Celery's own 0."""
    number = value if isinstance(value, int) else 0
    return min(LAST_PRIORITY, max(FIRST_PRIORITY, number))


def _fields(body: object) -> tuple[Mapping[str, object], str | None]:
    if isinstance(body, Exception):
        return {}, f"job: the message's body cannot be read ({type(body).__name__}); send JSON"
    if not isinstance(body, (list, tuple)) or len(body) < 2:
        return {}, "job: the message's body is not [args, kwargs, …]"
    args, kwargs = body[0], body[1]
    if not isinstance(args, (list, tuple)) or args:
        count = len(args) if isinstance(args, (list, tuple)) else "odd"
        return {}, f"args: {count} positional arguments, send keyword arguments only"
    if not isinstance(kwargs, Mapping):
        return {}, f"kwargs: an object is required, got {type(kwargs).__name__}"
    return {str(name): value for name, value in kwargs.items()}, None
