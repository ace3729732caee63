"""The exported schemas refuse what the parser refuses."""

from __future__ import annotations

import pytest
from jsonschema import Draft202012Validator

from api_stub.contract.error import InvalidJob
from api_stub.contract.job import parse_job
from api_stub.contract.schema import DIALECT, schemas

BAD_JOBS = {
    "no task": {"question": "Why?"},
    "unknown task": {"task": "visionq.dance", "question": "Why?"},
    "unknown field": {"task": "visionq.vqa", "question": "Why?", "colour": "red"},
    "unknown sampling field": {"task": "visionq.vqa", "question": "Why?", "sampling": {"heat": 1}},
    "priority out of bounds": {"task": "visionq.vqa", "question": "Why?", "priority": 10},
    "five stop strings": {"task": "visionq.vqa", "question": "Why?", "sampling": {"stop": ["a", "b", "c", "d", "e"]}},
    "bad model name": {"task": "visionq.vqa", "question": "Why?", "model": "Not A Name"},
    "part without a type": {"task": "visionq.vqa", "messages": [{"role": "user", "content": [{"text": "hi"}]}]},
    "65 media": {"task": "visionq.vqa", "question": "Why?", "media": ["s3://media/a.png"] * 65},
}


@pytest.mark.parametrize("job", BAD_JOBS.values(), ids=BAD_JOBS)
def test_schema_and_parser_refuse_the_same_job(job: dict[str, object]) -> None:
    assert not Draft202012Validator(schemas()["job"]).is_valid(job)
    with pytest.raises(InvalidJob):
        parse_job(job)


@pytest.mark.parametrize("name", schemas())
def test_every_schema_is_a_valid_schema_with_a_name(name: str) -> None:
    schema = schemas()[name]
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == DIALECT
    assert schema["$id"] == f"urn:visionq:v1:{name}"


def test_an_event_without_its_tag_does_not_fit() -> None:
    event = {"v": 1, "job_id": "a", "seq": 1, "attempt": 0, "ts": 1.0, "model": "default", "priority": 6}
    validator = Draft202012Validator(schemas()["event"])
    assert not validator.is_valid(event)
    assert validator.is_valid(event | {"type": "job.queued"})
