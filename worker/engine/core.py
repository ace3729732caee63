"""One step of the engine: decode, prefill, sample, make text.

Knows requests and tensors, no threads. A request that cannot be prefilled fails alone; a decode step that fails takes
the running requests with it and the engine goes on with empty rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from api_stub.contract.error import ErrorCode, ErrorInfo
from api_stub.contract.result import FinishReason
from worker.engine.detokenizer import Detokenizer, DetokenizerFactory
from worker.engine.request import Ended, Finish, GenerationRequest, Request, RequestOutput
from worker.engine.runner import SlotRunner
from worker.engine.sampler import Sampler
from worker.engine.scheduler import Scheduler, SchedulerLimits
from worker.errors import WorkerError

logger = logging.getLogger(__name__)

#: Decode steps that may fail in a row before the engine gives up.
MAX_FAILED_STEPS = 3


class EngineCore:
    """Everything of an engine but its thread. All methods belong to one thread under `torch.inference_mode`.

    is_dead: the device is lost or decode steps keep failing; call nothing but `end` then.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limits: SchedulerLimits, row_length: int
    ) -> None:
        self.scheduler = Scheduler(limits)
        self.is_dead = False
        self._eos_token_ids = frozenset(eos_token_ids(model, tokenizer))
        self._runner = SlotRunner(model, limits.max_num_seqs, row_length)
        self._sampler = Sampler(sorted(self._eos_token_ids))
        self._detokenizers = DetokenizerFactory(tokenizer)
        self._texts: dict[str, Detokenizer] = {}
        self._num_failed_steps = 0

    def add(self, generation: GenerationRequest, submitted_at: float) -> None:
        """Queue a request; `submitted_at` is monotonic."""
        self.scheduler.add(Request(generation, submitted_at))
        self._texts[generation.request_id] = self._detokenizers.make(
            generation.sampling.stop, keeps_leading_space=generation.inputs.is_continuation
        )

    def step(self) -> list[RequestOutput]:
        """Decode one token for what runs, prefill what the scheduler admits, sample for all, say what is new."""
        outputs: list[RequestOutput] = []
        decoded = self._decode(outputs)
        prefilled = self._prefill(outputs)
        tokens = self._sample(decoded + prefilled, outputs)
        self._append(tokens, outputs)
        return outputs

    def end(self, request: Request, reason: Ended, error: ErrorInfo | None = None) -> RequestOutput:
        """End a waiting or running request without an answer; text that was held back is dropped."""
        if self.is_dead:
            return self._end(request, reason, error, release=_leave_rows)
        return self._end(request, reason, error, release=self._runner.release)

    def _decode(self, outputs: list[RequestOutput]) -> list[Tensor]:
        """Return logits [B, V] of the running requests, in row order, if there are any."""
        if not self.scheduler.running:
            return []
        try:
            logits = self._runner.decode(self.scheduler.running)
        except Exception as error:
            logger.exception("decode step failed", extra={"action": "engine.decode"})
            self._fail_running(error, outputs)
            return []
        self._num_failed_steps = 0
        return [logits]

    def _prefill(self, outputs: list[RequestOutput]) -> list[Tensor]:
        """Start the requests that the scheduler admits; return logits [1, V] of each, in row order."""
        started: list[Tensor] = []
        for request in [] if self.is_dead else self.scheduler.admit():
            try:
                started.append(self._runner.prefill(request, row=self.scheduler.num_running))
            except Exception as error:
                facts = {"action": "engine.prefill", "job_id": request.request_id}
                logger.warning("prefill failed", extra=facts, exc_info=True)
                self._note_death(error)
                outputs.append(self.end(request, Ended.FAILED, _error_info(error, "prefill")))
            else:
                self.scheduler.start(request)
        return started

    def _sample(self, logits: list[Tensor], outputs: list[RequestOutput]) -> list[int]:
        """Return one token per running request."""
        if not logits:
            return []
        try:
            rows = logits[0] if len(logits) == 1 else torch.cat(logits)
            return self._sampler.sample(rows, self.scheduler.running)
        except Exception as error:
            logger.exception("sampling failed", extra={"action": "engine.sample"})
            self._fail_running(error, outputs)
            return []

    def _append(self, tokens: Sequence[int], outputs: list[RequestOutput]) -> None:
        """Give each running request its token; end those that are done."""
        now = time.monotonic()
        batch = list(self.scheduler.running)
        # All rows grow before any ends: a row that moves must know its length.
        for request, token in zip(batch, tokens, strict=True):
            request.output_ids.append(token)
        for request in batch:
            output = self._advance(request, now)
            if output is not None:
                outputs.append(output)

    def _advance(self, request: Request, now: float) -> RequestOutput | None:
        token = request.output_ids[-1]
        is_first = request.first_token_at is None
        if request.first_token_at is None:
            request.first_token_at = now
        is_full = len(request.output_ids) >= request.max_new_tokens
        text = self._texts[request.request_id]
        is_end = token in self._eos_token_ids
        piece = text.end() if is_end else text.push(token, is_last=is_full)
        reason: FinishReason | None = None
        if piece is not None and piece.is_stopped:
            reason = FinishReason.STOP_SEQUENCE
        elif is_end:
            reason = FinishReason.STOP
        elif is_full:
            reason = FinishReason.LENGTH
        finish = None if reason is None else self._finish(request, reason)
        if piece is None:
            return RequestOutput(request.request_id, "", text.offset, 0, is_first=True) if is_first else None
        return RequestOutput(request.request_id, piece.text, piece.offset, piece.num_tokens, is_first, finish)

    def _finish(self, request: Request, reason: FinishReason) -> Finish:
        del self._texts[request.request_id]
        self.scheduler.end(request, self._runner.release)
        return _finish(request, reason)

    def _end(
        self, request: Request, reason: Ended, error: ErrorInfo | None, release: Callable[[Request, Request], None]
    ) -> RequestOutput:
        text = self._texts.pop(request.request_id)
        self.scheduler.end(request, release)
        return RequestOutput(request.request_id, "", text.offset, 0, finish=_finish(request, reason, error))

    def _fail_running(self, error: Exception, outputs: list[RequestOutput]) -> None:
        self._num_failed_steps += 1
        self._note_death(error)
        info = _error_info(error, "a decode step")
        running = list(self.scheduler.running)
        outputs += [self._end(request, Ended.FAILED, info, release=_leave_rows) for request in running]
        if not self.is_dead:
            self._runner.reset()

    def _note_death(self, error: Exception) -> None:
        # An AcceleratorError is sticky: every later call to the device fails too.
        if isinstance(error, torch.AcceleratorError) or self._num_failed_steps >= MAX_FAILED_STEPS:
            self.is_dead = True


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: of the generation config, else the config, else the tokenizer."""
    for source in (model.generation_config, model.config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return list(found) if isinstance(found, (list, tuple)) else [found]
    return []


def _leave_rows(_request: Request, _last: Request) -> None:
    """Move nothing: the rows are about to be forgotten."""


def _finish(request: Request, reason: FinishReason | Ended, error: ErrorInfo | None = None) -> Finish:
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


def _error_info(error: Exception, where: str) -> ErrorInfo:
    """Say what went wrong without the exception's own words, which may quote data."""
    if isinstance(error, WorkerError):
        return error.info()
    if _is_out_of_memory(error):
        return ErrorInfo.of(ErrorCode.OUT_OF_MEMORY, f"{where} did not fit into the device's memory")
    return ErrorInfo.of(ErrorCode.INTERNAL, f"{where} failed: {type(error).__name__}")


def _is_out_of_memory(error: Exception) -> bool:
    # PyTorch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
