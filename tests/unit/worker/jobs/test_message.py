"""Reading messages of any make."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace

import pytest

from api_stub.contract.job import TaskName
from worker.jobs.entry import MAX_BODY_BYTES, MAX_CONTAINERS, DropReason, Entry, Unreadable
from worker.jobs.links import Links
from worker.jobs.message import JobMessage, read_message

ENTRY = Entry("1234", "visionq.vqa", 3)


def read(body: object, **values: object) -> JobMessage:
    return read_message(replace(ENTRY, body=json.dumps(body), **values))  # type: ignore[arg-type]


def test_a_doorbell_has_no_fields() -> None:
    assert read_message(replace(ENTRY, is_doorbell=True)) == JobMessage("1234", TaskName.VQA, 3, None)


def test_kwargs_become_the_fields() -> None:
    message = read([[], {"question": "hello", "self": 1}, {}])
    assert (message.fields, message.problem) == ({"question": "hello", "self": 1}, None)


def test_a_message_of_protocol_1_carries_id_and_task_in_its_body() -> None:
    said = {"id": "v1", "task": "visionq.caption", "args": [], "kwargs": {"question": "x"}}
    assert read(said, job_id=None, task=None) == JobMessage("v1", TaskName.CAPTION, 3, {"question": "x"})


@pytest.mark.parametrize("said", [{}, {"id": "a\nb"}, {"id": None}, [[], {}, {}], "x"])
def test_a_message_without_an_id_anywhere_is_unreadable(said: object) -> None:
    with pytest.raises(Unreadable) as raised:
        read(said, job_id=None, task=None)
    assert raised.value.reason is DropReason.NO_ID


@pytest.mark.parametrize("body", [None, [], ["x"], "x", [[], None], [[], []], [None, {}], [[1], {}], 1, {"kwargs": 1}])
def test_what_is_no_job_says_why(body: object) -> None:
    message = read(body)
    assert message.problem
    assert message.fields == {}


@pytest.mark.parametrize("task", ["no.such", "celery.map", "celery.chord_unlock", "visionq.VQA", None])
def test_a_task_that_is_none_of_ours_is_refused_by_name(task: str | None) -> None:
    message = read([[], {"question": "hello"}, {}], task=task)
    assert str(message.problem).startswith(f"task: {task!r}" if task else "task: ")
    assert "visionq.video_qa" in str(message.problem)


@pytest.mark.parametrize("is_protocol_1", [False, True])
def test_what_celery_is_to_send_afterwards_is_kept_though_the_message_is_no_job(is_protocol_1: bool) -> None:
    then = {"callbacks": [{"task": "notify"}]}
    for kwargs in ({"question": "hello"}, []):
        first = {"id": "v1", "task": "visionq.vqa", "args": [], "kwargs": kwargs} | then
        message = read(first, job_id=None, task=None) if is_protocol_1 else read([[], kwargs, then], root_id="root")
        assert message.links == Links(callbacks=({"task": "notify"},), root_id=None if is_protocol_1 else "root")
        assert (message.problem is None) == (kwargs != [])


@pytest.mark.parametrize("is_protocol_1", [False, True])
def test_a_chord_is_refused_by_name_and_the_error_link_is_kept(is_protocol_1: bool) -> None:
    then = {"chord": {"task": "body"}, "errbacks": [{"task": "notify"}]}
    first = {"id": "v1", "task": "visionq.vqa", "args": [], "kwargs": {}} | then
    message = read(first, job_id=None, task=None) if is_protocol_1 else read([[], {"question": "hello"}, then])
    assert str(message.problem).startswith("chord: ")
    assert message.links == Links(errbacks=({"task": "notify"},))


@pytest.mark.parametrize("embed", [None, {}, {"callbacks": None, "errbacks": [], "chain": None, "chord": None}])
def test_a_message_that_asks_for_nothing_afterwards_is_a_job(embed: object) -> None:
    message = read([[], {"question": "hello"}, embed])
    assert (message.problem, message.links) == (None, None)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"content_type": "application/x-python-serialize"}, "content-type: 'application/x-python-serialize'"),
        ({"content_encoding": "zip"}, "content-encoding: 'zip'"),
        ({"body_encoding": "rot13"}, "body_encoding: 'rot13'"),
        ({"body_encoding": "base64", "body": "x"}, "body_encoding: the body is no base64"),
        ({"body": "a\ud800"}, "body_encoding: the body is no utf-8"),
        ({"compression": "zstd"}, "compression: 'zstd'"),
        ({"compression": "gzip", "body": "hello"}, "compression: the body is no gzip"),
        ({"body": "[" * 100_000}, "job: the message's body is nested too deep"),
        ({"body": "{}," * 200_000}, "job: 200000 objects and lists in the message, the limit is 100000"),
        ({"body": "9" * 5_000}, "job: the message's body is no JSON"),
        ({"body": " " * (MAX_BODY_BYTES + 1)}, f"job: {MAX_BODY_BYTES + 1} bytes"),
        ({"problem": "job: no JSON"}, "job: no JSON"),
    ],
)
def test_a_body_that_cannot_be_read_names_the_part_that_is_at_fault(values: dict[str, object], said: str) -> None:
    message = read_message(replace(ENTRY, **values))  # type: ignore[arg-type]
    assert str(message.problem).startswith(said)
    assert (message.job_id, message.fields) == ("1234", {})


@pytest.mark.parametrize("charset", [None, "utf-8", "UTF8", "us-ascii", "binary", "utf-16", "latin-1"])
def test_a_compressed_body_in_a_usual_charset_is_read(charset: str | None) -> None:
    text = json.dumps([[], {"question": "hello"}, {}]).encode(charset if charset not in (None, "binary") else "utf-8")
    body = base64.b64encode(zlib.compress(text)).decode()
    message = read_message(
        replace(ENTRY, body=body, body_encoding="base64", compression="gzip", content_encoding=charset)
    )
    assert (message.fields, message.problem) == ({"question": "hello"}, None)


def test_a_bomb_is_refused_with_the_limit() -> None:
    bomb = base64.b64encode(zlib.compress(bytes(50_000_000))).decode()
    message = read_message(replace(ENTRY, body=bomb, body_encoding="base64", compression="gzip"))
    assert message.problem == f"compression: the body inflates to more than {MAX_BODY_BYTES} bytes"


@pytest.mark.parametrize("text", ["[" * (MAX_CONTAINERS + 1), '"{' * MAX_CONTAINERS + "\\"])
def test_brackets_within_a_text_are_no_lists(text: str) -> None:
    assert read([[], {"question": text}]).fields == {"question": text}


def test_a_body_of_very_many_lists_is_refused_with_the_limit() -> None:
    message = read([[], {"metadata": [[]] * MAX_CONTAINERS}])
    assert f"{MAX_CONTAINERS + 4} objects and lists" in str(message.problem)
    assert f"the limit is {MAX_CONTAINERS}" in str(message.problem)
