"""How an attempt ends when it does not end with an answer."""

from __future__ import annotations

import random
from typing import Final

from api_stub.contract.error import ErrorCode, ErrorInfo
from api_stub.contract.event import CancelledBody, FailedBody, FinalBody, RetryReason
from api_stub.contract.job import Job
from api_stub.contract.result import Usage
from api_stub.ledger.rows import Claim
from worker.answers import Answer
from worker.lifecycle.attempt import StopReason
from worker.models.inputs import ModelInputs

#: Attempts of a job that does not fit into memory.
MAX_OOM_ATTEMPTS: Final = 3
#: Times a job is put back because storage stayed away, unless the settings say otherwise.
MAX_RETRIES: Final = 5
#: The first pause of a job that was put back for its storage; each further one is twice as long, up to the longest.
FIRST_RETRY_PAUSE_S: Final = 2.0
MAX_RETRY_PAUSE_S: Final = 60.0


def used(job: Job, inputs: ModelInputs, num_completion_tokens: int) -> Usage:
    """Return what a prompt and its answer cost; readers of the last release know nothing of media tokens."""
    return Usage(
        prompt_tokens=inputs.num_prompt_tokens,
        completion_tokens=num_completion_tokens,
        images=inputs.num_images,
        frames=inputs.num_frames,
        media_tokens=None if job.media_options is None else inputs.num_media_tokens,
    )


def failed_body(info: ErrorInfo, answer: Answer, usage: Usage) -> FailedBody:
    """Return the end of a job that failed for `info`, with what it had said by then."""
    return FailedBody(error=info, partial_text=answer.text, usage=_spent(answer, usage))


def retried_or_failed(
    claim: Claim, info: ErrorInfo, answer: Answer, usage: Usage, max_retries: int = MAX_RETRIES
) -> FailedBody | RetryReason:
    """Return the end of an attempt that met an error.

    What did not fit beside other jobs may fit later, and storage that was away may come back.
    """
    if info.code is ErrorCode.OUT_OF_MEMORY and claim.attempt < MAX_OOM_ATTEMPTS:
        return RetryReason.OUT_OF_MEMORY
    if info.code is ErrorCode.STORAGE_UNAVAILABLE and claim.num_retries < max_retries:
        return RetryReason.STORAGE
    return failed_body(info, answer, usage)


def storage_pause_s(num_retries: int) -> float:
    """Return how long a job waits that was put back `num_retries` times before: exponential, with half of it jitter.

    Jobs that failed together do not come back together, and storage that comes back is not met by all of them at once.
    """
    longest_s = min(MAX_RETRY_PAUSE_S, FIRST_RETRY_PAUSE_S * float(2**num_retries))
    return longest_s * random.uniform(0.5, 1.0)


def stopped_body(reason: StopReason, answer: Answer, usage: Usage) -> FinalBody | RetryReason | None:
    """Return the end of a stopped attempt: a final body, a reason to give the job back, None when it is not ours."""
    match reason:
        case StopReason.LOST:
            return None
        case StopReason.DRAINED | StopReason.UNCONFIRMED:
            return RetryReason.GIVEN_BACK
        case StopReason.CANCELLED:
            info = ErrorInfo.of(ErrorCode.CANCELLED, "cancelled while running")
            return CancelledBody(error=info, partial_text=answer.text, usage=_spent(answer, usage))
        case StopReason.DEADLINE:
            info = ErrorInfo.of(ErrorCode.DEADLINE_EXCEEDED, "the job's deadline passed while it was running")
            return failed_body(info, answer, usage)


def _spent(answer: Answer, usage: Usage) -> Usage:
    return usage.model_copy(update={"completion_tokens": answer.num_tokens})
