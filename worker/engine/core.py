"""One step of the engine: start, run, sample, make text.

Knows requests and tensors, no threads and no KV back end. A request whose prompt cannot be read fails alone. A step
that does not fit into memory runs again without one of its requests; one that fails otherwise takes the requests in it
along and the engine goes on with the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from api_stub.contract.error import ErrorInfo
from api_stub.contract.result import FinishReason
from worker.engine.batch import Chunk, NoRoom, PrefixStats, Runner, StepLogits, VisionStats
from worker.engine.config import SchedulerLimits
from worker.engine.detokenizer import Detokenizer, DetokenizerFactory
from worker.engine.pictures import Picture
from worker.engine.request import (
    Ended,
    Finish,
    GenerationRequest,
    Request,
    RequestOutput,
    RequestState,
    error_info,
    finish_of,
    is_out_of_memory,
)
from worker.engine.sampler import Chooser, Sampler
from worker.engine.scheduler import Scheduler
from worker.engine.step_times import StepClock, StepStage
from worker.engine.tensors import HostCopy
from worker.models.generation_defaults import GenerationDefaults, eos_token_ids, read_generation_defaults

logger = logging.getLogger(__name__)

#: Decode steps that may fail in a row before the engine gives up.
MAX_FAILED_STEPS = 3


@dataclass(frozen=True, slots=True)
class _Sampled:
    """Tokens on their way to the host, one per request."""

    requests: Sequence[Request]
    tokens: HostCopy


class EngineCore:
    """Everything of an engine but its thread. All methods belong to one thread under `torch.inference_mode`.

    is_dead: the device is lost or steps keep failing; call nothing but `end` then.
    runs_ahead: read the tokens of a step while the next one runs, where the runner can. An end that depends on the
        token is known one step late then; what was generated meanwhile is dropped.
    defaults: parameters that a request leaves open; None reads it from the model's generation config.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        runner: Runner,
        limits: SchedulerLimits,
        clock: StepClock | None = None,
        *,
        runs_ahead: bool = False,
        defaults: GenerationDefaults | None = None,
    ) -> None:
        self.scheduler = Scheduler(limits, runner)
        self.is_dead = False
        self._eos_token_ids = frozenset(eos_token_ids(model, tokenizer))
        self._runner = runner
        self._clock = clock or StepClock()
        self._defaults = read_generation_defaults(model) if defaults is None else defaults
        self._chooser = Chooser(Sampler(sorted(self._eos_token_ids), self._defaults), runner.free_memory)
        self._detokenizers = DetokenizerFactory(tokenizer, self._defaults.stop_strings)
        self._texts: dict[str, Detokenizer] = {}
        self._num_failed_steps = 0
        self._runs_ahead = runs_ahead and runner.can_run_ahead
        self._in_flight: _Sampled | None = None

    def kv_usage(self) -> float:
        """Return the share of KV space that requests hold, 0…1; any thread."""
        return self._runner.kv_usage()

    def prefix_stats(self) -> PrefixStats:
        """Return counts of the prefix cache; any thread."""
        return self._runner.prefix_stats()

    def vision_stats(self) -> VisionStats:
        """Return counts of the vision cache; any thread."""
        return self._runner.vision_stats()

    def cut(self, generation: GenerationRequest) -> tuple[Picture, ...]:
        """Return the pictures of a prompt for `add`; any thread, better another. See `Runner`."""
        return self._runner.cut(generation)

    def add(
        self, generation: GenerationRequest, submitted_at: float, pictures: Sequence[Picture] | None = None
    ) -> None:
        """Queue a request; `submitted_at` is monotonic. The prompt's pictures are cut here if they are not given."""
        pictures = self.cut(generation) if pictures is None else pictures
        request = Request(generation, submitted_at, pictures=pictures, defaults=self._defaults)
        self.scheduler.add(request)
        self._texts[generation.request_id] = self._detokenizers.make(
            generation.sampling.stop,
            keeps_leading_space=generation.inputs.is_continuation,
            prompt_ids=request.prompt_ids.tolist(),
        )

    def step(self) -> list[RequestOutput]:
        """Start what fits, feed one batch to the model, sample for those that get a token, return what is new."""
        outputs: list[RequestOutput] = []
        self._clock.begin()
        self._start_waiting(outputs)
        self._clock.lap(StepStage.OPEN)
        chunks = self.scheduler.schedule()
        self._clock.lap(StepStage.SCHEDULE)
        self._clock.feed(chunks)
        logits = self._run(chunks, outputs)
        self._clock.lap(StepStage.MODEL)
        sampled = self._sample(logits, outputs)
        if self._runs_ahead:
            sampled, self._in_flight = self._in_flight, sampled
        tokens = self._wait(sampled, outputs)
        self._clock.lap(StepStage.SAMPLE)
        self._append(tokens, outputs)
        self._clock.lap(StepStage.DETOKENISE)
        return outputs

    def end(self, request: Request, reason: Ended, error: ErrorInfo | None = None) -> RequestOutput:
        """End a waiting or running request without an answer; text that was held back is dropped."""
        text = self._texts.pop(request.request_id)
        if self.is_dead:
            # Freeing a dense row compacts the others on the device, which a lost one cannot do.
            request.row = -1
        self.scheduler.end(request)
        return RequestOutput(request.request_id, "", text.offset, 0, finish=finish_of(request, reason, error))

    def _start_waiting(self, outputs: list[RequestOutput]) -> None:
        """Open the requests that the scheduler lets in; one that cannot be opened fails alone."""
        if self.scheduler.num_waiting:
            self._runner.look_ahead(self.scheduler.next_in_line())
        while not self.is_dead and (request := self.scheduler.next_to_start()) is not None:
            try:
                self._runner.allocate(request)
            except NoRoom:
                return
            except Exception as error:
                facts = {"action": "engine.prefill", "job_id": request.job_id}
                logger.warning("no KV cache allocated for a prompt", extra=facts, exc_info=True)
                self._fail_prompt(request, error.with_traceback(None), outputs)
            else:
                self.scheduler.start(request)

    def _run(self, chunks: Sequence[Chunk], outputs: list[RequestOutput]) -> StepLogits:
        """Feed the batch; while it does not fit into memory, the rest of it. Another failure ends all in it."""
        while chunks and not self.is_dead:
            num_cached = [chunk.request.num_cached_tokens for chunk in chunks]
            decodes = any(chunk.request.is_decoding for chunk in chunks)
            try:
                logits = self._runner.run(chunks)
            except Exception as caught:
                logger.exception("decode step failed", extra={"action": "engine.decode"})
                # Its frames hold the tensors of the step.
                error = caught.with_traceback(None)
            else:
                if decodes:
                    # A prompt that could be read is no proof that decoding works.
                    self._num_failed_steps = 0
                for request, reason in logits.failed:
                    self._fail_prompt(request, reason, outputs)
                return logits
            was_counted = num_cached != [chunk.request.num_cached_tokens for chunk in chunks]
            if was_counted or not is_out_of_memory(error):
                self._fail_batch([chunk.request for chunk in chunks], error, outputs)
                break
            self._runner.free_memory()
            chunks = self._smaller(chunks, error, outputs)
        return StepLogits()

    def _smaller(self, chunks: Sequence[Chunk], error: Exception, outputs: list[RequestOutput]) -> list[Chunk]:
        """Return what is left of a batch that memory did not hold.

        Of several prefill chunks the largest waits for the next step; a single one does not fit and its request
        fails. Without any the youngest decode goes, for a while if it can be resumed.
        """
        decodes = [chunk for chunk in chunks if chunk.request.is_decoding]
        prefills = [chunk for chunk in chunks if not (chunk.request.is_decoding or chunk.request.must_stay_whole)]
        if len(prefills) > 1:
            # Of equal ones the youngest.
            largest = max(reversed(prefills), key=lambda chunk: chunk.num_tokens)
            return [chunk for chunk in chunks if chunk is not largest]
        if prefills:
            self._fail_prompt(prefills[0].request, error, outputs)
        elif len(decodes) > 1 and self._runner.can_resume:
            self.scheduler.send_back(decodes[-1].request)
        elif len(decodes) > 1:
            outputs.append(self.end(decodes[-1].request, Ended.FAILED, error_info(error, "a decode step")))
        else:
            self._fail_batch([chunk.request for chunk in decodes or chunks], error, outputs)
        return [chunk for chunk in chunks if chunk.request.state is RequestState.RUNNING]

    def _sample(self, logits: StepLogits, outputs: list[RequestOutput]) -> _Sampled | None:
        """Choose one token per request of `logits` on the device; None when there are none or sampling failed."""
        if logits.logits is None:
            return None
        try:
            chosen = self._chooser.choose(logits.logits, logits.requests)
            self._runner.remember(chosen.requests, chosen.tokens)
            sampled = _Sampled(chosen.requests, HostCopy(chosen.tokens))
        except Exception as error:
            logger.exception("sampling failed", extra={"action": "engine.sample"})
            self._fail_batch(logits.requests, error, outputs)
            return None
        for request in chosen.requests:
            request.num_pending += 1
        outputs += [
            self.end(request, Ended.FAILED, error_info(error, "a decode step"))
            for request, error in chosen.failed.items()
        ]
        return sampled

    def _wait(self, sampled: _Sampled | None, outputs: list[RequestOutput]) -> Sequence[tuple[Request, int]]:
        """Return the tokens that have come, without those of requests that ended meanwhile."""
        if sampled is None:
            return ()
        for request in sampled.requests:
            request.num_pending -= 1
        alive = [request.state is not RequestState.ENDED for request in sampled.requests]
        try:
            tokens = list(zip(sampled.requests, sampled.tokens.wait(), strict=True))
        except Exception as error:
            # Asynchronous errors of the device surface here.
            logger.exception("sampling failed", extra={"action": "engine.sample"})
            self._fail_batch(list(compress(sampled.requests, alive)), error, outputs)
            return ()
        return list(compress(tokens, alive))

    def _append(self, tokens: Sequence[tuple[Request, int]], outputs: list[RequestOutput]) -> None:
        """Give each request its token; end those that are done."""
        now = time.monotonic()
        for request, token in tokens:
            request.output_ids.append(token)
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
        delta = text.end() if is_end else text.push(token, is_last=is_full)
        reason: FinishReason | None = None
        if delta is not None and delta.is_stopped:
            reason = FinishReason.STOP_SEQUENCE
        elif is_end:
            reason = FinishReason.STOP
        elif is_full:
            reason = FinishReason.LENGTH
        finish = None if reason is None else self._finish(request, reason)
        if delta is None:
            return RequestOutput(request.request_id, "", text.offset, 0, is_first=True) if is_first else None
        return RequestOutput(request.request_id, delta.text, delta.offset, delta.num_tokens, is_first, finish)

    def _finish(self, request: Request, reason: FinishReason) -> Finish:
        del self._texts[request.request_id]
        self.scheduler.end(request)
        return finish_of(request, reason)

    def _fail_prompt(self, request: Request, error: Exception, outputs: list[RequestOutput]) -> None:
        self._note_death(error)
        outputs.append(self.end(request, Ended.FAILED, error_info(error, "prefill")))
        if is_out_of_memory(error):
            self._runner.free_memory()

    def _fail_batch(self, requests: Sequence[Request], error: Exception, outputs: list[RequestOutput]) -> None:
        self._num_failed_steps += 1
        self._note_death(error)
        info = error_info(error, "a decode step")
        outputs += [self.end(request, Ended.FAILED, info) for request in requests]
        if not self.is_dead:
            self._runner.reset()

    def _note_death(self, error: Exception) -> None:
        # An AcceleratorError is sticky: every later call to the device fails too.
        if isinstance(error, torch.AcceleratorError) or self._num_failed_steps >= MAX_FAILED_STEPS:
            self.is_dead = True
