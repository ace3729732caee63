"""The engine: one thread that batches requests continuously. Going down is a call, coming up is a queue.

A library of its own: tensors in, token outputs out; it knows no broker, no storage and no images.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from api_stub.contract.error import ErrorCode, ErrorInfo
from worker.engine.batch import PrefixStats, VisionStats
from worker.engine.config import EngineConfig, SchedulerLimits
from worker.engine.core import EngineCore
from worker.engine.model_hooks import ModelClaim
from worker.engine.pictures import Picture
from worker.engine.request import Ended, GenerationRequest, RequestOutput
from worker.engine.runner.build import build_runner
from worker.engine.step_times import Stage, StepClock
from worker.errors import EngineDead, PromptTooLong
from worker.models.inputs import ModelInputs

logger = logging.getLogger(__name__)

#: An idle engine shows a sign of life this often.
IDLE_TICK_S = 1.0


@dataclass(frozen=True, slots=True)
class _Submit:
    generation: GenerationRequest
    submitted_at: float
    pictures: Sequence[Picture]


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_id: str


class _Stop:
    pass


class Engine:
    """Serves one model, alone. `start` it once, `submit` and `cancel` from any thread, `stop` it once.

    `outbox` is called on the engine thread with all outputs of one step and must return at once: decoding waits for
    it. Every submitted request gets exactly one output with `finish`, also when it is cancelled, when the engine
    stops and when it dies. `clock` is told where the time of the steps goes. About `trials` the engine must answer as
    the model's own `generate` does. Raises CannotStart, see `build_runner`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EngineConfig,
        outbox: Callable[[list[RequestOutput]], None],
        clock: StepClock | None = None,
        trials: Sequence[ModelInputs] = (),
    ) -> None:
        limits = SchedulerLimits(config.max_num_seqs, config.max_num_batched_tokens)
        self._claim = ModelClaim(model)
        try:
            runner = build_runner(model, config.max_num_seqs, config.max_model_len, config.paged, config.vision, trials)
        except BaseException:
            self._claim.give_up()
            raise
        self._runner = runner
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
        # Guards `_is_open` and `_request_ids`: nothing may enter the inbox after its last reading, or twice.
        self._door = threading.Lock()
        self._is_open = True
        self._request_ids: set[str] = set()
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
            self._claim.give_up()

    def submit(self, request: GenerationRequest) -> None:
        """Hand a request to the engine.

        Raises PromptTooLong when prompt and `max_new_tokens` do not fit, EngineDead when nobody would serve it and
        ValueError for sampling that is not resolved or an id that another request has which has not ended.
        """
        if request.sampling.max_new_tokens is None or request.sampling.seed is None:
            raise ValueError("sampling is not resolved: max_new_tokens and seed must be set")
        self._check_length(request.inputs, request.sampling.max_new_tokens)
        # Here, on the caller's thread: it reads every pixel.
        pictures = self._core.cut(request.inputs)
        if not self._post(_Submit(request, time.monotonic(), pictures)):
            raise EngineDead("the engine has ended")

    def cancel(self, request_id: str) -> None:
        """End a request between two steps, waiting or running. An unknown or finished one is left alone."""
        self._post(_Cancel(request_id))

    def _post(self, message: _Submit | _Cancel | _Stop) -> bool:
        """Put a message into the inbox unless its last reading is over; return whether it is in."""
        with self._door:
            if self._is_open:
                if isinstance(message, _Submit):
                    self._enter(message.generation.request_id)
                self._inbox.put(message)
            return self._is_open

    def _enter(self, request_id: str) -> None:
        if request_id in self._request_ids:
            raise ValueError(f"a request with the id {request_id} has not ended yet")
        self._request_ids.add(request_id)

    def _check_length(self, inputs: ModelInputs, max_new_tokens: int) -> None:
        num_tokens = inputs.num_prompt_tokens + max_new_tokens
        limits = [(self._row_length, "the engine's rows of {} tokens")]
        if self._context_length is not None:
            limits.append((self._context_length, "the model's context of {} tokens"))
        limit, name = min(limits)
        if num_tokens > limit:
            raise PromptTooLong(
                f"prompt of {inputs.num_prompt_tokens} tokens and max_new_tokens of {max_new_tokens} make "
                f"{num_tokens}, more than {name.format(limit)}{inputs.cost_of_media}"
            )

    @torch.inference_mode()
    def _run(self) -> None:
        reason, error = Ended.CANCELLED, None
        try:
            while not self._core.is_dead and self._take_messages():
                if not self._core.scheduler.is_idle:
                    self._tell(self._core.step())
                    self._clock.lap(Stage.HAND_OVER)
                self._last_step_at = time.monotonic()
        except Exception:
            logger.exception("engine thread failed", extra={"action": "engine.run"})
            self._core.is_dead = True
        if self._core.is_dead:
            reason, error = Ended.FAILED, ErrorInfo.of(ErrorCode.INTERNAL, "the engine died")
        self._claim.give_up()
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
            return
        request = self._core.scheduler.find(message.request_id)
        if request is not None:
            self._tell([self._core.end(request, Ended.CANCELLED)])

    def _tell(self, outputs: list[RequestOutput]) -> None:
        if not outputs:
            return
        ended = [output.request_id for output in outputs if output.finish is not None]
        if ended:
            # Before anybody is told, who may then use the id again.
            with self._door:
                self._request_ids.difference_update(ended)
        self._outbox(outputs)

    def _close(self, reason: Ended, error: ErrorInfo | None) -> None:
        """Report every request that has no end yet, those still in the inbox included."""
        with self._door:
            self._is_open = False
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                break
            if isinstance(message, _Submit):
                self._core.add(message.generation, message.submitted_at, message.pictures)
        self._tell([self._core.end(request, reason, error) for request in self._core.scheduler.everything()])
