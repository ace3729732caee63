"""A worker's pipeline in this process. Redis, ledger, publisher, heartbeat, circuit breaker and meters are real.

Engine, media and prompts are fakes that behave as the real ones promise, and fail when a test says so.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image

from api_stub.contract import names
from api_stub.contract.conversation import Turn
from api_stub.contract.error import ErrorInfo
from api_stub.contract.event import FinalBody, OutputDelta, RetryReason, parse_event
from api_stub.contract.job import Job, TaskName, VqaJob
from api_stub.contract.media import MediaOptions
from api_stub.contract.result import FinishReason
from api_stub.contract.serving import Serving
from api_stub.contract.view import JobView
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Claim, Finished, Publication
from tests.servers import eventually
from tests.unit.api_stub.ledger_kit import claimed
from worker.engine.request import Ended, Finish, GenerationRequest, RequestOutput
from worker.errors import Component
from worker.jobs.attempt import Attempts
from worker.jobs.circuit import MAX_PAUSE_S, Circuit
from worker.jobs.claim import ClaimedJob
from worker.jobs.metering import JobMeter
from worker.jobs.pipeline import Pipeline
from worker.jobs.served import Served
from worker.lifecycle.drain import Drain
from worker.lifecycle.heartbeat import Heartbeat
from worker.media.budget import MemoryBudget
from worker.media.collect import AnyMediaPart, Collected, MediaCollector
from worker.media.types import DecodedImage, DecodedMedia
from worker.models.inputs import ModelInputs
from worker.observability.metrics import Metrics
from worker.prompting.prepare import PromptBuilder
from worker.streaming.publisher import Publisher
from worker.streaming.token_meter import TokenMeter

NUM_PROMPT_TOKENS = 9
ASKED = {"question": "What colour is it?", "media": ("s3://media/a.png",)}


class FakeLedger(Ledger):
    """A ledger that cannot reach its Redis for the next `num_failures` endings, and publishes nothing at all when
    `publish_error` is set.
    """

    num_failures = 0
    error: Exception
    publish_error: Exception | None = None

    def finish(self, job_id: str, fence: int, body: FinalBody) -> Finished:
        self._fail()
        return super().finish(job_id, fence, body)

    def give_back(
        self, job_id: str, fence: int, reason: RetryReason, delay_s: float = 0.0, is_charged: bool = False
    ) -> bool:
        self._fail()
        return super().give_back(job_id, fence, reason, delay_s, is_charged)

    def publish(self, publications: Sequence[Publication]) -> tuple[bool, ...]:
        if self.publish_error is not None:
            raise self.publish_error
        return super().publish(publications)

    def _fail(self) -> None:
        if self.num_failures:
            self.num_failures -= 1
            raise self.error


class FakeEngine:
    """Generates `texts`, one token each, and ends with `reason`; with None it generates on until it is cancelled.

    refusal: what `submit` raises. is_deaf: it does not answer `cancel`. dies: it is gone once it has a request.
    """

    def __init__(self, put_step: Callable[[Sequence[RequestOutput]], None]) -> None:
        self._put_step = put_step
        self._running: set[str] = set()
        self.is_alive = True
        self.texts: Sequence[str] = ("It is ", "blue")
        self.reason: FinishReason | Ended | None = FinishReason.STOP
        self.error: ErrorInfo | None = None
        self.refusal: Exception | None = None
        self.is_deaf = self.dies = False
        self.num_submitted = 0
        self.cancelled: list[str] = []

    def submit(self, request: GenerationRequest) -> None:
        self.num_submitted += 1
        if self.refusal is not None:
            raise self.refusal
        self._running.add(request.request_id)
        offset = 0
        for text in self.texts:
            self._put_step([RequestOutput(request.request_id, text, offset, 1)])
            offset += len(str(text))
        if self.reason is not None:
            self._end(request.request_id, self.reason)
        self.is_alive = not self.dies

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        if request_id in self._running and not self.is_deaf:
            self._end(request_id, Ended.CANCELLED)

    def _end(self, request_id: str, reason: FinishReason | Ended) -> None:
        self._running.discard(request_id)
        finish = Finish(reason, NUM_PROMPT_TOKENS, len(self.texts), 0.1, 0.1, self.error)
        self._put_step([RequestOutput(request_id, "", 0, 0, finish=finish)])


class FakeMedia(MediaCollector):
    """Every URI is a small picture. error: what reading it raises. meanwhile: what happens while it is read."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.meanwhile: Callable[[], None] = lambda: None

    def most_decoded_bytes(self, parts: Sequence[AnyMediaPart], *, task: TaskName, num_frames: int) -> int:
        return 1_000 * len(parts)

    def collect(
        self,
        parts: Sequence[AnyMediaPart],
        *,
        task: TaskName,
        num_frames: int,
        should_stop: Callable[[], None],
        on_progress: Callable[[int, int], None],
    ) -> Collected:
        on_progress(0, len(parts))
        self.meanwhile()
        should_stop()
        if self.error is not None:
            raise self.error
        on_progress(len(parts), len(parts))
        return Collected([DecodedImage(Image.new("RGB", (8, 8))) for _ in parts], 0.0, 100)


