"""Entries of the broker's list: what is kept of each, and compressed bodies within their limit."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from kombu import compression

from api_stub.contract import names
from worker.jobs.entry import MAX_CONTAINERS, MAX_ENTRY_BYTES, DropReason, Entry, Unreadable, inflate, read_entry

ENVELOPE: dict[str, Any] = {
    "body": "W10=", "content-type": "application/json", "content-encoding": "utf-8",
    "headers": {"task": "visionq.vqa", "id": "1234", "lang": "py"},
    "properties": {"priority": 3, "body_encoding": "base64", "delivery_tag": "x"},
}  # fmt: skip
WELL_MADE = json.dumps(ENVELOPE).encode()


def changed(part: str, **values: object) -> bytes:
    """The envelope with values of one of its objects replaced; NaN and the like are written as Python writes them."""
    return json.dumps(ENVELOPE | {part: ENVELOPE[part] | values}).encode()


def test_an_entry_keeps_what_a_job_needs() -> None:
    assert read_entry(WELL_MADE) == Entry(
        "1234", "visionq.vqa", 3, body="W10=", body_encoding="base64", content_type="application/json",
        content_encoding="utf-8",
    )  # fmt: skip


def test_a_doorbell_is_told_by_its_header_and_has_no_body() -> None:
    entry = read_entry(changed("headers", **{names.DOORBELL_HEADER: 1}))
    assert (entry.is_doorbell, entry.body, entry.problem) == (True, "", None)


CUT: dict[str, Callable[[], bytes]] = {
    "cut off behind its headers": lambda: WELL_MADE[:-30],
    "not UTF-8": lambda: WELL_MADE.replace(b'"x"', b'"\xff"'),
    "nested without end": lambda: WELL_MADE[:-1] + b', "x": ' + b"[" * 100_000,
    "an integer of 5 000 digits": lambda: WELL_MADE[:-1] + b', "x": ' + b"9" * 5_000 + b"}",
    "too large, headers behind": lambda: WELL_MADE.replace(b"W10=", b"W" * MAX_ENTRY_BYTES),
    "too large, headers in front": lambda: json.dumps(
        {"headers": ENVELOPE["headers"], "body": "\\" * MAX_ENTRY_BYTES}
    ).encode(),
    "cut off within its headers": lambda: WELL_MADE[: WELL_MADE.index(b', "lang')] + b', "lang',
    "headers nested without end": lambda: WELL_MADE.replace(b'"py"', b"[" * 100_000),
    "very many objects": lambda: WELL_MADE[:-1] + b', "x": [' + b"{}," * MAX_CONTAINERS + b"0]}",
}


@pytest.mark.parametrize("case", CUT)
def test_of_what_is_no_readable_json_the_headers_are_read_on_their_own(case: str) -> None:
    entry = read_entry(CUT[case]())
    assert (entry.job_id, entry.task, entry.body) == ("1234", "visionq.vqa", "")
    assert entry.problem is not None
    assert entry.problem.startswith("job: ")


def test_headers_that_a_body_quotes_are_not_taken_for_the_message_s_own() -> None:
    quoting = json.dumps({"body": 'x "headers": {"id": "forged"}', "x": 1})
    with pytest.raises(Unreadable):
        read_entry(quoting[:-3].encode())


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"garbage", b"\xff", b"[1, 2]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5_000, b"NaN",
        b'{"__type__":"decimal","__value__":"x"}', b"x" * (MAX_ENTRY_BYTES + 1), b'"headers": {"id": 1',
        b'{"headers": {"id": ["x"]}, ',
    ],
)  # fmt: skip
def test_what_has_no_headers_is_unreadable(raw: bytes) -> None:
    with pytest.raises(Unreadable) as raised:
        read_entry(raw)
    assert raised.value.reason in (DropReason.UNREADABLE, DropReason.NO_ID)


@pytest.mark.parametrize("job_id", [None, "", True, 1.5, {}, [], "a" * 256, "a\nb", "a\ud800", "\x00", float("nan")])
def test_an_id_that_cannot_be_a_key_is_none(job_id: object) -> None:
    with pytest.raises(Unreadable) as raised:
        read_entry(changed("headers", id=job_id))
    assert raised.value.reason is DropReason.NO_ID


@pytest.mark.parametrize(
    ("priority", "read_as"), [(6, 6), (99, 9), (-1, 0), ("high", 0), (None, 0), (True, 1), (1e999, 0), (10**400, 9)]
)
def test_priorities_are_bounded(priority: object, read_as: int) -> None:
    assert read_entry(changed("properties", priority=priority)).priority == read_as


@pytest.mark.parametrize("odd", [1, True, [], {}, 1.5])
@pytest.mark.parametrize("place", ["compression", "body_encoding"])
def test_an_odd_type_where_a_text_belongs_is_refused_by_name(place: str, odd: object) -> None:
    part = "headers" if place == "compression" else "properties"
    assert f"{place}: a text" in str(read_entry(changed(part, **{place: odd})).problem)


@pytest.mark.parametrize("part", ["headers", "properties"])
@pytest.mark.parametrize("odd", [None, 1, "x", [], [["id", "1"]]])
def test_headers_and_properties_of_an_odd_type_are_none(part: str, odd: object) -> None:
    raw = json.dumps(ENVELOPE | {part: odd}).encode()
    entry = read_entry(raw)
    assert entry.job_id == (None if part == "headers" else "1234")
    assert entry.priority == (3 if part == "headers" else 0)


@pytest.mark.parametrize("raw", [WELL_MADE, *(make() for make in CUT.values()), changed("headers", compression="gzip")])
def test_what_a_requeue_puts_back_says_the_same(raw: bytes) -> None:
    entry = read_entry(raw)
    again = json.dumps(entry.envelope("visionq.default", "tag"))
    assert read_entry(again.encode()) == entry == Entry.from_json(entry.to_json())
    assert len(again) < MAX_ENTRY_BYTES


TEXT = b"hello " * 100


@pytest.mark.parametrize("method", ["gzip", "zlib", "bzip2", "bzip", "lzma", "xz"])
def test_what_kombu_compresses_is_inflated(method: str) -> None:
    packed, content_type = compression.compress(TEXT, method)
    assert inflate(packed, method, 600) == inflate(packed, content_type, 600) == TEXT


def test_gzip_s_own_format_is_read_too() -> None:
    assert inflate(gzip.compress(TEXT), "gzip", 600) == TEXT


@pytest.mark.parametrize(
    ("method", "packed"),
    [
        ("gzip", zlib.compress(bytes(100_000_000))),
        ("bzip2", bz2.compress(bytes(100_000_000))),
        ("lzma", lzma.compress(bytes(100_000_000), preset=0)),
    ],
    ids=["gzip", "bzip2", "lzma"],
)
def test_a_hundred_megabytes_in_little_are_refused_in_little_memory(method: str, packed: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than 1000000 bytes"):
        inflate(packed, method, 1_000_000)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("method", ["gzip", "bzip2", "lzma"])
@pytest.mark.parametrize("packed", [b"", b"x", b"hello" * 9])
def test_what_is_not_compressed_is_refused(method: str, packed: bytes) -> None:
    with pytest.raises(ValueError, match=r"the body is n"):
        inflate(packed, method, 1_000)


@pytest.mark.parametrize("method", ["gzip", "bzip2", "lzma"])
def test_half_a_body_is_refused(method: str) -> None:
    packed, _ = compression.compress(TEXT, method)
    with pytest.raises(ValueError, match=r"not whole|is no"):
        inflate(packed[:-9], method, 1_000)


@pytest.mark.parametrize("method", ["zstd", "brotli", "rot13", "x" * 1_000])
def test_an_unknown_method_is_refused_by_name(method: str) -> None:
    with pytest.raises(ValueError, match=method[:80]):
        inflate(b"x", method, 1_000)
