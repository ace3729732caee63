"""The composition root: the only place that builds the worker's objects and hands them to each other."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import redis

from api_stub.contract import names
from api_stub.contract.redis_url import redis_address
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.reaper import Reaper
from api_stub.ledger.rows import Bell
from worker.answers import Answers
from worker.engine.backend import PagedConfig
from worker.engine.engine import Engine, EngineConfig
from worker.engine.request import RequestOutput
from worker.engine.vision import VisionConfig
from worker.errors import CannotStart, WorkerError
from worker.intake import Intake
from worker.lifecycle.attempt import Attempts
from worker.lifecycle.consumption import Consumption
from worker.lifecycle.drain import Drain
from worker.lifecycle.health import Health, Vitals
from worker.lifecycle.heartbeat import Heartbeat
from worker.lifecycle.watchdog import (
    FROZEN_MARGIN_S,
    EngineWatch,
    Finding,
    QueueWatch,
    ThreadWatch,
    Trouble,
    Watchdog,
    end_within,
    look_s,
)
from worker.media.cache import MediaCache
from worker.media.collect import MediaCollector
from worker.media.decoder_process import DecodeLimits
from worker.media.decoders import Decoders
from worker.media.fetch import MediaFetcher, s3_client
from worker.media.policy import PIXEL_BYTES, MediaPolicy
from worker.media.room import Room
from worker.media.scratch import remove_leftovers
from worker.metering import JobMeter, StepMeter, TimedStep, TokenMeter, engine_readings, media_readings
from worker.models.loader import LoadedModel, load
from worker.observability.metrics import Metrics
from worker.pipeline import Pipeline
from worker.prompting.prepare import PromptBuilder
from worker.settings import Attention, KVBackend, Switch, WorkerSettings
from worker.streaming.publisher import Publisher
from worker.tryout import TriedOut, try_out

logger = logging.getLogger(__name__)

REDIS_TIMEOUT_S: Final = 5.0
STOP_TIMEOUT_S: Final = 5.0
#: A worker that gives up and has nothing to wait for ends by itself in this time, else by force.
LAST_RESORT_S: Final = 30.0
#: Rows of the KV cache on a CPU when the setting leaves the length to us: longer contexts cost memory at boot.
CPU_MAX_MODEL_LEN: Final = 4096


@dataclass(slots=True)
class Runtime:
    """A worker's living parts. `ring` is set by the process that owns the Celery app, before `on_ready`."""

    worker_name: str
    settings: WorkerSettings
    ledger: Ledger
    engine: Engine
    publisher: Publisher[TimedStep]
    pipeline: Pipeline
    intake: Intake
    drain: Drain
    heartbeat: Heartbeat
    media_cache: MediaCache
    room: Room
    decoders: Decoders
    try_out: Callable[[], TriedOut]
    attempts: Attempts
    consumption: Consumption
    health: Health
    metrics: Metrics
    step_meter: StepMeter
    token_meter: TokenMeter
    exit_status: int = 0
    ring: Callable[[Bell], None] | None = None
    watchdog: Watchdog = field(init=False)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        settings = self.settings
        watches = (
            EngineWatch(self.engine, settings.stall_s),
            ThreadWatch(Trouble.PUBLISHER_DEAD, lambda: self.publisher.is_alive),
            QueueWatch(self.consumption, self._queue_length, settings.mute_s),
        )
        self.watchdog = Watchdog(
            watches,
            self.fail,
            interval_s=look_s(min(settings.stall_s, settings.mute_s)),
            frozen_s=settings.stall_s + FROZEN_MARGIN_S,
        )

    def start(self) -> None:
        """Start what works beside the jobs, and answer one prompt, so that the first job finds everything warm.

        Raises CannotStart when the model cannot answer or media cannot be decoded.
        """
        self.decoders.start()
        self.engine.start()
        self.publisher.start()
        try:
            self.try_out()
        except WorkerError as error:
            raise CannotStart(f"VISIONQ_MODEL: the model does not answer: {error}") from error
        self.decoders.wait_ready()
        self.step_meter.is_on = self.token_meter.is_on = True
        self.health.serve(self.vitals)
        self.metrics.read_at_scrape(self.readings)

    def on_ready(self) -> None:
        """The worker consumes: start heartbeats, the watchdog and the reaper."""
        self.heartbeat.start()
        self.watchdog.start()
        if self.ring is not None:
            reaper = Reaper(self.ledger, self.ring, self.settings.sweep_s)
            threading.Thread(target=reaper.run, args=(self._stopping,), name="reaper", daemon=True).start()
        logger.info("worker ready", extra={"action": "ready", "worker": self.worker_name})

    def fail(self, finding: Finding) -> None:
        """End the process so that a supervisor restarts it: as SIGTERM does, but with a failing exit status.

        Only a worker that is mute can still finish what it runs. Any thread, more than once.
        """
        if not self.health.fail(finding):
            return
        facts = {"action": "fail", "trouble": finding.trouble.value, "facts": finding.facts}
        logger.critical("worker gives up", extra=facts)
        self.exit_status = 1
        may_finish = finding.trouble is Trouble.MUTE
        end_within(LAST_RESORT_S + (self.settings.drain_s if may_finish else 0.0))
        was_draining = self.drain.is_draining
        self.drain.begin()
        if not may_finish:
            self.drain.give_back()
        if not was_draining:
            os.kill(os.getpid(), signal.SIGTERM)

    def vitals(self) -> Vitals:
        """Return what probes want to know."""
        return Vitals(
            is_engine_alive=self.engine.is_alive,
            is_publisher_alive=self.publisher.is_alive,
            is_consuming=self.consumption.is_consuming,
            is_draining=self.drain.is_draining,
            redis_silent_s=round(time.monotonic() - self.heartbeat.last_beat_at, 3),
            num_held=len(self.attempts),
            num_running=self.engine.num_running,
            num_waiting=self.engine.num_waiting,
        )

    def readings(self) -> Mapping[str, float]:
        """Return the metrics that others keep."""
        own = {
            "num_jobs_held": len(self.attempts),
            "num_slots": self.consumption.num_slots,
            "redis_silent_seconds": time.monotonic() - self.heartbeat.last_beat_at,
            "is_ready": self.health.readiness().is_good,
            "is_draining": self.drain.is_draining,
        }
        media = media_readings(self.media_cache.stats(), self.room.stats())
        return own | dict(engine_readings(self.engine)) | dict(media)

    def _queue_length(self) -> int:
        with self.ledger.client.pipeline(transaction=False) as pipe:
            for step in names.PRIORITY_STEPS:
                pipe.llen(names.queue_list(self.settings.model_name, step))
            return sum(pipe.execute())

    def stop(self) -> None:
        """Stop everything, in the order in which work flows."""
        self._stopping.set()
        self.watchdog.stop(STOP_TIMEOUT_S)
        self.intake.close()
        self.decoders.close()
        self.engine.stop(STOP_TIMEOUT_S)
        self.publisher.stop(STOP_TIMEOUT_S)
        self.heartbeat.stop(STOP_TIMEOUT_S)


