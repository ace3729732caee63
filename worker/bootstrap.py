"""The composition root: the only place that builds the worker's objects and hands them to each other."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import redis

from api_stub.contract.redis_url import redis_address
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.reaper import Reaper
from api_stub.ledger.rows import Bell
from worker.answers import Answers
from worker.engine.backend import PagedConfig
from worker.engine.engine import Engine, EngineConfig
from worker.engine.request import RequestOutput
from worker.errors import CannotStart, WorkerError
from worker.intake import Intake
from worker.lifecycle.attempt import Attempts
from worker.lifecycle.drain import Drain
from worker.lifecycle.heartbeat import Heartbeat
from worker.media.cache import MediaCache
from worker.media.collect import MediaCollector
from worker.media.decoder_process import DecodeLimits
from worker.media.decoders import Decoders
from worker.media.fetch import MediaFetcher, s3_client
from worker.media.policy import MediaPolicy
from worker.media.scratch import remove_leftovers
from worker.models.loader import LoadedModel, load
from worker.pipeline import Pipeline
from worker.prompting.prepare import PromptBuilder
from worker.settings import KVBackend, WorkerSettings
from worker.streaming.publisher import Publisher
from worker.tryout import TriedOut, try_out

logger = logging.getLogger(__name__)

REDIS_TIMEOUT_S: Final = 5.0
STOP_TIMEOUT_S: Final = 5.0
#: Rows of the KV cache on a CPU when the setting leaves the length to us: longer contexts cost memory at boot.
CPU_MAX_MODEL_LEN: Final = 4096


@dataclass(slots=True)
class Runtime:
    """A worker's living parts. `ring` is set by the process that owns the Celery app, before `on_ready`."""

    worker_name: str
    settings: WorkerSettings
    ledger: Ledger
    engine: Engine
    publisher: Publisher[list[RequestOutput]]
    pipeline: Pipeline
    intake: Intake
    drain: Drain
    heartbeat: Heartbeat
    media_cache: MediaCache
    decoders: Decoders
    try_out: Callable[[], TriedOut]
    exit_status: int = 0
    ring: Callable[[Bell], None] | None = None
    _stopping: threading.Event = field(default_factory=threading.Event)

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

    def on_ready(self) -> None:
        """The worker consumes: start heartbeats and the reaper."""
        self.heartbeat.start()
        if self.ring is not None:
            reaper = Reaper(self.ledger, self.ring, self.settings.sweep_s)
            threading.Thread(target=reaper.run, args=(self._stopping,), name="reaper", daemon=True).start()
        logger.info("worker ready", extra={"action": "ready", "worker": self.worker_name})

    def stop(self) -> None:
        """Stop everything, in the order in which work flows."""
        self._stopping.set()
        self.intake.close()
        self.decoders.close()
        self.engine.stop(STOP_TIMEOUT_S)
        self.publisher.stop(STOP_TIMEOUT_S)
        self.heartbeat.stop(STOP_TIMEOUT_S)


def build(settings: WorkerSettings) -> Runtime:
    """Load and warm the model, connect everything. Raises CannotStart with a message for the operator."""
    remove_leftovers()
    ledger = connect(settings)
    loaded = load(settings)
    worker_name = f"visionq-{settings.model_name}@{socket.gethostname()}-{os.getpid()}"
    attempts, answers, prompts = Attempts(), Answers(), PromptBuilder(loaded)
    publisher: Publisher[list[RequestOutput]] = Publisher(ledger, answers.translate)
    engine = Engine(loaded.model, loaded.tokenizer, engine_config(settings, loaded), publisher.put_step)
    policy = media_policy(settings)
    media_cache = MediaCache(settings.media_cache_bytes)
    decoders = Decoders(
        settings.num_decode_processes, DecodeLimits(settings.decode_memory_bytes, settings.decode_timeout_s)
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
            prompts=prompts,
            engine=engine,
            events=publisher,
            on_engine_dead=lambda: die(runtime),
        ),
        media_cache=media_cache,
        decoders=decoders,
        try_out=lambda: try_out(engine, prompts, answers),
        intake=Intake(ledger, worker=worker_name, model=settings.model_name),
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


def die(runtime: Runtime) -> None:
    """End the process so that a supervisor restarts it: as SIGTERM does, but with a failing exit status."""
    runtime.exit_status = 1
    os.kill(os.getpid(), signal.SIGTERM)


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
    sizes = PagedConfig(settings.kv_block_size, settings.kv_blocks, settings.kv_memory_fraction)
    return EngineConfig(
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len or automatic,
        max_num_batched_tokens=num_batched,
        paged=None if settings.kv_backend is KVBackend.SLOTS else sizes,
    )


def media_policy(settings: WorkerSettings) -> MediaPolicy:
    """Return the limits for media."""
    return MediaPolicy(
        buckets=settings.readable_buckets,
        max_image_bytes=settings.max_image_bytes,
        max_image_pixels=settings.max_image_pixels,
        max_video_bytes=settings.max_video_bytes,
        max_video_seconds=settings.max_video_seconds,
        max_job_bytes=settings.max_job_media_bytes,
        max_job_pixels=settings.max_job_pixels,
    )
