"""The engine: one thread that batches requests continuously. Going down is a call, coming up is a queue.

A library of its own: tensors in, token outputs out; it knows no broker, no storage and no images.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from api_stub.contract.error import ErrorCode, ErrorInfo
from worker.engine.batch import PrefixStats, VisionStats
from worker.engine.config import EngineConfig, SchedulerLimits
from worker.engine.core import EngineCore
from worker.engine.model_hooks import ModelLock
from worker.engine.pictures import Picture
from worker.engine.request import Ended, GenerationRequest, RequestOutput, check_length
from worker.engine.runner.build import runner_of
from worker.engine.step_times import StepClock, StepStage
from worker.errors import EngineDead
from worker.models.inputs import ModelInputs

logger = logging.getLogger(__name__)

#: An idle engine shows a sign of life this often.
IDLE_TICK_S = 1.0

#: The outputs of one call of `generate`.
_Reader: TypeAlias = queue.SimpleQueue[RequestOutput]


@dataclass(frozen=True, slots=True)
class _Submit:
    generation: GenerationRequest
    submitted_at: float
    pictures: Sequence[Picture]
    reader: _Reader | None


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_id: str


class _Stop:
    pass


class Engine:
    """Serves one model, alone. `start` it once, `submit` and `cancel` from any thread, `stop` it once.

    `outbox` is called on the engine thread with all outputs of one step, those of `generate` excepted, and must return
    at once: decoding waits for it. Every submitted request gets exactly one output with `finish`, also when it is
    cancelled, when the engine stops and when it dies. `clock` measures the stages of the steps. About `trials`
    the engine must answer as the model's own `generate` does. Raises CannotStart, see `runner_of`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EngineConfig,
        outbox: Callable[[Sequence[RequestOutput]], None] | None = None,
        clock: StepClock | None = None,
        trials: Sequence[ModelInputs] = (),
    ) -> None:
        limits = SchedulerLimits(config.max_num_seqs, config.max_num_batched_tokens)
        self._leaving = ExitStack()  # closed when the model is left to others
        self._leaving.callback(ModelLock(model).release)
        try:
            self._runner = runner = runner_of(model, config, trials)
        except BaseException:
            self._leaving.close()
            raise
        self._leaving.callback(runner.leave_model)
        self._clock = clock or StepClock()
        runs_ahead = model.device.type == "cuda" if config.runs_ahead is None else config.runs_ahead
        self._core = EngineCore(
            model, tokenizer, runner, limits, self._clock, runs_ahead=runs_ahead, defaults=config.generation
        )
        self._row_length = config.max_model_len
        self._context_length: int | None = getattr(
            model.config.get_text_config(decoder=True), "max_position_embeddings", None
        )
        self._outbox = outbox
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _Stop] = queue.SimpleQueue()
        # Guards `_is_open` and `_readers`: nothing may enter the inbox after its last reading, or twice.
        self._lock = threading.Lock()
        self._is_open = True
        # Requests that have not ended, and who gets their outputs; None: the outbox.
        self._readers: dict[str, _Reader | None] = {}
        self._last_step_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def kv_backend(self) -> str:
        """ "slots" or "paged": where keys and values live."""
        return self._runner.kv_backend

    @property
    def why_not_paged(self) -> str | None:
        """Why it is slots although paged was asked for; None when it was not, or is."""
        return self._runner.why_not_paged

    @property
    def is_alive(self) -> bool:
        """Whether the engine thread runs."""
        return self._thread.is_alive()

    @property
    def num_running(self) -> int:
        """Requests that are decoding."""
        return self._core.scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that are submitted and not yet prefilled; approximate while the engine is between two steps."""
        return self._core.scheduler.num_waiting + self._inbox.qsize()

    @property
    def num_preempted(self) -> int:
        """How often a request gave its KV space up to be read again later."""
        return self._core.scheduler.num_preempted

    def kv_usage(self) -> float:
        """Return the share of KV space that requests hold, 0…1."""
        return self._core.kv_usage()

    def prefix_stats(self) -> PrefixStats:
        """Return how many prompt tokens were not read because an earlier prompt began alike."""
        return self._core.prefix_stats()

    def vision_stats(self) -> VisionStats:
        """Return the counters of the vision-embedding cache."""
        return self._core.vision_stats()

    @property
    def last_step_at(self) -> float:
        """Monotonic time at which the engine last finished a step or, idle, showed a sign of life."""
        return self._last_step_at

    def start(self) -> None:
        """Start the engine thread."""
        self._last_step_at = time.monotonic()
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the thread after the step in progress and wait for it up to `timeout_s`.

        Requests that still wait or run are reported as cancelled.
        """
        self._post(_Stop())
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        elif self._thread.ident is None:
            self._leaving.close()

    def submit(self, request: GenerationRequest) -> None:
        """Hand a request to the engine.

        Raises PromptTooLong when prompt and `max_new_tokens` do not fit, InvalidRequest for an adapter that is not
        served, EngineDead when nobody would serve it, ValueError for unresolved sampling or an id that is in use.
        """
        self._submit(request, None)

    def generate(self, requests: Sequence[GenerationRequest], timeout_s: float) -> Iterator[RequestOutput]:
        """Submit requests and return their outputs as they come, of each up to the one with `finish`.

        For callers that wait themselves: the outbox gets none of these. Raises what `submit` raises, and EngineDead
        when not all has come within `timeout_s`. What has not ended then, or when the iterator is closed, is cancelled.
        """
        give_up_at = time.monotonic() + timeout_s
        reader: _Reader = queue.SimpleQueue()
        unfinished: set[str] = set()
        try:
            for request in requests:
                self._submit(request, reader)
                unfinished.add(request.request_id)
        except BaseException:
            self._cancel_all(unfinished)
            raise
        return self._read(reader, unfinished, give_up_at, timeout_s)

    def cancel(self, request_id: str) -> None:
        """End a request between two steps, waiting or running. An unknown or finished one is left alone."""
        self._post(_Cancel(request_id))

    def _submit(self, request: GenerationRequest, reader: _Reader | None) -> None:
        if request.sampling.max_new_tokens is None or request.sampling.seed is None:
            raise ValueError("sampling is not resolved: max_new_tokens and seed must be set")
        check_length(request.inputs, request.sampling.max_new_tokens, self._row_length, self._context_length)
        # Here, on the caller's thread: it reads every pixel.
        pictures = self._core.cut(request)
        if not self._post(_Submit(request, time.monotonic(), pictures, reader)):
            raise EngineDead("the engine has ended")

    def _read(
        self, reader: _Reader, unfinished: set[str], give_up_at: float, timeout_s: float
    ) -> Iterator[RequestOutput]:
        try:
            while unfinished:
                output = reader.get(timeout=max(0.0, give_up_at - time.monotonic()))
                if output.finish is not None:
                    unfinished.discard(output.request_id)
                yield output
        except queue.Empty:
            raise EngineDead(f"no answer within {timeout_s:.0f} s") from None
        finally:
            self._cancel_all(unfinished)

    def _cancel_all(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.cancel(request_id)

    def _post(self, message: _Submit | _Cancel | _Stop) -> bool:
        """Put a message into the inbox unless its last reading is over; return whether it is in."""
        with self._lock:
            if self._is_open:
                if isinstance(message, _Submit):
                    request_id = message.generation.request_id
                    if request_id in self._readers:
                        raise ValueError(f"a request with the id {request_id} has not ended yet")
                    self._readers[request_id] = message.reader
                self._inbox.put(message)
            return self._is_open

    @torch.inference_mode()
    def _run(self) -> None:
        reason, error = Ended.CANCELLED, None
        try:
            while not self._core.is_dead and self._take_messages():
                if not self._core.scheduler.is_idle:
                    self._emit(self._core.step())
                    self._clock.lap(StepStage.HAND_OVER)
                self._last_step_at = time.monotonic()
        except Exception:
            logger.exception("engine thread failed", extra={"action": "engine.run"})
            self._core.is_dead = True
        if self._core.is_dead:
            reason, error = Ended.FAILED, ErrorInfo.of(ErrorCode.INTERNAL, "the engine died")
        self._leaving.close()
        self._close(reason, error)

    def _take_messages(self) -> bool:
        """Read the inbox; wait for a message when there is nothing to do. Return whether to go on."""
        try:
            is_idle = self._core.scheduler.is_idle
            message = self._inbox.get(timeout=IDLE_TICK_S) if is_idle else self._inbox.get_nowait()
            while True:
                if isinstance(message, _Stop):
                    return False
                self._take(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return True

    def _take(self, message: _Submit | _Cancel) -> None:
        if isinstance(message, _Submit):
            self._core.add(message.generation, message.submitted_at, message.pictures)
        elif (request := self._core.scheduler.find(message.request_id)) is not None:
            self._emit([self._core.end(request, Ended.CANCELLED)])

    def _emit(self, outputs: Sequence[RequestOutput]) -> None:
        """Give each output to whoever waits for its request, what is left to the outbox."""
        others: list[RequestOutput] = []
        for output in outputs:
            if output.finish is None:
                reader = self._readers[output.request_id]
            else:
                # Before the caller gets it, who may then use the id again.
                with self._lock:
                    reader = self._readers.pop(output.request_id)
            if reader is None:
                others.append(output)
            else:
                reader.put(output)
        if others and self._outbox is not None:
            self._outbox(others)

    def _close(self, reason: Ended, error: ErrorInfo | None) -> None:
        """Report every request that has no end yet, those still in the inbox included."""
        with self._lock:
            self._is_open = False
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                break
            if isinstance(message, _Submit):
                self._core.add(message.generation, message.submitted_at, message.pictures)
        self._emit([self._core.end(request, reason, error) for request in self._core.scheduler.everything()])
