"""One generation request inside the engine, and what comes out for it.

Going in: `GenerationRequest`. Coming out: `RequestOutput`, one per request and step with new text or an end;
the last one has `finish` set. `Request` is the engine's own moving state; it never leaves the engine thread.
Also what went wrong with a step, for those who wait for its answers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import torch
from torch import Tensor

from api_stub.contract.error import ErrorCode, ErrorInfo
from api_stub.contract.result import FinishReason
from api_stub.contract.sampling import SamplingParams
from worker.engine.pictures import Picture
from worker.errors import PromptTooLong, WorkerError
from worker.models.generation_defaults import NEUTRAL, GenerationDefaults
from worker.models.inputs import ModelInputs


class Unsuited(Exception):
    """Raised when a KV back end cannot serve a model, with the reason."""


def error_info(error: Exception, where: str) -> ErrorInfo:
    """Say what went wrong without the exception's own words, which may quote data."""
    if isinstance(error, WorkerError):
        return error.info()
    if is_out_of_memory(error):
        return ErrorInfo.of(ErrorCode.OUT_OF_MEMORY, f"{where} did not fit into the device's memory")
    return ErrorInfo.of(ErrorCode.INTERNAL, f"{where} failed: {type(error).__name__}")


def is_out_of_memory(error: Exception) -> bool:
    """Say whether less at a time might fit."""
    # PyTorch's CPU allocator and cuBLAS' workspaces raise a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt and how to continue it. Of `sampling`, `max_new_tokens` and `seed` are set.

    adapter: name of a LoRA adapter that the engine has; empty for the base alone.
    """

    request_id: str
    inputs: ModelInputs
    sampling: SamplingParams
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the sampler reads of `SamplingParams`: what the job leaves open is the checkpoint's, else neutral.

    max_new_tokens: the only bound of `min_new_tokens`, which a checkpoint may have set higher.
    """

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    repetition_penalty: float

    @classmethod
    def of(cls, params: SamplingParams, defaults: GenerationDefaults, num_prompt_tokens: int) -> Sampling:
        """Resolve a job's parameters as `generate` does: a given `min_new_tokens` beats `min_length` too."""
        assert params.max_new_tokens is not None, "submit checks it"
        assert params.seed is not None, "submit checks it"
        at_least = params.min_new_tokens if params.min_new_tokens is not None else defaults.min_new_tokens
        penalty = params.repetition_penalty
        return cls(
            max_new_tokens=params.max_new_tokens,
            min_new_tokens=max(defaults.min_length - num_prompt_tokens, 0) if at_least is None else at_least,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            seed=params.seed,
            repetition_penalty=defaults.repetition_penalty if penalty is None else penalty,
        )


def check_length(inputs: ModelInputs, max_new_tokens: int, row_length: int, context_length: int | None) -> None:
    """Raise PromptTooLong when prompt and answer do not fit the engine's rows or the model's context."""
    num_tokens = inputs.num_prompt_tokens + max_new_tokens
    limits = [(row_length, "the engine's rows of {} tokens")]
    if context_length is not None:
        limits.append((context_length, "the model's context of {} tokens"))
    limit, name = min(limits)
    if num_tokens > limit:
        raise PromptTooLong(
            f"prompt of {inputs.num_prompt_tokens} tokens and max_new_tokens of {max_new_tokens} make "
            f"{num_tokens}, more than {name.format(limit)}{inputs.cost_of_media}"
        )


class Ended(StrEnum):
    """Ends of a request that are no answer."""

    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finish:
    """How a request ended. `error` is set for Ended.FAILED only.

    num_completion_tokens: tokens generated, the model's end token and those of a stop string included.
    first_token_s: seconds from `submit` to the first token; 0 when there was none.
    generate_s: seconds from the first token to the end.
    """

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
    num_tokens: generated tokens that `text` stands for; over a request they sum up to `num_completion_tokens`.
    is_first: prefill has ended with this step.
    """

    request_id: str
    text: str
    offset: int
    num_tokens: int
    is_first: bool = False
    finish: Finish | None = None


class RequestState(StrEnum):
    """Where a request is. Transitions are in `NEXT_STATES`."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


