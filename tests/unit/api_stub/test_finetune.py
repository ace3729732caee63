"""What fine-tuning may be asked for, and what a producer is told about a wrong request."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from api_stub.contract.finetune import FinetuneJob, Finetuning
from api_stub.contract.job import parse_job

GIVEN: dict[str, object] = {"base": "demo", "dataset": "s3://media/scenes", "output": "s3://media/training/a/run 1/"}
REFUSED: dict[str, dict[str, object]] = {
    "must be s3://bucket/prefix/, got no scheme": {"dataset": "/srv/scenes"},
    "must be s3://bucket/prefix/, got file://…": {"output": "file:///srv/out/"},
    "got a bucket without a prefix": {"output": "s3://media//"},
    "without ?versionId=…": {"dataset": "s3://media/scenes?versionId=1"},
    "an S3 key must have no segment '..'": {"output": "s3://media/training/../a/"},
    "must be s3://bucket/prefix/, got https://…": {"base": "https://host/model/"},
    "options.lora_rank: not with method full": {"options": {"lora_rank": 8}},
    "epochs: not beside max_steps": {"options": {"epochs": 2, "max_steps": 10}},
    "options.resume: must be s3://bucket/prefix/": {"options": {"resume": "checkpoint-20"}},
    "less than 4294967296": {"options": {"seed": 2**32}},
    "colour": {"colour": "red"},
}


def test_places_have_one_spelling() -> None:
    job = FinetuneJob.model_validate(GIVEN)
    assert (job.dataset, job.output) == ("s3://media/scenes/", "s3://media/training/a/run%201/")
    assert FinetuneJob.model_validate(GIVEN | {"base": "s3://media/training/a"}).base == "s3://media/training/a/"


@pytest.mark.parametrize("words", REFUSED)
def test_a_wrong_request_is_refused_with_the_field_and_the_limit(words: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        FinetuneJob.model_validate(GIVEN | REFUSED[words])
    assert words in str(refusal.value)


def test_a_folder_is_a_place_where_there_is_no_job() -> None:
    run = Finetuning(base="/srv/model", dataset="scenes", output="out")
    assert run.options.max_steps is None
    assert "options" in run.model_dump()


def test_what_is_absent_is_absent_from_the_json() -> None:
    assert '"options":{},' in FinetuneJob.model_validate(GIVEN).to_json()


def test_no_model_is_served_under_the_name_of_the_queue_of_fine_tuning() -> None:
    with pytest.raises(ValueError, match="'training' is the queue of fine-tuning"):
        parse_job({"task": "visionq.vqa", "question": "Why?", "model": "training"})
