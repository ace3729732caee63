"""The composition root: the only place that builds the worker's objects and hands them to each other."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import redis

from api_stub.contract.serving import Serving
from api_stub.contract.wish import Wish
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.settings import redis_address
from worker.engine.config import EngineConfig, PagedConfig, VisionConfig
from worker.engine.engine import Engine
from worker.errors import CannotStart
from worker.jobs.attempt import Attempts
from worker.jobs.circuit import Circuit
from worker.jobs.claim import Claimer
from worker.jobs.metering import JobMeter, StepMeter
from worker.jobs.pipeline import Pipeline
from worker.jobs.served import Served
from worker.lifecycle.consumption import Consumption
from worker.lifecycle.drain import Drain
from worker.lifecycle.engine_slot import EngineSlot
from worker.lifecycle.exchange import Exchange, StartAgain, check_digest, smoke_questions, wished
from worker.lifecycle.health import Health
from worker.lifecycle.heartbeat import Heartbeat
from worker.lifecycle.process import WorkerProcess
from worker.lifecycle.rollout import Rollout, give_up
from worker.lifecycle.self_test import Proofs, try_out
from worker.lifecycle.smoke import ask
from worker.lifecycle.turn import Turn
from worker.lifecycle.watchdog import Finding, Trouble
from worker.media.budget import MemoryBudget
from worker.media.cache import MediaCache
from worker.media.collect import MediaCollector, remove_leftovers
from worker.media_access import media_access
from worker.models.loader import LoadedModel, load
from worker.models.manifest import SmokeQuestion
from worker.models.source import find_model
from worker.observability.metrics import Metrics
from worker.prompting.prepare import PromptBuilder, trial_prompts
from worker.settings import Attention, KVBackend, WorkerSettings
from worker.streaming.publisher import Publisher
from worker.streaming.token_meter import TokenMeter

logger = logging.getLogger(__name__)

REDIS_TIMEOUT_S: Final = 5.0
#: Rows of the KV cache on a CPU when the setting leaves the length to us: longer contexts cost memory at boot.
CPU_MAX_MODEL_LEN: Final = 4096


def build(settings: WorkerSettings, metrics: Metrics | None = None, health: Health | None = None) -> WorkerProcess:
    """Load and warm the model, connect everything.

    Raises CannotStart with a message for the operator, StartAgain when what operators want cannot be served: then
    something else is wanted now.
    """
    metrics, health = metrics or Metrics(settings.model_name), health or Health(REDIS_TIMEOUT_S)
    remove_leftovers()
    ledger = connect(settings)
    make_known(ledger, settings.model_name)
    wish, turn = _wish(ledger, settings.model_name), Turn(ledger.client, settings.model_name, name_of_worker(settings))
    turn.resume()
    try:
        return _assemble(settings, ledger, wish, turn, metrics, health)
    except Exception as error:
        problem = str(error) if isinstance(error, CannotStart) else type(error).__name__
        if give_up(ledger, turn, settings.model_name, wish, problem):
            raise StartAgain(problem) from error  # in another process, with all memory free
        raise


def _assemble(
    settings: WorkerSettings, ledger: Ledger, wish: Wish, turn: Turn, metrics: Metrics, health: Health
) -> WorkerProcess:
    wanted = load_wanted(settings, wish)
    loaded = wanted.loaded
    worker_name = name_of_worker(settings)
    attempts, prompts = Attempts(), prompt_builder(settings, loaded)
    served = Served(
        settings.model_name, serving_of(wanted), lambda adapter: is_wanted(ledger, settings.model_name, adapter)
    )
    step_meter, job_meter = StepMeter(metrics), JobMeter(metrics)
    publisher = Publisher(ledger, TokenMeter(metrics))
    trials = trial_prompts(prompts, loaded.capabilities)

    def make_engine(loaded: LoadedModel) -> Engine:
        config = engine_config(settings, loaded)
        return Engine(loaded.model, loaded.tokenizer, config, publisher.put_step, step_meter, trials)

    engine = EngineSlot(make_engine, loaded)

    def tries(questions: Sequence[SmokeQuestion]) -> None:
        try_out(engine, prompts)
        ask(engine, prompts, questions)

    media = media_access(settings)
    media_cache, memory_budget = MediaCache(settings.media_cache_bytes), MemoryBudget(settings.decoded_bytes)
    circuit = Circuit(
        Proofs(media.fetcher, media.decoders, media.policy, lambda timeout_s: try_out(engine, prompts, timeout_s)),
        job_meter.fell_sick,
    )
    process = WorkerProcess(
        worker_name=worker_name,
        settings=settings,
        ledger=ledger,
        engine=engine,
        publisher=publisher,
        pipeline=Pipeline(
            served=served,
            ledger=ledger,
            attempts=attempts,
            media=MediaCollector(media.fetcher, media.policy, media_cache, media.decoders),
            memory_budget=memory_budget,
            prompts=prompts,
            engine=engine,
            publisher=publisher,
            meter=job_meter,
            circuit=circuit,
            on_engine_dead=lambda: process.fail(Finding(Trouble.ENGINE_DEAD, "a job met a dead engine")),
            max_retries=settings.max_retries,
        ),
        media_cache=media_cache,
        memory_budget=memory_budget,
        decoders=media.decoders,
        tries=lambda: tries(wanted.questions),
        attempts=attempts,
        consumption=Consumption(settings.concurrency),
        health=health,
        metrics=metrics,
        step_meter=step_meter,
        claimer=Claimer(
            ledger,
            worker=worker_name,
            model=settings.model_name,
            served=served,
            on_refusal=job_meter.refused,
        ),
        circuit=circuit,
        drain=Drain(attempts, settings.drain_s),
        heartbeat=heartbeat(settings, ledger, attempts, worker_name, lambda: served.now.to_json()),
    )
    exchange = Exchange(settings, loaded, wish.weights, engine, process.admission, served, tries)
    process.rollout = Rollout(ledger, turn, served, wish, exchange, process.start_again, process.heartbeat.beat)
    return process


def name_of_worker(settings: WorkerSettings) -> str:
    """Return this process's name in the registry of workers; a process that begins anew has the same one."""
    return f"visionq-{settings.model_name}@{socket.gethostname()}-{os.getpid()}"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a worker has loaded. source: as VISIONQ_MODEL names it. questions: the smoke set that it must answer."""

    wish: Wish
    source: str
    loaded: LoadedModel
    questions: Sequence[SmokeQuestion]


def load_wanted(settings: WorkerSettings, wish: Wish) -> Wanted:
    """Load what operators want of this model's workers; without any wish, what the settings say. Raises CannotStart."""
    own = wished(settings, wish)
    questions = smoke_questions(own, find_model(own)) if wish.weights.source else ()
    loaded = load(own)
    if wish.weights.source:
        check_digest(wish, loaded.checkpoint)
    return Wanted(wish, own.model, loaded, questions)


