"""A fine-tuning job from claim to finish. Redis, ledger and publisher are real; the training is a short stand-in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from api_stub.contract import names
from api_stub.contract.error import ErrorCode
from api_stub.contract.event import JobProgress, Stage, parse_event
from api_stub.contract.finetune import FinetuneJob, FinetuneResult
from api_stub.contract.job import VqaJob
from api_stub.contract.status import JobStatus
from api_stub.contract.view import JobView
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Claim
from api_stub.ledger.settings import LedgerConfig
from tests.unit.api_stub.ledger_kit import claimed
from worker.errors import CannotStart, StorageUnavailable
from worker.jobs.attempt import Attempts
from worker.jobs.attempt import StopReason as AttemptStop
from worker.jobs.claim import ClaimedJob
from worker.jobs.finetuning import PROGRESS_S, FinetunePipeline, ProgressFeed
from worker.jobs.metering import JobMeter
from worker.jobs.training_places import TrainingPlaces
from worker.models.source import SHIPPED
from worker.observability.metrics import Metrics
from worker.settings import WorkerSettings
from worker.streaming.publisher import Publisher
from worker.streaming.token_meter import TokenMeter
from worker.training.example import DatasetBroken, Finding
from worker.training.progress import AskStop, Progress, ReportCommit, ReportProgress, Stopped

OUTPUT = "s3://media/training/run/"
JOB = FinetuneJob(base="demo", dataset="s3://media/data/", output=OUTPUT, metadata={"order": 7})
CHECKPOINT = OUTPUT + "checkpoint-2/"
PLACES = TrainingPlaces({"demo": "demo", "mine": "/srv/mine"}, frozenset({"media"}), "s3://models/training/")


@dataclass
class StandIn:
    """Makes up to three steps, each with progress, the second with a checkpoint. `meanwhile` happens before a step."""

    meanwhile: Callable[[int], None] = lambda step: None
    error: Exception | None = None
    job: FinetuneJob | None = None
    fences: list[int] = field(default_factory=list)
    directory: Path | None = None

    def __call__(
        self, job: FinetuneJob, *, job_id: str, fence: int, directory: Path, progress: ReportProgress, stop: AskStop,
        committed: ReportCommit,
    ) -> FinetuneResult:  # fmt: skip
        assert directory.is_dir()
        self.job, self.directory = job, directory
        self.fences.append(fence)
        if self.error is not None:
            raise self.error
        checkpoint = None
        for step in (1, 2, 3):
            self.meanwhile(step)
            progress(Progress(step, 3, loss=1.0 / step, eta_s=math.inf, metrics={"loss": 2.0, "wer": 0.5}))
            if step == 2:
                checkpoint = CHECKPOINT
                committed(step, CHECKPOINT)
            if (reason := stop()) is not None:
                raise Stopped(reason, checkpoint)
        return FinetuneResult(output_uri=OUTPUT, checkpoint="ab" * 32, metrics={"wer": 0.25}, steps=3)


class Trainer:
    """The pipeline and what it is built of."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.train, self.attempts, self.is_draining = ledger, StandIn(), Attempts(), False
        metrics = Metrics("training")
        self.publisher = Publisher(ledger, TokenMeter(metrics))
        self.pipeline = FinetunePipeline(
            model="training", ledger=ledger, attempts=self.attempts, publisher=self.publisher, meter=JobMeter(metrics),
            places=PLACES, train=self.train, is_draining=lambda: self.is_draining, max_retries=1,
        )  # fmt: skip

    def run(self, job: FinetuneJob | VqaJob = JOB, job_id: str = "job-1") -> JobView:
        """Submit, claim and run a job; return what became of it."""
        self.ledger.submit(job_id, job)
        return self.run_claimed(claimed(self.ledger, job_id))

    def run_claimed(self, claim: Claim, problem: str | None = None) -> JobView:
        self.pipeline.run(ClaimedJob(claim, problem))
        assert len(self.attempts) == 0
        assert self.train.directory is None or not self.train.directory.exists()
        view = self.ledger.view(claim.job_id)
        assert view is not None
        return view

    def stop(self, reason: AttemptStop, at: int = 3) -> Callable[[int], None]:
        """Return what stops the running attempt before a step."""

        def stop(step: int) -> None:
            for attempt in self.attempts.held():
                if step == at:
                    attempt.stop(reason)

        return stop

    def kept(self) -> str | None:
        return self.ledger.client.hget(names.job_key("job-1"), "kept")


