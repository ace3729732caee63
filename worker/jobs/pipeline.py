"""One job from claim to finish: fetch → decode → prompt → generate → finish, one straight line.

In: a claim. Out: exactly one of: a final state in the ledger, a give-back, or nothing (the lease was lost and
another worker owns the job). Events go out through the publisher on the way. Knows no Celery.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from api_stub.contract.error import InvalidJob
from api_stub.contract.event import CompletedBody, FinalBody, ProgressBody, RetryReason, Stage
from api_stub.contract.job import DEFAULT_NUM_FRAMES, FinetuneJob, PromptJob, VideoQaJob, parse_job
from api_stub.contract.result import FinishReason, Result, Usage
from api_stub.ledger.ledger import Ledger
from worker.engine.request import Finish, GenerationRequest
from worker.errors import Component, EngineDead, GenerationFailed, InvalidRequest, ModelMismatch
from worker.jobs.attempt import Attempt, Attempts, Stopped, StopReason, Stopwatch
from worker.jobs.circuit import Circuit
from worker.jobs.claim import ClaimedJob
from worker.jobs.metering import JobMeter
from worker.jobs.outcome import (
    MAX_RETRIES,
    GiveBack,
    as_worker_error,
    outcome_while_circuit_is_open,
    retried_or_failed,
    stopped_body,
    used,
)
from worker.jobs.served import NotServedYet, Served
from worker.jobs.settle import FLUSH_TIMEOUT_S, EventPublisher, Settler, facts_of
from worker.media.budget import MemoryBudget
from worker.media.collect import AnyMediaPart, Collected, MediaCollector, media_parts
from worker.models.inputs import ModelInputs
from worker.observability.logging import job_context
from worker.prompting.prepare import PromptBuilder
from worker.streaming.output import AttemptOutput, Outgoing

logger = logging.getLogger(__name__)

NO_MEDIA: Final = Collected([], 0.0, 0)
#: How often a waiting job looks at its deadline and at the engine's health.
WAIT_S: Final = 0.5
#: Pause of a job whose adapter this worker does not serve yet.
NOT_YET_S: Final = 1.0


class GenerationEngine(Protocol):
    """What the pipeline needs of an engine."""

    @property
    def is_alive(self) -> bool: ...
    def submit(self, request: GenerationRequest) -> None: ...
    def cancel(self, request_id: str) -> None: ...


class Pipeline:
    """Runs claimed jobs, each in the thread that calls `run`. `on_engine_dead` is called when the process must end."""

    def __init__(
        self,
        *,
        served: Served,
        ledger: Ledger,
        attempts: Attempts,
        media: MediaCollector,
        memory_budget: MemoryBudget,
        prompts: PromptBuilder,
        engine: GenerationEngine,
        publisher: EventPublisher,
        meter: JobMeter,
        circuit: Circuit,
        on_engine_dead: Callable[[], None],
        max_retries: int = MAX_RETRIES,
    ) -> None:
        self._served = served
        self._settler = Settler(ledger, attempts, publisher)
        self._attempts = attempts
        self._media = media
        self._memory_budget = memory_budget
        self._prompts = prompts
        self._engine = engine
        self._publisher = publisher
        self._meter = meter
        self._circuit = circuit
        self._on_engine_dead = on_engine_dead
        self._max_retries = max_retries

    def run(self, claimed: ClaimedJob) -> None:
        """Bring one claimed job to its end. Raises only what no job may survive (KeyboardInterrupt and the like)."""
        with job_context(claimed.claim.job_id, claimed.claim.attempt):
            self._run(claimed)

    def _run(self, claimed: ClaimedJob) -> None:
        attempt = Attempt(claimed.claim)
        output = self._publisher.open(attempt.request_id, attempt.stream)
        watch = Stopwatch(claimed.claim.queued_s, claimed.claim.age_s)
        logger.info("job started", extra=facts_of(attempt))
        self._meter.begins(attempt)
        self._attempts.add(attempt)
        try:
            body = self._ending(attempt, claimed.problem, output, watch)
            outcome = self._settler.settle(attempt, body)
        finally:
            self._attempts.remove(attempt)
            self._publisher.close(output)
        self._meter.ends(attempt, body, outcome, watch)
        logger.info("job ended", extra=facts_of(attempt) | {"outcome": outcome, "total_s": round(watch.total_s, 4)})

    def _ending(
        self, attempt: Attempt, problem: str | None, output: AttemptOutput, watch: Stopwatch
    ) -> FinalBody | GiveBack | None:
        """Return how the job ends: a final body, a give-back, or None when it is no longer ours."""
        usage = Usage()
        try:
            job, adapter = self._read(attempt, problem)
            checkpoint = self._served.checkpoint_of(adapter)
            inputs = self._prepare(attempt, job, watch)
            usage = used(job, inputs, 0)
            finish = self._generate(attempt, job, inputs, adapter, output, watch)
            self._circuit.success(Component.ENGINE, Component.PROGRAM)
            self._meter.answered(watch.first_token_s(finish))
            return CompletedBody(result=self._result(attempt, job, inputs, checkpoint, finish, output, watch))
        except Stopped as stopped:
            return stopped_body(stopped.reason, output, usage)
        except NotServedYet:
            return GiveBack(RetryReason.GIVEN_BACK, NOT_YET_S)
        except EngineDead as error:
            logger.error("engine is dead", extra=facts_of(attempt) | {"error": str(error)})
            self._on_engine_dead()
            return GiveBack(RetryReason.GIVEN_BACK)
        except Exception as error:  # noqa: BLE001 - whatever it is, the job has an end
            fault = as_worker_error(error)
        if fault.component is not None:
            words, job_id = str(fault), attempt.claim.job_id
            if self._circuit.fault(fault.component, job_id, words, is_proven=fault.is_proven):
                return outcome_while_circuit_is_open(attempt.claim, fault, output, usage)
        return retried_or_failed(attempt.claim, fault, output, usage, self._max_retries)

    def _read(self, attempt: Attempt, problem: str | None) -> tuple[PromptJob, str]:
        """Return the job and the adapter that it asks for."""
        if problem is not None or not attempt.claim.body:
            raise InvalidRequest(problem or "job: the message was no valid job")
        try:
            job = parse_job(attempt.claim.body)
        except InvalidJob as error:
            raise InvalidRequest(str(error)) from error
        if isinstance(job, FinetuneJob):
            raise ModelMismatch(f"model: the job says {job.model!r}, its queue serves {self._served.model!r}")
        return job, self._served.adapter_of(job.model)

    def _prepare(self, attempt: Attempt, job: PromptJob, watch: Stopwatch) -> ModelInputs:
        turns = self._prompts.turns(job)
        parts = media_parts(turns)
        num_frames = job.num_frames if isinstance(job, VideoQaJob) else DEFAULT_NUM_FRAMES
        most_bytes = self._media.most_decoded_bytes(parts, task=job.task, num_frames=num_frames)
        with watch.fetch:
            reserved = self._memory_budget.reserve(most_bytes, should_stop=attempt.check)
        with reserved:
            collected = self._collect(attempt, job, parts, num_frames, watch) if parts else NO_MEDIA
            reserved.shrink(collected.num_decoded_bytes)
            with watch.prepare:
                inputs = self._prompts.prepare(turns, collected.media, job.media_options)
        attempt.check()
        return inputs

    def _collect(
        self, attempt: Attempt, job: PromptJob, parts: Sequence[AnyMediaPart], num_frames: int, watch: Stopwatch
    ) -> Collected:
        with watch.fetch:
            collected = self._media.collect(
                parts,
                task=job.task,
                num_frames=num_frames,
                should_stop=attempt.check,
                on_progress=lambda done, total: self._progress(attempt, Stage.FETCHING, done, total),
            )
        watch.fetch.seconds -= collected.decode_s
        watch.prepare.seconds += collected.decode_s
        self._meter.collected(watch.fetch.seconds, collected.decode_s, collected.num_bytes)
        self._circuit.success(Component.STORAGE, *((Component.DISK, Component.DECODERS) if collected.num_bytes else ()))
        self._progress(attempt, Stage.PREPARING, 0, len(parts))
        return collected

    def _generate(
        self,
        attempt: Attempt,
        job: PromptJob,
        inputs: ModelInputs,
        adapter: str,
        output: AttemptOutput,
        watch: Stopwatch,
    ) -> Finish:
        """Wait for the engine. Raises Stopped when the attempt was stopped, the request's own error when it failed."""
        self._progress(attempt, Stage.PREFILL, 0, inputs.num_prompt_tokens)
        with watch.generate:
            self._engine.submit(GenerationRequest(attempt.request_id, inputs, job.sampling, adapter))
            attempt.when_stopped(lambda: self._engine.cancel(attempt.request_id))
            finish = self._wait(attempt, output)
        if not isinstance(finish.reason, FinishReason):
            attempt.check()
            if finish.error is None or not self._engine.is_alive:
                raise EngineDead("the engine stopped before the answer was complete")
            self._engine.cancel(attempt.request_id)  # it generates on when the fault was the publisher's
            raise GenerationFailed(finish.error)
        return finish

    def _wait(self, attempt: Attempt, output: AttemptOutput) -> Finish:
        stopped_s = 0.0
        while (finish := output.wait(WAIT_S)) is None:
            if not self._engine.is_alive or not self._publisher.is_alive:
                raise EngineDead("the engine or the publisher ended while a request was running")
            reason = attempt.stop_reason
            if reason is StopReason.LOST or (reason is not None and stopped_s >= FLUSH_TIMEOUT_S):
                raise Stopped(reason)
            stopped_s += WAIT_S if reason is not None else 0.0
        return finish

    def _result(
        self,
        attempt: Attempt,
        job: PromptJob,
        inputs: ModelInputs,
        checkpoint: str | None,
        finish: Finish,
        output: AttemptOutput,
        watch: Stopwatch,
    ) -> Result:
        assert isinstance(finish.reason, FinishReason)
        return Result(
            job_id=attempt.claim.job_id,
            task=job.task,
            model=job.model,
            text=output.text,
            finish_reason=finish.reason,
            usage=used(job, inputs, finish.num_completion_tokens),
            timings=watch.timings(finish),
            attempt=attempt.claim.attempt,
            metadata=job.metadata,
            checkpoint=checkpoint,
        )

    def _progress(self, attempt: Attempt, stage: Stage, done: int, total: int) -> None:
        self._publisher.put(Outgoing(attempt.stream, ProgressBody(stage=stage, done=done, total=total)))