def build(settings: WorkerSettings, metrics: Metrics | None = None, health: Health | None = None) -> Runtime:
    """Load and warm the model, connect everything. Raises CannotStart with a message for the operator."""
    metrics, health = metrics or Metrics(settings.model_name), health or Health(REDIS_TIMEOUT_S)
    remove_leftovers()
    ledger = connect(settings)
    loaded = load(settings)
    worker_name = f"visionq-{settings.model_name}@{socket.gethostname()}-{os.getpid()}"
    attempts, answers, prompts = Attempts(), Answers(), PromptBuilder(loaded)
    step_meter, token_meter, job_meter = StepMeter(metrics), TokenMeter(metrics), JobMeter(metrics)
    publisher: Publisher[TimedStep] = Publisher(ledger, token_meter.watching(answers.translate))

    def outbox(outputs: list[RequestOutput]) -> None:
        publisher.put_step(TimedStep(outputs, time.monotonic()))

    engine = Engine(loaded.model, loaded.tokenizer, engine_config(settings, loaded), outbox, step_meter)
    policy = media_policy(settings)
    media_cache, room = MediaCache(settings.media_cache_bytes), Room(settings.decoded_bytes)
    decoders = Decoders(
        settings.num_decode_processes,
        DecodeLimits(settings.decode_memory_bytes, settings.decode_image_s, settings.decode_video_s),
    )
    fetcher = MediaFetcher(
        s3_client(settings.s3_endpoint_url, settings.s3_region, settings.storage_timeout_s),
        policy,
        retries=settings.storage_retries,
    )
    runtime = Runtime(
        worker_name=worker_name,
        settings=settings,
        ledger=ledger,
        engine=engine,
        publisher=publisher,
        pipeline=Pipeline(
            model=settings.model_name,
            ledger=ledger,
            attempts=attempts,
            answers=answers,
            media=MediaCollector(fetcher, policy, media_cache, decoders),
            room=room,
            prompts=prompts,
            engine=engine,
            events=publisher,
            meter=job_meter,
            on_engine_dead=lambda: runtime.fail(Finding(Trouble.ENGINE_DEAD, "a job met a dead engine")),
            max_retries=settings.max_retries,
        ),
        media_cache=media_cache,
        room=room,
        decoders=decoders,
        try_out=lambda: try_out(engine, prompts, answers),
        attempts=attempts,
        consumption=Consumption(settings.concurrency),
        health=health,
        metrics=metrics,
        step_meter=step_meter,
        token_meter=token_meter,
        intake=Intake(ledger, worker=worker_name, model=settings.model_name, on_refusal=job_meter.refused),
        drain=Drain(attempts, settings.drain_s),
        heartbeat=Heartbeat(
            ledger,
            ledger.client,
            attempts,
            worker=worker_name,
            model=settings.model_name,
            beat_s=settings.beat_s,
            lease_s=settings.lease_s,
        ),
    )
    return runtime


