"""Reads `metadata.jsonl`: one JSON object per line, the files of an example with captions or a conversation.

In: the file's bytes. Out: rows and findings; a row with a finding is left out. Opens no files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final, Literal, cast
from urllib.parse import quote

from api_stub.contract.conversation import ImagePart, MediaPart, Role, TextPart, Turn, VideoPart
from worker.training.example import Example, Finding

METADATA: Final = "metadata.jsonl"
SPLITS: Final = ("train", "validation", "test")
MAX_METADATA_BYTES: Final = 512 * 1024 * 1024
MAX_ROWS: Final = 1_000_000
MAX_FILES_PER_ROW: Final = 64
MAX_NAME_CHARS: Final = 1024

#: Words that processors replace by pictures; in a text they are meant as one, and would not be.
_MARKERS: Final = ("<image>", "<video>", "<|image_pad|>", "<|video_pad|>", "<start_of_image>")
_TARGETS: Final = ("text", "texts", "messages")
_ROLES: Final = tuple(role.value for role in Role)

Split = Literal["train", "validation", "test"]
_Part = TextPart | ImagePart | VideoPart | MediaPart


@dataclass(frozen=True, slots=True)
class Row:
    """An example with the split that its row names."""

    example: Example
    split: Split | None


class _Wrong(Exception):
    """Raised with what is wrong with a row."""


def read_rows(content: bytes) -> tuple[list[Row], list[Finding]]:
    """Read every line, and return the rows and what is wrong with the others."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return [], [Finding(METADATA, content.count(b"\n", 0, error.start) + 1, f"not UTF-8 (byte {error.start})")]
    rows, findings = [], []
    # Not splitlines(): JSON texts may hold other line separators of Unicode.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(lines) > MAX_ROWS:
        return [], [Finding(METADATA, None, f"{len(lines)} rows, the limit is {MAX_ROWS}")]
    for number, line in lines:
        try:
            rows.append(_row(line, number))
        except _Wrong as wrong:
            findings.append(Finding(METADATA, number, str(wrong)))
    if not lines:
        findings.append(Finding(METADATA, None, "no rows"))
    return rows, findings


def _row(line: str, number: int) -> Row:
    try:
        value = json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _Wrong(f"a row is a JSON object, got {_shown(value)}")
    files = _files(value)
    target = _target(value)
    kind = value.get("kind")
    if kind is not None and not (isinstance(kind, str) and kind.strip()):
        raise _Wrong(f"kind: a name is required, got {_shown(kind)}")
    split = value.get("split")
    if split is not None and split not in SPLITS:
        raise _Wrong(f"split: one of {', '.join(SPLITS)} is required, got {_shown(split)}")
    messages = _messages(value[target], files) if target == "messages" else None
    texts = () if target == "messages" else _texts(target, value[target])
    return Row(Example(number, files, texts, messages, kind), cast("Split | None", split))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Wrong(f"the field {twice[:80]!r} is there twice")
    return named


def _files(row: Mapping[str, Any]) -> tuple[str, ...]:
    named = row.get("file_name")
    if named is None:
        raise _Wrong("file_name is missing")
    names = named if isinstance(named, list) else [named]
    if not names and row.get("messages") is not None:
        return ()  # a conversation without pictures
    if not 1 <= len(names) <= MAX_FILES_PER_ROW:
        raise _Wrong(f"file_name: 1 to {MAX_FILES_PER_ROW} files, got {len(names)}")
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise _Wrong(f"file_name: a name is required, got {_shown(name)}")
        _check_text("file_name", name)
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "://" in name:
            raise _Wrong(f"file_name: {_shown(name)} does not lie in the data set's folder")
        if len(name) > MAX_NAME_CHARS or not name.isprintable():
            raise _Wrong(f"file_name: at most {MAX_NAME_CHARS} printable characters, got {_shown(name)}")
    return tuple(str(PurePosixPath(name)) for name in names)


def _target(row: Mapping[str, Any]) -> str:
    given = [name for name in _TARGETS if row.get(name) is not None]
    if len(given) != 1:
        raise _Wrong(f"one of {', '.join(_TARGETS)} is required, got {' and '.join(given) or 'none'}")
    return given[0]