def _wish(ledger: Ledger, model: str) -> Wish:
    try:
        return ledger.wish(model)
    except redis.RedisError as error:
        raise CannotStart(f"VISIONQ_REDIS_URL: what this worker shall serve cannot be read: {error}") from error


def is_wanted(ledger: Ledger, model: str, adapter: str) -> bool:
    """Return whether operators want an adapter served by all workers of a model, or that cannot be known now."""
    try:
        return bool(ledger.wish(model).adapters.get(adapter))
    except redis.RedisError:
        return True


def serving_of(wanted: Wanted) -> Serving:
    """Return what a worker tells about what it has loaded."""
    return Serving(
        checkpoint=wanted.loaded.checkpoint,
        source=wanted.source,
        adapters={adapter.name: adapter.digest for adapter in wanted.loaded.adapters},
        since=time.time(),
        number=wanted.wish.number,
        scores=wanted.wish.weights.scores,
    )


def heartbeat(
    settings: WorkerSettings,
    ledger: Ledger,
    attempts: Attempts,
    worker_name: str,
    serves: Callable[[], str] = lambda: "",
) -> Heartbeat:
    """Return what renews the leases of a process's attempts, on a thread of its own. `serves`: see `Heartbeat`."""
    return Heartbeat(
        ledger,
        ledger.client,
        attempts,
        worker=worker_name,
        model=settings.model_name,
        beat_s=settings.beat_s,
        lease_s=settings.lease_s,
        serves=serves,
    )


def connect(settings: WorkerSettings) -> Ledger:
    """Return the ledger in the settings' Redis. Raises CannotStart when it does not answer."""
    url = settings.redis_url.get_secret_value()
    try:
        ledger = Ledger.connect(url, settings.ledger, timeout_s=REDIS_TIMEOUT_S)
        ledger.client.ping()
    except (redis.RedisError, ValueError) as error:
        raise CannotStart(f"VISIONQ_REDIS_URL: no Redis answers at {redis_address(url)}: {error}") from error
    return ledger


def make_known(ledger: Ledger, model: str) -> None:
    """Publish the model's name before it is loaded, so that gateways take its jobs. The first beat does it again."""
    try:
        ledger.loading(model)
    except redis.RedisError as error:
        logger.warning("model name not announced", extra={"action": "loading", "error": type(error).__name__})


def prompt_builder(settings: WorkerSettings, loaded: LoadedModel) -> PromptBuilder:
    """Return what makes prompts. What its processor can be asked is found out now, not by the first job."""
    prompts = PromptBuilder(loaded, settings.media_options, settings.max_job_pixels)
    _ = prompts.limits
    return prompts


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
    )
    return EngineConfig(
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len or automatic,
        max_num_batched_tokens=num_batched,
        paged=None if settings.kv_backend is KVBackend.SLOTS else sizes,
        runs_ahead=settings.run_ahead.choice,
        adapters=loaded.adapters,
        checkpoint=loaded.checkpoint,
        vision=VisionConfig(settings.vision_cache_bytes, settings.max_vision_batch or (2 if on_cpu else 8)),
        generation=loaded.generation,
    )