@pytest.fixture
def ledger(redis_url: str) -> Iterator[Ledger]:
    with closing(Ledger.connect(redis_url, LedgerConfig())) as made:
        yield made


@pytest.fixture
def trainer(ledger: Ledger) -> Iterator[Trainer]:
    made = Trainer(ledger)
    made.publisher.start()
    yield made
    made.publisher.stop(10)


def test_a_training_leaves_its_result_its_progress_and_its_step(trainer: Trainer) -> None:
    view = trainer.run(JOB.model_copy(update={"base": "mine"}))
    assert view.status is JobStatus.COMPLETED
    assert view.result is not None
    assert (view.result.output_uri, view.result.checkpoint, view.result.steps) == (OUTPUT, "ab" * 32, 3)
    assert (view.result.metrics, view.result.metadata) == ({"wer": 0.25}, {"order": 7})
    assert trainer.train.job is not None
    assert trainer.train.job.base == "/srv/mine"
    assert trainer.kept() == "2"
    events = [parse_event(raw) for raw in trainer.ledger.replay("job-1").events]
    progress = [event for event in events if isinstance(event, JobProgress)]
    assert [(event.stage, event.done, event.total) for event in progress] == [
        (Stage.PREPARING, 0, 0), (Stage.TRAINING, 1, 3)
    ]  # fmt: skip
    figures = {"loss": 1.0, "learning_rate": 0.0, "examples_per_s": 0.0}
    assert progress[1].metrics == figures | {"validation_loss": 2.0, "wer": 0.5}


def test_progress_comes_at_most_once_in_five_seconds() -> None:
    now, told = 0.0, []
    feed = ProgressFeed(lambda body: told.append(body.done), clock=lambda: now)
    for step in range(1, 102):
        feed(Progress(step, 200))
        now += PROGRESS_S / 10
    assert told == list(range(1, 102, 10))


def test_a_broken_data_set_is_refused_with_its_findings(trainer: Trainer) -> None:
    trainer.train.error = DatasetBroken([Finding("metadata.jsonl", line, "text: empty") for line in range(1, 151)])
    view = trainer.run()
    assert view.status is JobStatus.FAILED
    assert view.error is not None
    assert (view.error.code, view.error.retryable) == (ErrorCode.INVALID_REQUEST, False)
    assert view.error.message == "dataset: 150 findings, the first: metadata.jsonl:1: text: empty"
    assert view.error.details is not None
    assert [(one.file, one.line) for one in view.error.details] == [("metadata.jsonl", n) for n in range(1, 101)]


def test_a_base_that_cannot_be_loaded_fails_the_job_at_once(trainer: Trainer) -> None:
    trainer.train.error = CannotStart("no config.json in it")
    view = trainer.run()
    assert view.error is not None
    assert (view.error.code, view.error.message) == (ErrorCode.INVALID_REQUEST, "base: no config.json in it")


@pytest.mark.parametrize(
    ("reason", "status", "code"),
    [
        (AttemptStop.CANCELLED, JobStatus.CANCELLED, "cancelled"),
        (AttemptStop.DEADLINE, JobStatus.FAILED, "deadline_exceeded"),
    ],
)
def test_a_stopped_training_says_where_a_retry_goes_on(
    trainer: Trainer, reason: AttemptStop, status: JobStatus, code: str
) -> None:
    trainer.train.meanwhile = trainer.stop(reason)
    view = trainer.run()
    assert view.status is status
    assert view.error is not None
    assert view.error.code == code
    assert view.error.message.endswith(f"; a retry goes on from {CHECKPOINT}")


