"""Reading messages of any make."""

from __future__ import annotations

import pytest

from api_stub.contract import names
from api_stub.contract.job import TaskName
from worker.knock import Knock, read_knock

HEADERS = {"id": "1234", "task": "visionq.vqa"}


def read(body: object, **headers: object) -> Knock | None:
    return read_knock(TaskName.VQA, HEADERS | headers, {"priority": 3}, body)


def test_a_doorbell_is_told_by_its_header_alone() -> None:
    knock = read([[], {}, {}], **{names.DOORBELL_HEADER: 1})
    assert knock == Knock("1234", TaskName.VQA, 3, None)


def test_kwargs_become_the_fields() -> None:
    knock = read(([], {"question": "hello", "self": 1}, {}))
    assert knock is not None
    assert (knock.fields, knock.problem) == ({"question": "hello", "self": 1}, None)


def test_a_message_of_protocol_1_carries_its_id_in_the_body() -> None:
    knock = read_knock(
        TaskName.VQA, {}, {}, {"id": "v1", "task": "visionq.vqa", "args": [], "kwargs": {"question": "x"}}
    )
    assert knock == Knock("v1", TaskName.VQA, 0, {"question": "x"})


@pytest.mark.parametrize("body", [None, [], ["x"], "x", [[], None], [[], []], [None, {}], [[1], {}], ValueError("x")])
def test_what_is_no_job_says_why(body: object) -> None:
    knock = read(body)
    assert knock is not None
    assert knock.problem
    assert knock.fields == {}


@pytest.mark.parametrize("job_id", [None, "", True, 1.5, {}, "a" * 256, "a\nb", "a\ud800"])
def test_an_id_that_cannot_be_a_key_is_none(job_id: object) -> None:
    assert read([[], {}], id=job_id) is None


@pytest.mark.parametrize(("priority", "read_as"), [(6, 6), (99, 9), (-1, 0), ("high", 0), (None, 0)])
def test_priorities_are_bounded(priority: object, read_as: int) -> None:
    knock = read_knock(TaskName.VQA, HEADERS, {"priority": priority}, [[], {}])
    assert knock is not None
    assert knock.priority == read_as


def test_a_knock_survives_json() -> None:
    knock = Knock("1234", TaskName.CAPTION, 6, {"media": ["s3://media/ä.png"], "x": None, "y": "\ud800"}, "a problem")
    assert Knock.from_json(knock.to_json()) == knock
