"""What the ledger does for training alone: checkpoints keep lives, streams stay short. On a real Redis."""

from __future__ import annotations

import pytest
import redis

from api_stub.contract import names
from api_stub.contract.error import ErrorCode
from api_stub.contract.event import JobProgress, ProgressBody, Stage, parse_event
from api_stub.contract.job import FinetuneJob
from api_stub.contract.status import JobStatus
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Claim, Publication
from api_stub.ledger.settings import LedgerConfig
from tests.unit.api_stub.ledger_kit import answer, claimed, failure, lose

JOB = FinetuneJob(base="demo", dataset="s3://media/data/", output="s3://media/training/run/")
#: Of the ledger that the fixture makes.
MAX_ATTEMPTS = LedgerConfig().max_attempts


def training(ledger: Ledger, job_id: str = "job-1") -> Claim:
    ledger.submit(job_id, JOB)
    return claimed(ledger, job_id)


def lost(ledger: Ledger, client: redis.Redis, job_id: str = "job-1") -> None:
    lose(ledger, client, job_id)


def status(ledger: Ledger, job_id: str = "job-1") -> JobStatus:
    view = ledger.view(job_id)
    assert view is not None
    return view.status


def test_an_attempt_with_a_new_checkpoint_costs_no_life(ledger: Ledger, redis_client: redis.Redis) -> None:
    claim = training(ledger)
    for step in range(10, 10 * (MAX_ATTEMPTS + 2), 10):
        assert ledger.keep("job-1", claim.fence, step)
        lost(ledger, redis_client)
        assert status(ledger) is JobStatus.QUEUED
        claim = claimed(ledger, "job-1")
    assert claim.attempt == MAX_ATTEMPTS + 2


def test_losses_at_one_step_end_the_job(ledger: Ledger, redis_client: redis.Redis) -> None:
    claim = training(ledger)
    assert ledger.keep("job-1", claim.fence, 10)
    lost(ledger, redis_client)
    for _ in range(MAX_ATTEMPTS):
        assert status(ledger) is JobStatus.QUEUED
        claim = claimed(ledger, "job-1")
        assert ledger.keep("job-1", claim.fence, 10)  # the same checkpoint again is no progress
        lost(ledger, redis_client)
    view = ledger.view("job-1")
    assert view is not None
    assert view.error is not None
    assert view.error.code is ErrorCode.POISON_JOB
    assert "since its checkpoint at step 10" in view.error.message


def test_who_lost_the_job_keeps_nothing(ledger: Ledger, redis_client: redis.Redis) -> None:
    first = training(ledger)
    lost(ledger, redis_client)
    second = claimed(ledger, "job-1")
    assert not ledger.keep("job-1", first.fence, 10)
    assert not redis_client.hexists(names.job_key("job-1"), "kept")
    assert ledger.keep("job-1", second.fence, 10)


@pytest.mark.parametrize(("kept", "published"), [(5, 12), (5, 5), (1, 40)])
def test_the_stream_keeps_the_newest_progress_and_every_other_event(
    ledger: Ledger, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch, kept: int, published: int
) -> None:
    monkeypatch.setattr("api_stub.ledger.lua.MAX_TRAINING_EVENTS", kept)
    short = Ledger(ledger.client, ledger.config)
    claim = training(short)
    for step in range(1, published + 1):
        body = ProgressBody(stage=Stage.TRAINING, done=step, total=published, metrics={"loss": 1.5})
        assert short.publish([Publication("job-1", claim.fence, step, body)]) == (True,)
        assert short.publish([Publication("job-1", claim.fence, step, body)]) == (True,)  # its reply was lost
    assert short.keep("job-1", claim.fence, 10)
    assert short.keep("job-1", claim.fence, 10)
    short.finish("job-1", claim.fence, failure())
    events = [parse_event(raw["event"]) for _, raw in redis_client.xrange(names.events_key("job-1"))]
    progress = [event.done for event in events if isinstance(event, JobProgress)]
    assert progress == list(range(published - min(kept, published) + 1, published + 1))
    assert [event.type for event in events if not isinstance(event, JobProgress)] == [
        "job.queued", "job.started", "job.failed"
    ]  # fmt: skip
    assert [event.seq for event in events] == sorted(event.seq for event in events)


def test_other_progress_is_not_trimmed(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api_stub.ledger.lua.MAX_TRAINING_EVENTS", 1)
    short = Ledger(ledger.client, ledger.config)
    claim = training(short)
    for number in range(1, 5):
        short.publish([Publication("job-1", claim.fence, number, ProgressBody(stage=Stage.FETCHING, done=1, total=2))])
    assert short.keep("job-1", claim.fence, 10)
    assert len([raw for raw in short.replay("job-1").events if '"job.progress"' in raw]) == 4


def test_a_result_of_training_is_read_as_it_was_written(ledger: Ledger) -> None:
    claim = training(ledger)
    body = answer(claim, "")
    more = {"output_uri": JOB.output, "checkpoint": "ab" * 32, "metrics": {"wer": 0.05}, "steps": 30}
    ledger.finish("job-1", claim.fence, body.model_copy(update={"result": body.result.model_copy(update=more)}))
    view = ledger.view("job-1")
    assert view is not None
    assert view.result is not None
    assert (view.result.metrics, view.result.steps) == ({"wer": 0.05}, 30)