def test_a_cancel_before_the_first_checkpoint_promises_none(trainer: Trainer) -> None:
    trainer.train.meanwhile = lambda step: (
        [attempt.stop(AttemptStop.CANCELLED) for attempt in trainer.attempts.held()] and None
    )
    view = trainer.run()
    assert view.error is not None
    assert view.error.message == "cancelled while training"


def test_a_draining_trainer_gives_its_job_back_and_another_goes_on(trainer: Trainer) -> None:
    trainer.is_draining = True
    assert trainer.run().status is JobStatus.QUEUED
    trainer.is_draining = False
    view = trainer.run_claimed(claimed(trainer.ledger, "job-1", "worker-2"))
    assert (view.status, view.attempt) == (JobStatus.COMPLETED, 2)
    assert trainer.train.fences[0] < trainer.train.fences[1]


def test_who_has_lost_the_job_writes_nothing_more(trainer: Trainer) -> None:
    steps: list[int] = []

    def lose(step: int) -> None:
        steps.append(step)
        if step == 2:  # another worker has it when the checkpoint is told
            trainer.ledger.client.hset(names.job_key("job-1"), "fence", "999")

    trainer.train.meanwhile = lose
    assert trainer.run().status is JobStatus.IN_PROGRESS
    assert trainer.kept() is None
    assert steps == [1, 2]  # stopped right behind the checkpoint


def test_faulty_storage_sends_the_job_back_then_fails_it(trainer: Trainer) -> None:
    trainer.train.error = StorageUnavailable("storage answered 503")
    assert trainer.run().status is JobStatus.QUEUED
    trainer.ledger.client.hdel(names.job_key("job-1"), "not_before")
    view = trainer.run_claimed(claimed(trainer.ledger, "job-1"))
    assert view.error is not None
    assert view.error.code is ErrorCode.STORAGE_UNAVAILABLE


def test_a_job_for_a_model_is_not_trained(trainer: Trainer) -> None:
    view = trainer.run(VqaJob(question="Why?"))
    assert view.error is not None
    assert view.error.code is ErrorCode.MODEL_MISMATCH
    assert trainer.train.fences == []


REFUSED = {
    "base: 'other' is no model that this trainer knows; it knows demo, mine": {"base": "other"},
    "base: not below s3://models/training/": {"base": "s3://media/training/run/checkpoint-2/"},
    "dataset: the bucket 'private' is not among": {"dataset": "s3://private/data/"},
    "output: the bucket 'private' is not among": {"output": "s3://private/training/"},
    "options.resume: not below s3://models/training/": {"options": {"resume": "s3://models/trainings/run/"}},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_job_may_not_use_is_refused_before_anything_is_read(trainer: Trainer, words: str) -> None:
    view = trainer.run(FinetuneJob.model_validate(JOB.model_dump(exclude_none=True) | REFUSED[words]))
    assert view.error is not None
    assert view.error.code is ErrorCode.INVALID_REQUEST
    assert view.error.message.startswith(words)
    assert trainer.train.fences == []


def test_a_checkpoint_below_the_prefix_is_a_base_and_an_output(trainer: Trainer) -> None:
    places = {"base": "s3://models/training/a/", "output": "s3://models/training/b/"}
    assert (
        trainer.run(FinetuneJob.model_validate(JOB.model_dump(exclude_none=True) | places)).status
        is JobStatus.COMPLETED
    )


def test_the_checkpoints_that_ship_are_bases_by_their_names() -> None:
    places = TrainingPlaces.of(WorkerSettings(model="/srv/mine", model_name="mine"))
    assert places.bases == {name: name for name in SHIPPED} | {"mine": "/srv/mine"}
