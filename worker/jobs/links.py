"""The Celery signatures to send when a job is over: a plain message's `link`, `link_error` and chain, validated.

In: the `embed` part of a message's body. Out: `Links`, which the job's row keeps as JSON. Signatures name tasks of
other apps, so they are checked for their shape and size only and kept as the producer wrote them. Knows no Celery, no
Redis.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

#: A signature as Celery writes it: task, args, kwargs, options, subtask_type, immutable.
Signature = Mapping[str, object]

MAX_LINKS_BYTES: Final = 64 * 1024
MAX_SIGNATURES: Final = 100
MAX_NESTED: Final = 16
MAX_NAME_CHARS: Final = 255

#: Keys of a message's body, and the names of the options by which producers set them; errors name the latter.
_PARTS: Final[Mapping[str, str]] = {"callbacks": "link", "errbacks": "link_error", "chain": "chain"}
_CHORD: Final = "chord: not served here, its body would wait for ever; collect the results of a group yourself"


class UnusableLinks(ValueError):
    """Raised for links that cannot be sent. `str()` names the option; `usable` are the links that can be sent."""

    def __init__(self, problem: str, usable: Links | None = None) -> None:
        super().__init__(problem)
        self.usable = usable


@dataclass(frozen=True, slots=True)
class Links:
    """Callbacks are sent with the job's result, errbacks with its id. `chain` is reversed, as in Celery: the next task
    is its last one.
    """

    callbacks: tuple[Signature, ...] = ()
    errbacks: tuple[Signature, ...] = ()
    chain: tuple[Signature, ...] = ()
    root_id: str | None = None

    def to_json(self) -> str:
        """Return the links as JSON, for `from_json`, without what is empty."""
        fields: Mapping[str, object] = {
            "callbacks": self.callbacks, "errbacks": self.errbacks, "chain": self.chain, "root_id": self.root_id,
        }  # fmt: skip
        return json.dumps({name: value for name, value in fields.items() if value}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Links:
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        callbacks, errbacks, chain = (tuple(fields.get(name, ())) for name in _PARTS)
        return cls(callbacks, errbacks, chain, fields.get("root_id"))

    def followers(self) -> list[str]:
        """Return the ids of the tasks after the job in its chain; none of them is sent when the job fails."""
        every = [nested for signature in self.chain for nested in _with_members(signature)]
        ids = [_mapping(signature.get("options")).get("task_id") for signature in every]
        return [task_id for task_id in ids if isinstance(task_id, str)]


def read_links(embed: object, root_id: str | None = None) -> Links | None:
    """Parse the links of a message; None when it has none. Raises UnusableLinks."""
    if not isinstance(embed, Mapping):
        return None
    parts: dict[str, tuple[Signature, ...]] = {}
    left = MAX_SIGNATURES
    for name, option in _PARTS.items():
        value = embed.get(name) or []
        signatures = [value] if isinstance(value, Mapping) else value
        if not isinstance(signatures, list):
            raise UnusableLinks(f"{option}: a list of signatures is required, got {type(value).__name__}")
        left = _check(signatures, option, left)
        parts[name] = tuple(signatures)
    links = Links(**parts, root_id=root_id) if any(parts.values()) else None
    try:
        num_bytes = len(links.to_json().encode()) if links else 0
    except UnicodeEncodeError:
        raise UnusableLinks("link: half a character in a signature, which UTF-8 has no bytes for") from None
    if num_bytes > MAX_LINKS_BYTES:
        raise UnusableLinks(f"link: {num_bytes} bytes of signatures, the limit is {MAX_LINKS_BYTES}")
    if embed.get("chord"):
        raise UnusableLinks(_CHORD, usable=links)
    return links


def _check(signatures: object, option: str, left: int, depth: int = 0) -> int:
    """Check a list of signatures and all within them; return how many more there may be. Raises UnusableLinks."""
    if not isinstance(signatures, list):
        raise UnusableLinks(f"{option}: a list of signatures is required, got {type(signatures).__name__}")
    if signatures and depth > MAX_NESTED:
        raise UnusableLinks(f"{option}: signatures within signatures, the limit is {MAX_NESTED}")
    for signature in signatures:
        if left == 0:
            raise UnusableLinks(f"{option}: more signatures than the limit of {MAX_SIGNATURES}")
        options, members = _check_one(signature, option)
        left -= 1
        for nested in (members, *(options.get(name) or [] for name in ("link", "link_error"))):
            left = _check([nested] if isinstance(nested, Mapping) else nested, option, left, depth + 1)
    return left


def _check_one(signature: object, option: str) -> tuple[Mapping[str, object], list[object]]:
    """Return a signature's options, and the signatures of which a group or a chain is made. Raises UnusableLinks."""
    if not isinstance(signature, Mapping):
        raise UnusableLinks(f"{option}: a signature is required, got {type(signature).__name__}")
    task, kind = signature.get("task"), signature.get("subtask_type")
    if not isinstance(task, str) or not 0 < len(task) <= MAX_NAME_CHARS:
        raise UnusableLinks(f"{option}: a signature without the name of its task")
    for name, required in (("args", list), ("kwargs", Mapping), ("options", Mapping)):
        value = signature.get(name)
        if value is not None and not isinstance(value, required):
            raise UnusableLinks(f"{option}: {name} of {task!r} are of type {type(value).__name__}")
    options = _mapping(signature.get("options"))
    if kind == "chord" or task == "celery.chord" or options.get("chord"):
        raise UnusableLinks(_CHORD)
    if kind not in (None, "group", "chain"):
        raise UnusableLinks(f"{option}: {str(kind)[:80]!r} is not sent from here; send a task, a group or a chain")
    members = _mapping(signature.get("kwargs")).get("tasks") if kind else []
    if not isinstance(members, list):
        raise UnusableLinks(f"{option}: a {kind} without tasks")
    if kind == "chain" and any(
        isinstance(each, Mapping) and each.get("subtask_type") == "group" for each in members[:-1]
    ):
        raise UnusableLinks(_CHORD)  # Celery makes a chord of a group that is followed by a task
    return options, members


def _with_members(signature: Signature) -> Iterator[Signature]:
    yield signature
    members = _mapping(signature.get("kwargs")).get("tasks") if signature.get("subtask_type") else None
    for member in members if isinstance(members, list) else []:
        yield from _with_members(member)


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