def _texts(field: str, value: Any) -> tuple[str, ...]:
    texts = [value] if field == "text" else value
    if not isinstance(texts, list) or not texts:
        raise _Wrong(f"{field}: a list of captions is required, got {_shown(value)}")
    for text in texts:
        _check_spoken(field, text)
    return tuple(texts)


def _check_spoken(field: str, text: Any) -> None:
    """Refuse what no model can learn, and words that were meant as pictures."""
    if not isinstance(text, str):
        raise _Wrong(f"{field}: text is required, got {_shown(text)}")
    if not text.strip():
        raise _Wrong(f"{field}: empty text")
    _check_text(field, text)
    for marker in _MARKERS:
        if marker in text:
            raise _Wrong(f'{field}: {marker} inside a text shows no picture; a part {{"type": "image"}} does')


def _check_text(field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Wrong(f"{field}: half of a surrogate pair at character {error.start}") from error


def _messages(value: Any, files: Sequence[str]) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise _Wrong(f"messages: a list of turns is required, got {_shown(value)}")
    waiting = iter(files)
    turns = [_turn(f"messages.{number}", turn, waiting) for number, turn in enumerate(value)]
    num_shown = sum(not isinstance(part, TextPart) for turn in turns for part in turn.content)
    if num_shown == 0 and files:
        first = next((number for number, turn in enumerate(turns) if turn.role is Role.USER), None)
        if first is None:
            raise _Wrong("messages: no user's turn in which the pictures could be")
        shown = tuple(MediaPart(uri=_uri(name)) for name in files)
        turns[first] = Turn(role=Role.USER, content=(*shown, *turns[first].content))
    elif num_shown < len(files):
        raise _Wrong(f"messages: parts for {num_shown} of {len(files)} files")
    _check_order(turns)
    return tuple(turns)


def _turn(place: str, value: Any, waiting: Iterator[str]) -> Turn:
    if not isinstance(value, dict):
        raise _Wrong(f"{place}: a turn is an object of role and content, got {_shown(value)}")
    role = value.get("role")
    if role not in _ROLES:
        raise _Wrong(f"{place}.role: one of {', '.join(_ROLES)} is required, got {_shown(role)}")
    content = value.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise _Wrong(f"{place}.content: text or a list of parts is required, got {_shown(content)}")
    turn = Turn(
        role=Role(role),
        content=tuple(_part(f"{place}.content.{number}", part, waiting) for number, part in enumerate(parts)),
    )
    if turn.role is not Role.USER and any(not isinstance(part, TextPart) for part in turn.content):
        raise _Wrong(f"{place}: pictures and clips belong to user's turns")
    return turn


def _part(place: str, part: Any, waiting: Iterator[str]) -> _Part:
    if not isinstance(part, dict):
        raise _Wrong(f"{place}: a part is an object, got {_shown(part)}")
    kind = part.get("type")
    allowed = {"type", "text"} if kind == "text" else {"type"}
    unknown = sorted(name for name, value in part.items() if name not in allowed and value is not None)
    if unknown:
        raise _Wrong(f"{place}: unknown field {unknown[0][:80]!r}")
    if kind == "text":
        _check_spoken(place, part.get("text"))
        return TextPart(text=part["text"])
    if kind not in ("image", "video"):
        raise _Wrong(f"{place}.type: one of text, image, video is required, got {_shown(kind)}")
    name = next(waiting, None)
    if name is None:
        raise _Wrong(f"{place}: a part of type {kind} without a file: file_name has too few")
    return ImagePart(uri=_uri(name)) if kind == "image" else VideoPart(uri=_uri(name))


def _check_order(turns: Sequence[Turn]) -> None:
    if turns[-1].role is not Role.ASSISTANT:
        raise _Wrong(f"messages: the last turn must be the assistant's, which is learnt, got the {turns[-1].role}'s")
    for number, turn in enumerate(turns):
        if turn.role is Role.SYSTEM and number:
            raise _Wrong(f"messages.{number}: only the first turn may be the system's")
        if turn.role is Role.ASSISTANT and (number == 0 or turns[number - 1].role is not Role.USER):
            raise _Wrong(f"messages.{number}: an assistant's turn must follow a user's")


def _uri(name: str) -> str:
    """Return a reference in the contract's form; the bucket stands for the data set."""
    return f"s3://dataset/{quote(name)}"


def _shown(value: object) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 80 else shown[:79] + "…"
