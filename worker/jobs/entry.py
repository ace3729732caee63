"""An entry of the broker's list: arbitrary bytes, parsed within limits and reduced to what a job needs.

In: the bytes of an entry. Out: an `Entry`, or Unreadable when it has no job id, so that nobody can be answered. The id
is the header `id`; a message of Celery's protocol 1 has it in its body, which is decoded later (`worker.jobs.message`).
Of an entry that is truncated, too large or no JSON, the headers are searched for on their own, so that its producer
gets an error too. Compressed bodies are inflated up to a limit, against decompression bombs. The compression methods
are those of kombu/compression.py that Python's standard library can inflate. Knows no Celery and no Redis.
"""

from __future__ import annotations

import bz2
import json
import lzma
import re
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final, Protocol

from api_stub.contract import names
from api_stub.contract.job import MAX_JOB_BYTES

#: Memory of an lzma decoder beside its output; lzma's strongest preset needs 65 MiB.
_LZMA_BYTES: Final = 80 * 1024 * 1024
#: Window bits that let zlib detect its own format and gzip's.
_ZLIB_OR_GZIP: Final = zlib.MAX_WBITS | 32

_METHODS: Final[Mapping[str, str]] = {
    "application/x-gzip": "gzip", "gzip": "gzip", "zlib": "gzip",
    "application/x-bz2": "bzip2", "bzip2": "bzip2", "bzip": "bzip2",
    "application/x-lzma": "lzma", "lzma": "lzma", "xz": "lzma",
}  # fmt: skip
MAX_ID_CHARS: Final = 255
FIRST_PRIORITY, LAST_PRIORITY = 0, 9
#: Of a body, inflated. JSON in ASCII spends up to six bytes where the job's own JSON has one.
MAX_BODY_BYTES: Final = 8 * MAX_JOB_BYTES
#: Of an entry: a body in base64 and its headers. A larger one is not parsed.
MAX_ENTRY_BYTES: Final = 2 * MAX_BODY_BYTES
#: Objects and lists of one JSON text. A small text of many would cost hundreds of times its size.
MAX_CONTAINERS: Final = 100_000
#: Says why a message is refused, in the copy of it that a requeue puts back: what was refused once stays refused.
REFUSED_HEADER: Final = "visionq-refused"
MAX_PROBLEM_CHARS: Final = 500
#: kombu writes the headers after the body, others may write them before: both ends are searched.
_HEADERS_WITHIN: Final = 64 * 1024
_HEADERS: Final = re.compile(rb'(?<!\\)"headers"\s*:\s*(?=\{)')
_MAX_HEADERS: Final = 8
_TEXT: Final = r'"(?:[^"\\]|\\.)*"'
#: A text of JSON, to its end or that of the input: it never fails, so a pass over the input is one pass.
_TEXT_OR_REST: Final = re.compile(r'"(?:[^"\\]++|\\.)*+["\\]?+', re.DOTALL)
_PAIR: Final = re.compile(rf"\s*[{{,]\s*({_TEXT})\s*:\s*({_TEXT}|true|false|null|-?[0-9]+)(?=\s*[,}}])")


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def inflate(packed: bytes, method: str, max_bytes: int) -> bytes:
    """Return at most `max_bytes` inflated bytes.

    Raises ValueError, which names the method or the limit, for an unknown method, more bytes, and what is not whole.
    """
    known = _METHODS.get(method)
    if known is None:
        raise ValueError(f"{method[:80]!r} cannot be read; send gzip, bzip2, lzma or none")
    decoder = _decoder(known)
    try:
        inflated = decoder.decompress(packed, max_bytes + 1)
    except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
        raise ValueError(f"the body is no {known}") from error
    if len(inflated) > max_bytes:
        raise ValueError(f"the body inflates to more than {max_bytes} bytes")
    if not decoder.eof:
        raise ValueError(f"the body is not whole, its {known} has no end")
    return inflated


def _decoder(method: str) -> _Decoder:
    if method == "bzip2":
        return bz2.BZ2Decompressor()
    if method == "lzma":
        return lzma.LZMADecompressor(memlimit=_LZMA_BYTES)
    return zlib.decompressobj(_ZLIB_OR_GZIP)


class DropReason(StrEnum):
    """Why a message without a usable job id was dropped. The values are a metric's label."""

    UNREADABLE = "unreadable"  # no JSON object, and no headers that can be read on their own
    NO_ID = "no_id"  # no id, or one that cannot be part of a Redis key
    ID_TAKEN = "id_taken"  # the id belongs to another job, whose answer stays
    UNACKED = "unacked_unreadable"  # Redis' copy of a message that a lost worker held is no message
    BROKE = "broke_receiver"  # receiving it raised an unexpected exception; the log names it


