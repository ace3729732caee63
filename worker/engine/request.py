"""One generation request inside the engine, and what the engine says about it.

Going in: `GenerationRequest`. Coming out: `RequestOutput`, one per request and step that has something to say;
the last one has `finish` set. `Request` (scheduler's own state) is in this file too because both name it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from api_stub.contract.error import ErrorInfo
from api_stub.contract.result import FinishReason
from api_stub.contract.sampling import SamplingParams
from worker.models.inputs import ModelInputs


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt and how to continue it. `sampling` is resolved: `max_new_tokens` and `seed` are set."""

    request_id: str
    inputs: ModelInputs
    sampling: SamplingParams


class Ended(StrEnum):
    """Ends of a request that are no answer."""

    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finish:
    """How a request ended. `error` is set for Ended.FAILED only. Counts are tokens."""

    reason: FinishReason | Ended
    num_prompt_tokens: int
    num_completion_tokens: int
    first_token_s: float
    generate_s: float
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step added to one request.

    text: new text, possibly empty; never half a character, never part of a stop string.
    offset: code points of the answer before `text`.
    num_tokens: generated tokens that `text` stands for.
    is_first: prefill has ended with this step.
    """

    request_id: str
    text: str
    offset: int
    num_tokens: int
    is_first: bool = False
    finish: Finish | None = None
