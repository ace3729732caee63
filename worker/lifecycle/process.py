"""The worker process: starts and stops its threads in order, reports their state, ends itself on a fatal fault.

In: the objects that worker.bootstrap builds. `start` runs before the worker consumes, `on_ready` once it does, `fail`
and `stop` at its end; worker.broker calls them.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import redis

from api_stub.contract import names
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.reaper import Reaper
from worker.engine.engine import Engine
from worker.errors import CannotStart, WorkerError
from worker.jobs.attempt import Attempts
from worker.jobs.circuit import Circuit
from worker.jobs.claim import Claimer
from worker.jobs.metering import StepMeter, engine_readings, media_readings
from worker.jobs.pipeline import Pipeline
from worker.lifecycle.consumption import Consumption
from worker.lifecycle.drain import Drain
from worker.lifecycle.health import Health, Vitals
from worker.lifecycle.heartbeat import Heartbeat
from worker.lifecycle.self_test import TriedOut
from worker.lifecycle.watchdog import (
    FROZEN_MARGIN_S,
    EngineWatch,
    Finding,
    PublisherWatch,
    QueueWatch,
    ThreadWatch,
    Trouble,
    Watchdog,
    end_within,
    look_s,
)
from worker.media.budget import MemoryBudget
from worker.media.cache import MediaCache
from worker.media.decoders import Decoders
from worker.observability.metrics import Metrics
from worker.settings import WorkerSettings
from worker.streaming.publisher import Publisher

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S: Final = 5.0
#: A worker that fails and has no jobs to finish exits within this time, else the process is ended by force.
LAST_RESORT_S: Final = 30.0
#: The publisher's stall limit is no shorter than this: one call to a silent Redis takes it several socket timeouts.
MIN_PUBLISHER_STALL_S: Final = 60.0


@dataclass(slots=True)
class WorkerProcess:
    """The components of one worker process. `exit_status` is not 0 after `fail`."""

    worker_name: str
    settings: WorkerSettings
    ledger: Ledger
    engine: Engine
    publisher: Publisher
    pipeline: Pipeline
    claimer: Claimer
    circuit: Circuit
    drain: Drain
    heartbeat: Heartbeat
    media_cache: MediaCache
    memory_budget: MemoryBudget
    decoders: Decoders
    try_out: Callable[[], TriedOut]
    attempts: Attempts
    consumption: Consumption
    health: Health
    metrics: Metrics
    step_meter: StepMeter
    exit_status: int = 0
    watchdog: Watchdog = field(init=False)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        settings = self.settings
        watches = (
            EngineWatch(self.engine, settings.stall_s),
            ThreadWatch(Trouble.PUBLISHER_DEAD, lambda: self.publisher.is_alive),
            PublisherWatch(self.publisher, self._is_redis_there, max(settings.stall_s, MIN_PUBLISHER_STALL_S)),
            QueueWatch(self.consumption, self._num_consumable, settings.mute_s),
        )
        self.watchdog = Watchdog(
            watches,
            self.fail,
            interval_s=look_s(min(settings.stall_s, settings.mute_s)),
            frozen_s=settings.stall_s + FROZEN_MARGIN_S,
        )

    def start(self) -> None:
        """Start decoders, engine and publisher, and answer one prompt, so that the first job finds everything warm.

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
        self.step_meter.is_on = True
        self.health.serve(self.vitals)
        self.metrics.read_at_scrape(self.readings)

    def on_ready(self) -> None:
        """Start heartbeat, watchdog and reaper. Called when the worker is subscribed to its queue."""
        self.heartbeat.start()
        self.watchdog.start()
        reaper = Reaper(self.ledger, self.settings.sweep_s)
        threading.Thread(target=reaper.run, args=(self._stopping,), name="reaper", daemon=True).start()
        logger.info("worker ready", extra={"action": "ready", "worker": self.worker_name})

    def leave_unanswered(self, job_ids: Sequence[str]) -> None:
        """Ring again for jobs whose doorbells a closed connection to the broker had received, if the worker is ending.

        Otherwise nothing is to be done: the jobs' threads still hold those doorbells.
        """
        if self.drain.is_draining:
            self.claimer.decline(job_ids)

    def fail(self, finding: Finding) -> None:
        """End the process so that a supervisor restarts it: as SIGTERM does, but with a failing exit status.

        Running jobs may finish only when the fault is that nothing is consumed (MUTE); else they are given back. Any
        thread, more than once.
        """
        may_finish = finding.trouble is Trouble.MUTE
        # Also for a fault that is already known: the watchdog's report cancels the timer.
        end_within(LAST_RESORT_S + (self.settings.drain_s if may_finish else 0.0))
        if not self.health.fail(finding):
            return
        facts = {"action": "fail", "trouble": finding.trouble.value, "facts": finding.facts}
        logger.critical("worker gives up", extra=facts)
        self.exit_status = 1
        was_draining = self.drain.is_draining
        self.drain.begin()
        if not may_finish:
            self.drain.give_back()
        if not was_draining:
            os.kill(os.getpid(), signal.SIGTERM)

    def vitals(self) -> Vitals:
        """Return the state that the probes report."""
        return Vitals(
            is_engine_alive=self.engine.is_alive,
            is_publisher_alive=self.publisher.is_alive,
            is_consuming=self.consumption.is_consuming,
            is_draining=self.drain.is_draining,
            sick_of=self.circuit.reason,
            redis_silent_s=round(time.monotonic() - self.heartbeat.last_beat_at, 3),
            redis_refusal=self.heartbeat.refusal,
            num_held=len(self.attempts),
            num_running=self.engine.num_running,
            num_waiting=self.engine.num_waiting,
        )

    def readings(self) -> Mapping[str, float]:
        """Return the metrics that are read at scrape time, by name without prefix."""
        own = {
            "num_jobs_held": len(self.attempts),
            "num_slots": self.consumption.num_threads,
            "redis_silent_seconds": time.monotonic() - self.heartbeat.last_beat_at,
            "is_ready": self.health.readiness().is_good,
            "is_draining": self.drain.is_draining,
        }
        media = media_readings(self.media_cache.stats(), self.memory_budget.stats())
        return own | dict(engine_readings(self.engine)) | dict(media)

    def _is_redis_there(self) -> bool:
        return time.monotonic() - self.heartbeat.last_beat_at < self.settings.lease_s

    def _num_consumable(self) -> int:
        if not self.circuit.may_consume:
            return 0  # an open circuit breaker leaves the queue to other workers
        return num_consumable(self.ledger.client, self.settings.model_name, self.drain)

    def stop(self) -> None:
        """Stop all components, those that pass work on before those that receive it."""
        self._stopping.set()
        self.watchdog.stop(STOP_TIMEOUT_S)
        if self.exit_status:
            end_within(LAST_RESORT_S)  # stopping the watchdog has cancelled the timer
        self.claimer.close()
        self.decoders.close()
        self.engine.stop(STOP_TIMEOUT_S)
        self.publisher.stop(STOP_TIMEOUT_S)
        self.heartbeat.stop(STOP_TIMEOUT_S)


def num_consumable(client: redis.Redis, model: str, drain: Drain) -> int:
    """Return how many messages a worker of `model` could receive now: none while it drains.

    Raises redis.RedisError also when Redis answers but refuses writes, because BRPOP delivers nothing then.
    """
    if drain.is_draining:
        return 0
    with client.pipeline(transaction=False) as pipe:
        pipe.hdel(names.WATCH_KEY, "")  # a write without effect
        for step in names.PRIORITY_STEPS:
            pipe.llen(names.queue_list(model, step))
        return sum(pipe.execute()[1:])