class Unreadable(Exception):
    """Raised for an entry or a copy that is dropped."""

    def __init__(self, reason: DropReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class TooManyContainers(ValueError):
    """Raised for JSON that would cost hundreds of times its size. `str()` says number and limit."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The headers and the body of a message, as its producer wrote them; None for what is absent or unusable.

    body: not decoded yet: first undo `body_encoding`, then `compression`.
    problem: why the message is refused; its body is then empty.
    root_id: Celery's id of the first task of the workflow, where that is another one.
    """

    job_id: str | None
    task: str | None
    priority: int
    is_doorbell: bool = False
    body: str = ""
    body_encoding: str | None = None
    compression: str | None = None
    content_type: str | None = None
    content_encoding: str | None = None
    problem: str | None = None
    root_id: str | None = None

    def to_json(self) -> str:
        """Return the entry as JSON, for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Entry:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))

    def envelope(self, queue: str, delivery_tag: str) -> dict[str, object]:
        """Return the message in kombu's format, as a requeue writes it; `read_entry` of it gives this entry again."""
        headers: dict[str, object] = {"id": self.job_id, "task": self.task, "compression": self.compression,
                                      "root_id": self.root_id}  # fmt: skip
        if self.is_doorbell:
            headers[names.DOORBELL_HEADER] = 1
        if self.problem is not None:
            headers[REFUSED_HEADER] = self.problem
        properties: dict[str, object] = {
            "correlation_id": self.job_id, "delivery_mode": 2, "priority": self.priority,
            "body_encoding": self.body_encoding, "delivery_tag": delivery_tag,
            "delivery_info": {"exchange": "", "routing_key": queue},
        }  # fmt: skip
        return {
            "body": self.body,
            "content-type": self.content_type,
            "content-encoding": self.content_encoding,
            "headers": {name: value for name, value in headers.items() if value is not None},
            "properties": {name: value for name, value in properties.items() if value is not None},
        }


def read_entry(raw: bytes) -> Entry:
    """Parse the bytes of an entry; a larger one than `MAX_ENTRY_BYTES` is not parsed as a whole. Raises Unreadable."""
    try:
        if len(raw) > MAX_ENTRY_BYTES:
            return _refused(raw, f"job: {len(raw)} bytes in the message, the limit is {MAX_ENTRY_BYTES}")
        try:
            value = read_json(raw.decode())
        except TooManyContainers as error:
            return _refused(raw, f"job: {error}")
        except (ValueError, RecursionError) as error:
            return _refused(raw, f"job: the message is no JSON that can be read ({type(error).__name__})")
        if not isinstance(value, dict):
            raise Unreadable(DropReason.UNREADABLE)
        return _entry(value)
    except MemoryError as error:
        raise Unreadable(DropReason.UNREADABLE) from error


def read_json(text: str) -> object:
    """Parse JSON of a bounded number of objects and lists.

    Raises ValueError, which may be TooManyContainers, or RecursionError for deep nesting.
    """
    if _num_brackets(text) > MAX_CONTAINERS:  # those of texts are none, but taking the texts out costs more
        num_containers = _num_brackets(_TEXT_OR_REST.sub("", text))
        if num_containers > MAX_CONTAINERS:
            raise TooManyContainers(f"{num_containers} objects and lists in the message, the limit is {MAX_CONTAINERS}")
    value: object = json.loads(text)
    return value


def _num_brackets(text: str) -> int:
    return text.count("{") + text.count("[")


def usable_id(value: object) -> str | None:
    """Return an id that can be part of a Redis key."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    try:
        text = str(value)
    except ValueError:  # Python writes no integers of thousands of digits
        return None
    is_usable = 0 < len(text) <= MAX_ID_CHARS and text.isprintable()
    return text if is_usable else None


def _refused(raw: bytes, problem: str) -> Entry:
    """Return the entry of a message of which at most the headers can be read."""
    for part in (raw[-_HEADERS_WITHIN:], raw[:_HEADERS_WITHIN]):
        for found in list(_HEADERS.finditer(part))[-_MAX_HEADERS:]:
            headers = _headers(part[found.end() :].decode(errors="replace"))
            if usable_id(headers.get("id")) is not None:
                return _entry({"headers": headers | {REFUSED_HEADER: problem}})
    raise Unreadable(DropReason.UNREADABLE)


def _headers(text: str) -> dict[str, object]:
    """Read the object that a text begins with; of one that is no JSON, the leading texts and numbers."""
    try:
        headers, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        headers, place = {}, 0
        while found := _PAIR.match(text, place):
            place = found.end()
            with suppress(ValueError):  # an escape that is none, too many digits
                headers[json.loads(found[1])] = json.loads(found[2])
    return _mapping(headers)


def _entry(message: Mapping[str, object]) -> Entry:
    headers, properties = _mapping(message.get("headers")), _mapping(message.get("properties"))
    job_id, task = usable_id(headers.get("id")), headers.get("task")
    is_doorbell = job_id is not None and bool(headers.get(names.DOORBELL_HEADER))
    about = {
        "body_encoding": properties.get("body_encoding"),
        "compression": headers.get("compression"),
        "content_type": message.get("content-type"),
        "content_encoding": message.get("content-encoding"),
    }
    body, given = message.get("body"), headers.get(REFUSED_HEADER)
    problem = given[:MAX_PROBLEM_CHARS] if isinstance(given, str) and given else _problem(body, about)
    if job_id is None and (isinstance(task, str) or problem is not None):  # only protocol 1 has its id in the body
        raise Unreadable(DropReason.NO_ID)
    has_body = not is_doorbell and problem is None
    root_id = usable_id(headers.get("root_id"))
    return Entry(
        job_id,
        task if isinstance(task, str) and len(task) <= MAX_ID_CHARS else None,
        _priority(properties.get("priority")),
        is_doorbell,
        body=body if has_body and isinstance(body, str) else "",
        **{name: value for name, value in about.items() if isinstance(value, str) and has_body},
        problem=None if is_doorbell else problem,
        root_id=root_id if has_body and root_id != job_id else None,
    )


def _problem(body: object, about: Mapping[str, object]) -> str | None:
    """Return why the body need not be looked at."""
    if not isinstance(body, str):
        return "job: the message has no body; send [args, kwargs, …] as JSON"
    for name, value in about.items():
        if value is not None and not isinstance(value, str):
            return f"{name}: a text is required, got {type(value).__name__}"
    return None


def _priority(value: object) -> int:
    """Return the priority list the message came through; a producer that says nothing gets Celery's own 0."""
    number = int(value) if isinstance(value, int) else 0
    return min(LAST_PRIORITY, max(FIRST_PRIORITY, number))


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}
