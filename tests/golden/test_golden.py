"""The wire format as files: what is written today must be what was agreed, and what was agreed must still be read."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator

from api_stub.contract.error import ErrorInfo, InvalidJob
from api_stub.contract.event import parse_event
from api_stub.contract.job import parse_job
from api_stub.contract.result import Result
from api_stub.contract.schema import NAMES, schemas
from api_stub.contract.view import JobView
from api_stub.contract.wire import WireModel
from tests.golden.samples import DIRECTORY, SAMPLES, golden_file

KINDS = {"job": parse_job, "event": parse_event, "result": Result.model_validate_json,
         "error": ErrorInfo.model_validate_json, "view": JobView.model_validate_json}  # fmt: skip


def kind_of(name: str) -> str:
    """`event_delta` is an `event`."""
    return name.partition("_")[0]


def read(name: str) -> WireModel:
    value = KINDS[kind_of(name)](golden_file(name).read_text(encoding="utf-8"))
    assert isinstance(value, WireModel)
    return value


@pytest.mark.parametrize("name", SAMPLES)
def test_todays_json_is_the_agreed_json(name: str) -> None:
    assert SAMPLES[name].to_json() + "\n" == golden_file(name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SAMPLES)
def test_agreed_json_is_still_read_without_loss(name: str) -> None:
    value = read(name)
    assert value == SAMPLES[name]
    assert value.to_json() + "\n" == golden_file(name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SAMPLES)
def test_agreed_json_fits_the_exported_schema(name: str) -> None:
    validator = Draft202012Validator(schemas()[kind_of(name)])
    assert list(validator.iter_errors(json.loads(golden_file(name).read_text(encoding="utf-8")))) == []


def with_more(value: object) -> object:
    """Return JSON with a field more in every object that is no table of names."""
    if isinstance(value, dict):
        return {name: each if name in ("metadata", "metrics") else with_more(each) for name, each in value.items()} | {
            "new": [1]
        }
    return [with_more(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", [name for name in SAMPLES if kind_of(name) != "job"])
def test_readers_ignore_fields_that_a_later_release_adds(name: str) -> None:
    later = json.dumps(with_more(json.loads(golden_file(name).read_text(encoding="utf-8"))))
    assert KINDS[kind_of(name)](later) == SAMPLES[name]


@pytest.mark.parametrize("name", [name for name in SAMPLES if kind_of(name) == "job"])
def test_a_field_that_nobody_knows_makes_a_job_invalid(name: str) -> None:
    with pytest.raises(InvalidJob, match="new"):
        parse_job(golden_file(name).read_text(encoding="utf-8").rstrip("}\n") + ', "new": 1}')


def test_every_golden_file_has_a_sample_and_every_kind_a_file() -> None:
    names = {path.stem for path in DIRECTORY.glob("*.json")}
    assert names == set(SAMPLES)
    assert {kind_of(name) for name in names} == set(KINDS) == set(NAMES)


def test_every_type_of_event_has_a_golden_file() -> None:
    schema = schemas()["event"]
    discriminator = schema["discriminator"]
    assert isinstance(discriminator, dict)
    mapping = discriminator["mapping"]
    assert isinstance(mapping, dict)
    written = {json.loads(path.read_text(encoding="utf-8"))["type"] for path in DIRECTORY.glob("event_*.json")}
    assert written == set(mapping)
