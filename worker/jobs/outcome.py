"""The outcome of an attempt without a complete answer: a final body, or a give-back to the queue.

In: a claim, the error or the reason to stop, and the text so far. Out: what the pipeline writes into the ledger.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

from api_stub.contract.error import ErrorCode, ErrorInfo
from api_stub.contract.event import CancelledBody, FailedBody, FinalBody, RetryReason
from api_stub.contract.job import PromptJob
from api_stub.contract.result import Usage
from api_stub.ledger.backoff import Backoff
from api_stub.ledger.rows import Claim
from worker.errors import DiskFailed, MediaRefused, OutOfMemory, Unforeseen, WorkerError
from worker.jobs.attempt import StopReason
from worker.models.inputs import ModelInputs
from worker.streaming.output import AttemptOutput

logger = logging.getLogger(__name__)

#: Tries of a job that does not fit into memory, and of one whose fault may be the worker's.
MAX_TRIES: Final = 3
#: Pause before a job that did not fit into memory is tried again, times the tries made: other jobs end meanwhile, or a
#: worker with more memory claims it.
OOM_PAUSE_S: Final = 2.0
#: Pause before a job is tried again whose fault may be this worker's, so that another worker may claim it.
DOUBT_PAUSE_S: Final = 1.0
#: Give-backs of one job because storage was unavailable; the default of the setting.
MAX_RETRIES: Final = 5
#: Pauses of a job given back because storage was unavailable. The jitter spreads jobs that failed together.
STORAGE_RETRIES: Final = Backoff(first_s=2.0, max_s=60.0, jitter=0.5)


def used(job: PromptJob, inputs: ModelInputs, num_completion_tokens: int) -> Usage:
    """Return the usage of a prompt and its answer.

    `media_tokens` is set only for jobs with `media_options`: readers of the last release do not know the field.
    """
    return Usage(
        prompt_tokens=inputs.num_prompt_tokens,
        completion_tokens=num_completion_tokens,
        images=inputs.num_images,
        frames=inputs.num_frames,
        media_tokens=None if job.media_options is None else inputs.num_media_tokens,
    )


def failed_body(info: ErrorInfo, output: AttemptOutput, usage: Usage) -> FailedBody:
    """Return the final body of a failed job, with the text generated so far."""
    return FailedBody(error=info, partial_text=output.text, usage=_spent(output, usage))


def as_worker_error(error: Exception) -> WorkerError:
    """Translate any exception of an attempt into a WorkerError; unexpected ones are logged with their traceback."""
    match error:
        case WorkerError():
            return error
        case MemoryError():
            logger.warning("job did not fit into memory", extra={"action": "job"}, exc_info=error)
            return OutOfMemory("preparing the job did not fit into the worker's memory")
        case OSError() if error.errno is not None:
            logger.error("operating system refused an operation", extra={"action": "job"}, exc_info=error)
            return DiskFailed(f"the worker's system refused what the job needs: {error.strerror}")
        case _:
            logger.error("job failed unexpectedly", extra={"action": "job"}, exc_info=error)
            return Unforeseen(f"unexpected {type(error).__name__}; the worker's log has the details")


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Gives a job back to the queue, to be claimed after `pause_s`. `is_charged`: counts as one of the job's
    retries.
    """

    reason: RetryReason
    pause_s: float = 0.0
    is_charged: bool = False


def retried_or_failed(
    claim: Claim, error: WorkerError, output: AttemptOutput, usage: Usage, max_retries: int = MAX_RETRIES
) -> FailedBody | GiveBack:
    """Return the outcome of an attempt that met an error, on a worker whose circuit breaker is closed.

    A job is tried again when storage was unavailable (up to `max_retries` times), when it did not fit into memory
    beside others, or when the fault may be this worker's (`MAX_TRIES` times in all). Else it has failed.
    """
    info, num_retries = error.info(), claim.num_retries
    if info.code is ErrorCode.STORAGE_UNAVAILABLE and num_retries < max_retries:
        return GiveBack(RetryReason.STORAGE, STORAGE_RETRIES.delay_s(num_retries + 1), is_charged=True)
    if info.code is ErrorCode.OUT_OF_MEMORY and num_retries < MAX_TRIES - 1:
        return GiveBack(RetryReason.OUT_OF_MEMORY, OOM_PAUSE_S * (num_retries + 1), is_charged=True)
    if error.component is not None and info.code is not ErrorCode.STORAGE_UNAVAILABLE and num_retries < MAX_TRIES - 1:
        return GiveBack(RetryReason.GIVEN_BACK, DOUBT_PAUSE_S, is_charged=True)
    return failed_body(info, output, usage)


def outcome_while_circuit_is_open(
    claim: Claim, error: WorkerError, output: AttemptOutput, usage: Usage
) -> FailedBody | GiveBack:
    """Return the outcome of an attempt that met an error on a worker whose circuit breaker is open: no retry is
    charged.

    Except for MediaRefused, where storage may be refusing the job's object and not the worker: uncharged, such a job
    would be tried for ever.
    """
    if isinstance(error, MediaRefused):
        return retried_or_failed(claim, error, output, usage)
    return GiveBack(RetryReason.GIVEN_BACK)


def stopped_body(reason: StopReason, output: AttemptOutput, usage: Usage) -> FinalBody | GiveBack | None:
    """Return the outcome of a stopped attempt; None when the lease was lost, because another worker owns the job
    then.
    """
    match reason:
        case StopReason.LOST:
            return None
        case StopReason.DRAINED | StopReason.UNCONFIRMED:
            return GiveBack(RetryReason.GIVEN_BACK)
        case StopReason.CANCELLED:
            info = ErrorInfo.of(ErrorCode.CANCELLED, "cancelled while running")
            return CancelledBody(error=info, partial_text=output.text, usage=_spent(output, usage))
        case StopReason.DEADLINE:
            info = ErrorInfo.of(ErrorCode.DEADLINE_EXCEEDED, "the job's deadline passed while it was running")
            return failed_body(info, output, usage)


def _spent(output: AttemptOutput, usage: Usage) -> Usage:
    return usage.model_copy(update={"completion_tokens": output.num_tokens})