def connect(settings: WorkerSettings) -> Ledger:
    """Return the ledger in the settings' Redis. Raises CannotStart when it does not answer."""
    url = settings.redis_url.get_secret_value()
    try:
        ledger = Ledger.connect(url, settings.ledger, timeout_s=REDIS_TIMEOUT_S)
        ledger.client.ping()
    except (redis.RedisError, ValueError) as error:
        raise CannotStart(f"VISIONQ_REDIS_URL: no Redis answers at {redis_address(url)}: {error}") from error
    return ledger


def engine_config(settings: WorkerSettings, loaded: LoadedModel) -> EngineConfig:
    """Return the engine's limits: the setting, else the checkpoint's context (bounded on a CPU)."""
    context = loaded.max_context
    if settings.max_model_len > context:
        raise CannotStart(f"VISIONQ_MAX_MODEL_LEN: {settings.max_model_len} is above the model's context of {context}")
    on_cpu = loaded.device.type == "cpu"
    automatic = min(context, CPU_MAX_MODEL_LEN) if on_cpu else context
    num_batched = settings.max_num_batched_tokens or max(512 if on_cpu else 2048, 2 * settings.max_num_seqs)
    if num_batched <= settings.max_num_seqs:
        raise CannotStart(
            f"VISIONQ_MAX_NUM_BATCHED_TOKENS: {num_batched} leaves nothing for prompts beside "
            f"VISIONQ_MAX_NUM_SEQS={settings.max_num_seqs}"
        )
    sizes = PagedConfig(
        settings.kv_block_size,
        settings.kv_blocks,
        settings.kv_memory_fraction,
        tries_kernels=settings.attention in (Attention.AUTO, Attention.FLASH),
        records=settings.cuda_graphs.choice,
        compiles=settings.compile_decode is Switch.ON,
    )
    return EngineConfig(
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len or automatic,
        max_num_batched_tokens=num_batched,
        paged=None if settings.kv_backend is KVBackend.SLOTS else sizes,
        runs_ahead=settings.run_ahead.choice,
        vision=VisionConfig(settings.vision_cache_bytes, settings.max_vision_batch or (2 if on_cpu else 8)),
    )


def media_policy(settings: WorkerSettings) -> MediaPolicy:
    """Return the limits for media. Nothing may be larger than the room for all jobs."""
    most_pixels = min(settings.max_job_pixels, settings.decoded_bytes // PIXEL_BYTES)
    return MediaPolicy(
        buckets=settings.readable_buckets,
        max_image_bytes=settings.max_image_bytes,
        max_image_pixels=min(settings.max_image_pixels, most_pixels),
        max_video_bytes=settings.max_video_bytes,
        max_video_seconds=settings.max_video_seconds,
        max_job_bytes=settings.max_job_media_bytes,
        max_clip_pixels=most_pixels,
        max_job_pixels=most_pixels,
    )