NEXT_STATES: Final[Mapping[RequestState, frozenset[RequestState]]] = {
    RequestState.WAITING: frozenset({RequestState.RUNNING, RequestState.ENDED}),
    RequestState.RUNNING: frozenset({RequestState.WAITING, RequestState.ENDED}),
    RequestState.ENDED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Request:
    """A request as scheduler, runner and sampler see it. Compared by identity.

    defaults: the checkpoint's values of what the job leaves open.
    sampling: the outcome of both.
    output_ids: generated tokens, the end token included. A preempted request keeps them.
    num_pending: tokens after those that have been chosen on the device and have not come to the host yet.
    num_prompt_cached: KV entries the prompt takes, known once a runner has opened the request; more than the prompt's
        tokens where a family puts image features in front of the text.
    num_cached_tokens: KV entries written so far. The newest token's are written by the step that it is fed to.
    first_position: position id of the first generated token; with multi-axis rotary positions it differs from
        `num_prompt_cached`.
    is_chunkable: the prompt may be read in chunks.
    pictures: what the vision tower has to see of the prompt.
    row: index in the tables of the KV back end while it holds the request, else −1.
    slot: of its adapter in the runner that has opened it; 0 for the base alone.
    """

    generation: GenerationRequest
    submitted_at: float
    state: RequestState = RequestState.WAITING
    output_ids: list[int] = field(default_factory=list)
    num_pending: int = 0
    num_prompt_cached: int = 0
    num_cached_tokens: int = 0
    first_position: int = 0
    is_chunkable: bool = False
    row: int = -1
    slot: int = 0
    first_token_at: float | None = None
    pictures: Sequence[Picture] = ()
    defaults: GenerationDefaults = NEUTRAL
    sampling: Sampling = field(init=False)

    def __post_init__(self) -> None:
        self.sampling = Sampling.of(self.generation.sampling, self.defaults, self.inputs.num_prompt_tokens)

    @property
    def request_id(self) -> str:
        return self.generation.request_id

    @property
    def job_id(self) -> str:
        """The id without the `:fence` that tells a job's attempts apart, for log lines."""
        return self.request_id.rpartition(":")[0] or self.request_id

    @property
    def inputs(self) -> ModelInputs:
        return self.generation.inputs

    @property
    def prompt_ids(self) -> Tensor:
        """Prompt token ids [T]."""
        return self.inputs.tensors["input_ids"][0]

    @property
    def max_new_tokens(self) -> int:
        return self.sampling.max_new_tokens

    @property
    def num_generated(self) -> int:
        """Tokens chosen so far, whether the host knows them or not."""
        return len(self.output_ids) + self.num_pending

    @property
    def is_full(self) -> bool:
        """Whether no more tokens may be generated; it ends when the last of them has come to the host."""
        return self.num_generated >= self.max_new_tokens

    @property
    def num_tokens(self) -> int:
        """KV entries of prompt and answer once everything chosen has been fed."""
        return self.num_prompt_cached + self.num_generated

    @property
    def num_unread(self) -> int:
        """Tokens to feed before the next one can be sampled."""
        return self.num_tokens - self.num_cached_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether feeding the newest token is all that the next one needs."""
        return self.num_unread == 1 and self.num_generated > 0

    @property
    def must_stay_whole(self) -> bool:
        """Whether what comes next is a prompt that cannot be cut."""
        return not self.is_chunkable and self.num_cached_tokens < self.num_prompt_cached

    @property
    def next_position(self) -> int:
        """Position id of the newest token, the next to be fed."""
        return self.first_position + self.num_generated - 1

    def enter(self, state: RequestState) -> None:
        """Change state; raises ValueError for a transition that `NEXT_STATES` lacks."""
        if state not in NEXT_STATES[self.state]:
            raise ValueError(f"request {self.request_id} cannot go from {self.state} to {state}")
        self.state = state


def finish_of(request: Request, reason: FinishReason | Ended, error: ErrorInfo | None = None) -> Finish:
    """Return how a request ended, now."""
    now = time.monotonic()
    first_token_at = request.first_token_at
    return Finish(
        reason,
        num_prompt_tokens=request.inputs.num_prompt_tokens,
        num_completion_tokens=len(request.output_ids),
        first_token_s=0.0 if first_token_at is None else first_token_at - request.submitted_at,
        generate_s=0.0 if first_token_at is None else now - first_token_at,
        error=error,
    )
