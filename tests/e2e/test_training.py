"""A fine-tuning job on a real trainer: it is cancelled amid its steps, and a retry goes on from its checkpoint."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from celery import Celery
from PIL import Image

from api_stub.client.client import Client
from api_stub.client.handle import JobHandle
from api_stub.contract import names
from api_stub.contract.event import JobProgress, JobStarted, Stage
from api_stub.errors import JobFailed
from tests.processes import WorkerProcess
from tests.servers import RedisServer, S3Server, eventually

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
STEPS, EVAL_EVERY = 60, 20
WAIT_S = 150.0


class Trainer(WorkerProcess):
    """`visionq-worker start --training`."""

    options = ("--training",)


@pytest.fixture(scope="module")
def trainer(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Callable[[str], Path],
    redis_server: RedisServer,
    s3_server: S3Server,
) -> Iterator[Trainer]:
    with redis_server.client() as client:
        client.flushall()
    running = Trainer(
        tmp_path_factory.mktemp("trainer"), redis_server.url, s3_server.url, device="cpu",
        training_bases=f"tiny={tiny_checkpoint('git')}",
    )  # fmt: skip
    yield running
    running.kill()


def data_set(s3: S3Client, prefix: str) -> str:
    """Store a few plain pictures with captions; return the data set's URI."""
    rows = []
    for number in range(12):
        name, colour = list(COLOURS.items())[number % 2]
        file = io.BytesIO()
        Image.new("RGB", (32, 32), colour).save(file, "PNG")
        s3.put_object(Bucket="media", Key=f"{prefix}/{number}.png", Body=file.getvalue())
        rows.append({"file_name": f"{number}.png", "text": name, "split": "validation" if number < 2 else "train"})
    lines = "\n".join(json.dumps(row) for row in rows)
    s3.put_object(Bucket="media", Key=f"{prefix}/metadata.jsonl", Body=lines.encode())
    return f"s3://media/{prefix}/"


def steps_of(job: JobHandle) -> list[int]:
    """The steps that a finished job has told of."""
    events = job.events(timeout=WAIT_S)
    return [event.done for event in events if isinstance(event, JobProgress) and event.stage is Stage.TRAINING]


def test_a_cancelled_training_leaves_a_checkpoint_from_which_a_retry_goes_on(
    trainer: Trainer, redis_server: RedisServer, s3_server: S3Server
) -> None:
    s3, output = s3_server.client(), "s3://media/training/colours/"
    with Client(redis_server.url) as client, redis_server.client() as reader:
        job = client.finetune(
            "tiny", dataset=data_set(s3, "colours"), output=output, max_steps=STEPS, batch_size=2,
            gradient_accumulation=1, eval_every=EVAL_EVERY, eval_examples=2, max_new_tokens=4, seed=1,
        )  # fmt: skip
        trainer.wait_ready()
        eventually(
            lambda: reader.hget(names.job_key(job.id), "kept"), WAIT_S, f"a checkpoint:\n{trainer.text()[-4000:]}"
        )
        job.cancel()
        with pytest.raises(JobFailed, match=rf"a retry goes on from {output}checkpoint-\d+/") as cancelled:
            job.result(timeout=WAIT_S)
        assert cancelled.value.code == "cancelled"
        again = client.retry(job.id)
        result = again.result(timeout=WAIT_S)
        assert (result.steps, result.model) == (STEPS, "training")
        assert (result.output_uri or "").startswith(f"{output}checkpoint-")  # the best one
        manifest = f"{(result.output_uri or '').removeprefix('s3://media/')}manifest.json"
        assert result.checkpoint in s3.get_object(Bucket="media", Key=manifest)["Body"].read().decode()
        assert "wer" in (result.metrics or {})
        assert any(isinstance(event, JobStarted) for event in again.events(timeout=WAIT_S))
        assert min(steps_of(job)) < EVAL_EVERY < min(steps_of(again))
    latest = json.loads(s3.get_object(Bucket="media", Key="training/colours/latest.json")["Body"].read())
    assert f"checkpoint-{STEPS}" in json.dumps(latest)


def test_a_broken_data_set_is_reported_before_the_first_step(
    trainer: Trainer, redis_server: RedisServer, s3_server: S3Server
) -> None:
    s3 = s3_server.client()
    dataset = data_set(s3, "broken")
    s3.put_object(Bucket="media", Key="broken/3.png", Body=b"no picture")
    s3.delete_object(Bucket="media", Key="broken/5.png")
    trainer.wait_ready()
    with Client(redis_server.url) as client:
        job = client.finetune("tiny", dataset=dataset, output="s3://media/training/broken/", max_steps=2)
        with pytest.raises(JobFailed, match="invalid_request: dataset: 2 findings, the first: ") as failed:
            job.result(timeout=WAIT_S)
        assert [(found.line, found.file) for found in failed.value.details]
        assert {found.line for found in failed.value.details} == {4, 6}
        assert steps_of(job) == []


def test_a_plain_celery_producer_has_a_model_fine_tuned(
    trainer: Trainer, redis_server: RedisServer, s3_server: S3Server
) -> None:
    """With Celery alone; what is wrong with a message is said by its field."""
    dataset = data_set(s3_server.client(), "plain")
    trainer.wait_ready()
    celery = Celery("anyone", broker=redis_server.url, backend=redis_server.url, set_as_current=False)
    asked = {"base": "tiny", "dataset": dataset, "output": "s3://media/training/plain/"}
    options = {"max_steps": 2, "batch_size": 2, "gradient_accumulation": 1, "eval_examples": 2, "max_new_tokens": 4}
    try:
        wrong = celery.send_task(
            "visionq.finetune", kwargs=asked | {"options": {"max_steps": 0}}, queue="visionq.training"
        )
        with pytest.raises(Exception, match=r"options\.max_steps: .*greater than or equal to 1"):
            wrong.get(timeout=WAIT_S)
        nowhere = celery.send_task(
            "visionq.finetune", kwargs=asked | {"output": "s3://elsewhere/x/"}, queue="visionq.training"
        )
        with pytest.raises(Exception, match="elsewhere"):
            nowhere.get(timeout=WAIT_S)
        right = celery.send_task("visionq.finetune", kwargs=asked | {"options": options}, queue="visionq.training")
        result = right.get(timeout=WAIT_S)
    finally:
        celery.close()
    assert (result["steps"], result["model"], result["text"]) == (2, "training", "")
    assert result["output_uri"] == "s3://media/training/plain/checkpoint-2/"
