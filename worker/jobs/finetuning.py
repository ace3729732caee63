"""One fine-tuning job from claim to finish: check what it may use, train, finish.

In: a claim. Out: exactly one of: a final state in the ledger, a give-back, or nothing (the lease was lost and another
worker owns the job). Every committed checkpoint is recorded in the ledger, so that a lost worker costs no life of a job
that makes progress. Knows no Celery, no storage and no trainer: `train` is worker.training's run.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import redis

from api_stub.contract.error import MAX_DETAILS, ErrorCode, ErrorDetail, ErrorInfo, InvalidJob
from api_stub.contract.event import (
    CancelledBody,
    CompletedBody,
    FailedBody,
    FinalBody,
    ProgressBody,
    RetryReason,
    Stage,
)
from api_stub.contract.finetune import FinetuneJob, FinetuneResult
from api_stub.contract.job import parse_job
from api_stub.contract.result import FinishReason, Result, Timings, Usage
from api_stub.ledger.ledger import Ledger
from worker.errors import CannotStart, InvalidRequest, ModelMismatch, OutOfMemory, WorkerError
from worker.jobs.attempt import Attempt, Attempts, Stopwatch
from worker.jobs.attempt import StopReason as AttemptStop
from worker.jobs.claim import ClaimedJob
from worker.jobs.metering import JobMeter
from worker.jobs.outcome import MAX_RETRIES, GiveBack, as_worker_error, retried_or_failed
from worker.jobs.settle import EventPublisher, Settler, facts_of
from worker.jobs.training_places import TrainingPlaces
from worker.media.collect import job_directory
from worker.observability.logging import job_context
from worker.streaming.output import AttemptOutput, Outgoing
from worker.training.example import DatasetBroken
from worker.training.progress import AskStop, Progress, ReportCommit, ReportProgress, Stopped, StopReason

logger = logging.getLogger(__name__)

#: Least time between two `job.progress` of one attempt.
PROGRESS_S: Final = 5.0
#: Tries to record a checkpoint in the ledger, and the pause between them. Else a lost worker costs a life.
KEEP_TRIES: Final = 3
KEEP_PAUSE_S: Final = 1.0

_STOPS: Final = {
    AttemptStop.CANCELLED: StopReason.CANCELLED,
    AttemptStop.DEADLINE: StopReason.DEADLINE,
    AttemptStop.DRAINED: StopReason.DRAINING,
    AttemptStop.LOST: StopReason.LOST,
    AttemptStop.UNCONFIRMED: StopReason.LOST,  # soon another worker may own the job: nothing may be written any more
}


class Train(Protocol):
    """Runs one training for an attempt of a job; all callbacks are called on the thread that calls it."""

    def __call__(
        self,
        job: FinetuneJob,
        *,
        job_id: str,
        fence: int,
        directory: Path,
        progress: ReportProgress,
        stop: AskStop,
        committed: ReportCommit,
    ) -> FinetuneResult: ...


class FinetunePipeline:
    """Runs claimed fine-tuning jobs, each in the thread that calls `run`.

    is_draining: the process is about to end; a training then stops at its next step, whatever the drain's length.
    """

    def __init__(
        self,
        *,
        model: str,
        ledger: Ledger,
        attempts: Attempts,
        publisher: EventPublisher,
        meter: JobMeter,
        places: TrainingPlaces,
        train: Train,
        is_draining: Callable[[], bool],
        max_retries: int = MAX_RETRIES,
    ) -> None:
        self._model = model
        self._ledger = ledger
        self._attempts = attempts
        self._publisher = publisher
        self._meter = meter
        self._places = places
        self._train = train
        self._is_draining = is_draining
        self._max_retries = max_retries
        self._settler = Settler(ledger, attempts, publisher)

    def run(self, claimed: ClaimedJob) -> None:
        """Bring one claimed job to its end. Raises only what no job may survive (KeyboardInterrupt and the like)."""
        with job_context(claimed.claim.job_id, claimed.claim.attempt):
            attempt = Attempt(claimed.claim)
            output = self._publisher.open(attempt.request_id, attempt.stream)
            watch = Stopwatch(claimed.claim.queued_s, claimed.claim.age_s)
            logger.info("job started", extra=facts_of(attempt))
            self._meter.begins(attempt)
            self._attempts.add(attempt)
            try:
                body = self._ending(attempt, claimed.problem, output, watch)
                outcome = self._settler.settle(attempt, body, has_unsent=True)
            finally:
                self._attempts.remove(attempt)
                self._publisher.close(output)
            self._meter.ends(attempt, body, outcome, watch)
            facts = {"outcome": outcome, "total_s": round(watch.total_s, 4)}
            logger.info("job ended", extra=facts_of(attempt) | facts)

    def _ending(
        self, attempt: Attempt, problem: str | None, output: AttemptOutput, watch: Stopwatch
    ) -> FinalBody | GiveBack | None:
        """Return how the job ends: a final body, a give-back, or None when it is no longer ours."""
        try:
            job = self._read(attempt, problem)
            with watch.generate:
                result = self._trained(attempt, self._places.resolved(job))
            return CompletedBody(result=self._result(attempt, job, result, watch))
        except Stopped as stopped:
            return _stopped_body(stopped, attempt)
        except DatasetBroken as error:
            return FailedBody(error=_findings(error))
        except CannotStart as error:
            return FailedBody(error=ErrorInfo.of(ErrorCode.INVALID_REQUEST, f"base: {error}"))
        except Exception as error:  # noqa: BLE001 - whatever it is, the job has an end
            return retried_or_failed(attempt.claim, _as_worker_error(error), output, Usage(), self._max_retries)

    def _read(self, attempt: Attempt, problem: str | None) -> FinetuneJob:
        if problem is not None or not attempt.claim.body:
            raise InvalidRequest(problem or "job: the message was no valid job")
        try:
            job = parse_job(attempt.claim.body)
        except InvalidJob as error:
            raise InvalidRequest(str(error)) from error
        if not isinstance(job, FinetuneJob):
            raise ModelMismatch(f"model: the job says {job.model!r}, its queue serves {self._model!r}")
        return job

    def _trained(self, attempt: Attempt, job: FinetuneJob) -> FinetuneResult:
        self._put(attempt, ProgressBody(stage=Stage.PREPARING, done=0, total=0))
        with job_directory() as directory:
            return self._train(
                job,
                job_id=attempt.claim.job_id,
                fence=attempt.claim.fence,
                directory=directory,
                progress=ProgressFeed(lambda body: self._put(attempt, body)),
                stop=lambda: self._stop_of(attempt),
                committed=lambda step, uri: self._keep(attempt, step, uri),
            )

    def _stop_of(self, attempt: Attempt) -> StopReason | None:
        reason = attempt.stop_reason
        if reason is not None:
            return _STOPS[reason]
        return StopReason.DRAINING if self._is_draining() else None

    def _keep(self, attempt: Attempt, step: int, uri: str) -> None:
        """Tell the ledger of a checkpoint; an attempt that has lost its job is stopped."""
        facts = facts_of(attempt) | {"step": step, "uri": uri}
        for number in range(1, KEEP_TRIES + 1):
            try:
                is_ours = self._ledger.keep(attempt.claim.job_id, attempt.claim.fence, step)
            except redis.RedisError as error:
                logger.warning("checkpoint not announced", extra=facts | {"error": type(error).__name__})
                if number < KEEP_TRIES:
                    time.sleep(KEEP_PAUSE_S)
            else:
                logger.info("checkpoint committed", extra=facts)
                if not is_ours:
                    attempt.stop(AttemptStop.LOST)
                return

    def _result(self, attempt: Attempt, job: FinetuneJob, result: FinetuneResult, watch: Stopwatch) -> Result:
        claim = attempt.claim
        return Result(
            job_id=claim.job_id,
            task=job.task,
            model=job.model,
            text="",
            finish_reason=FinishReason.STOP,
            usage=Usage(),
            timings=Timings(
                queued_s=round(claim.queued_s, 6),
                generate_s=round(watch.generate.seconds, 6),
                total_s=round(watch.total_s, 6),
            ),
            attempt=claim.attempt,
            metadata=job.metadata,
            output_uri=result.output_uri,
            checkpoint=result.checkpoint,
            metrics=finite(result.metrics),
            steps=result.steps,
        )

    def _put(self, attempt: Attempt, body: ProgressBody) -> None:
        self._publisher.put(Outgoing(attempt.stream, body))


class ProgressFeed:
    """Passes progress on as events: the first at once, then one per `PROGRESS_S`; what comes between is dropped.

    Nothing is lost of what a reader needs: a step's figures are superseded by the next ones, an evaluation's stay.
    """

    def __init__(self, put: Callable[[ProgressBody], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._put, self._clock = put, clock
        self._next_at = -math.inf

    def __call__(self, progress: Progress) -> None:
        now = self._clock()
        if now < self._next_at:
            return
        self._next_at = now + PROGRESS_S
        figures = {
            "loss": progress.loss,
            "learning_rate": progress.learning_rate,
            "examples_per_s": progress.examples_per_s,
            "eta_s": progress.eta_s,
        }
        scores = {"validation_loss" if name == "loss" else name: value for name, value in progress.metrics.items()}
        metrics = finite({name: value for name, value in figures.items() if value is not None} | scores)
        self._put(ProgressBody(stage=Stage.TRAINING, done=progress.step, total=progress.max_steps, metrics=metrics))


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Return the figures that JSON can hold."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _stopped_body(stopped: Stopped, attempt: Attempt) -> FinalBody | GiveBack | None:
    """Return the outcome of a stopped training; None when another worker owns the job."""
    where = f"; a retry goes on from {stopped.checkpoint}" if stopped.checkpoint else ""
    match stopped.reason:
        case StopReason.CANCELLED:
            return CancelledBody(error=ErrorInfo.of(ErrorCode.CANCELLED, f"cancelled while training{where}"))
        case StopReason.DEADLINE:
            words = f"the job's deadline passed while it was training{where}"
            return FailedBody(error=ErrorInfo.of(ErrorCode.DEADLINE_EXCEEDED, words))
        case StopReason.DRAINING:
            return GiveBack(RetryReason.GIVEN_BACK)
        case StopReason.LOST:
            return GiveBack(RetryReason.GIVEN_BACK) if attempt.stop_reason is AttemptStop.UNCONFIRMED else None


def _findings(error: DatasetBroken) -> ErrorInfo:
    """Say how many faults a data set has, the first one, and up to MAX_DETAILS in `details`."""
    findings = error.findings
    counted = f"{len(findings)} findings, the first: " if len(findings) > 1 else ""
    message = f"dataset: {counted}{findings[0]}" if findings else str(error)
    details = [ErrorDetail(file=one.file, line=one.line, message=one.message) for one in findings[:MAX_DETAILS]]
    return ErrorInfo.of(ErrorCode.INVALID_REQUEST, message).model_copy(update={"details": tuple(details)})


def _as_worker_error(error: Exception) -> WorkerError:
    if not isinstance(error, WorkerError) and _is_out_of_memory(error):
        logger.warning("training did not fit into memory", extra={"action": "job"}, exc_info=error)
        return OutOfMemory("training did not fit into the device's memory; try a smaller batch_size")
    return as_worker_error(error)


def _is_out_of_memory(error: Exception) -> bool:
    # PyTorch's CPU allocator raises a plain RuntimeError; its own class is named so in every back end.
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