class FakePrompts(PromptBuilder):
    """Every prompt has `NUM_PROMPT_TOKENS`. refusal: what a job is refused with; error: what it breaks with."""

    def __init__(self) -> None:
        self.refusal: Exception | None = None
        self.error: BaseException | None = None

    def turns(self, job: Job) -> tuple[Turn, ...]:
        if self.refusal is not None:
            raise self.refusal
        return job.turns("Describe it.")

    def prepare(
        self, turns: Sequence[Turn], media: Sequence[DecodedMedia], options: MediaOptions | None = None
    ) -> ModelInputs:
        if self.error is not None:
            raise self.error
        tensors = {"input_ids": torch.zeros(1, NUM_PROMPT_TOKENS, dtype=torch.long)}
        return ModelInputs(tensors, num_images=len(media))


class Worker:
    """The pipeline and what it is built of."""

    def __init__(self, ledger: FakeLedger, max_retries: int = 2) -> None:
        self.ledger = ledger
        self.metrics = Metrics("default")
        self.publisher = Publisher(ledger, TokenMeter(self.metrics))
        self.engine = FakeEngine(self.publisher.put_step)
        self.media, self.prompts = FakeMedia(), FakePrompts()
        self.memory_budget = MemoryBudget(10_000)
        self.attempts = Attempts()
        self.drain = Drain(self.attempts, drain_s=60)
        self.heartbeat = Heartbeat(
            ledger, ledger.client, self.attempts, worker="worker-1", model="default", beat_s=60,
            lease_s=ledger.config.lease_s,
        )  # fmt: skip
        self.wanted: set[str] = set()  # adapters that operators want served
        self.is_sound = True
        self.num_engine_dead = 0
        meter = JobMeter(self.metrics)
        self.clock_s = 0.0
        self.circuit = Circuit(self._proves, meter.fell_sick, clock=lambda: self.clock_s)
        self.pipeline = Pipeline(
            served=Served("default", Serving(), lambda adapter: adapter in self.wanted),
            ledger=ledger,
            attempts=self.attempts,
            media=self.media,
            memory_budget=self.memory_budget,
            prompts=self.prompts,
            engine=self.engine,
            publisher=self.publisher,
            meter=meter,
            circuit=self.circuit,
            on_engine_dead=self._note_engine_dead,
            max_retries=max_retries,
        )

    def claim(self, **fields: object) -> Claim:
        """Submit a job about one picture and claim it."""
        job_id = str(uuid.uuid4())
        self.ledger.submit(job_id, VqaJob.model_validate(ASKED | fields).resolved(job_id))
        return claimed(self.ledger, job_id)

    def run(self, claim: Claim, problem: str | None = None) -> None:
        """Run a claimed job on this thread. Whatever becomes of it, the worker keeps nothing of it."""
        self.pipeline.run(ClaimedJob(claim, problem))
        assert len(self.attempts) == 0
        assert self.memory_budget.stats().num_bytes == 0

    @contextmanager
    def running(self, claim: Claim) -> Iterator[None]:
        """A context in which a job generates, and its text has reached its readers; at its end the job ends too."""
        thread = threading.Thread(target=self.run, args=(claim,), daemon=True)
        thread.start()
        eventually(lambda: self.text(claim.job_id) == "".join(self.engine.texts), what="all text in the job's events")
        yield
        thread.join(30)
        assert not thread.is_alive()

    def open_circuit(self, *, is_due: bool = False) -> None:
        """Let the circuit breaker open, as if storage had refused another job; `is_due`: one job may try."""
        self.circuit.fault(Component.STORAGE, "another", "InvalidAccessKeyId", is_proven=True)
        self.clock_s += MAX_PAUSE_S if is_due else 0.0

    def text(self, job_id: str) -> str:
        """The text that readers of the job's events have."""
        seen = [parse_event(fields["event"]) for _, fields in self.ledger.client.xrange(names.events_key(job_id))]
        return "".join(event.text for event in seen if isinstance(event, OutputDelta))

    def view(self, job_id: str) -> JobView:
        view = self.ledger.view(job_id)
        assert view is not None
        return view

    def count(self, name: str, **labels: str) -> float:
        """The value of a metric."""
        value = self.metrics.registry.get_sample_value(f"visionq_{name}", {"model_name": "default"} | labels)
        return value or 0.0

    def _proves(self, component: Component) -> bool:
        return self.is_sound

    def _note_engine_dead(self) -> None:
        self.num_engine_dead += 1
