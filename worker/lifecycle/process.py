"""A worker's living parts: starts and stops them in order, tells how they are, ends the process when they are ill."""

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
from worker.lifecycle.drain import Consumption, Drain
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
#: A worker that gives up and has nothing to wait for ends by itself in this time, else by force.
LAST_RESORT_S: Final = 30.0
#: One call of a silent Redis costs the publisher several timeouts, whatever an engine's steps take.
MIN_PUBLISHER_STALL_S: Final = 60.0


@dataclass(slots=True)
class WorkerProcess:
    """A worker's living parts."""

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
            QueueWatch(self.consumption, self._num_to_take, settings.mute_s),
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
        self.step_meter.is_on = True
        self.health.serve(self.vitals)
        self.metrics.read_at_scrape(self.readings)

    def on_ready(self) -> None:
        """The worker consumes: start heartbeats, the watchdog and the reaper."""
        self.heartbeat.start()
        self.watchdog.start()
        reaper = Reaper(self.ledger, self.settings.sweep_s)
        threading.Thread(target=reaper.run, args=(self._stopping,), name="reaper", daemon=True).start()
        logger.info("worker ready", extra={"action": "ready", "worker": self.worker_name})

    def leave_unanswered(self, job_ids: Sequence[str]) -> None:
        """Doorbells are left behind by a connection to the broker. When the worker ends, too, others take the jobs.

        One that goes on still has them on its threads.
        """
        if self.drain.is_draining:
            self.claimer.decline(job_ids)

    def fail(self, finding: Finding) -> None:
        """End the process so that a supervisor restarts it: as SIGTERM does, but with a failing exit status.

        Only a worker that is mute can still finish what it runs. Any thread, more than once.
        """
        may_finish = finding.trouble is Trouble.MUTE
        end_within(LAST_RESORT_S + (self.settings.drain_s if may_finish else 0.0))  # old news, too
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
        """Return what probes want to know."""
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
        """Return the metrics that others keep."""
        own = {
            "num_jobs_held": len(self.attempts),
            "num_slots": self.consumption.num_slots,
            "redis_silent_seconds": time.monotonic() - self.heartbeat.last_beat_at,
            "is_ready": self.health.readiness().is_good,
            "is_draining": self.drain.is_draining,
        }
        media = media_readings(self.media_cache.stats(), self.memory_budget.stats())
        return own | dict(engine_readings(self.engine)) | dict(media)

    def _is_redis_there(self) -> bool:
        return time.monotonic() - self.heartbeat.last_beat_at < self.settings.lease_s

    def _num_to_take(self) -> int:
        if not self.circuit.may_take:
            return 0  # a sick worker leaves the queue to others
        return num_to_take(self.ledger.client, self.settings.model_name, self.drain)

    def stop(self) -> None:
        """Stop everything, in the order in which work flows."""
        self._stopping.set()
        self.watchdog.stop(STOP_TIMEOUT_S)
        if self.exit_status:
            end_within(LAST_RESORT_S)  # the watchdog has taken the timer along
        self.claimer.close()
        self.decoders.close()
        self.engine.stop(STOP_TIMEOUT_S)
        self.publisher.stop(STOP_TIMEOUT_S)
        self.heartbeat.stop(STOP_TIMEOUT_S)


def num_to_take(client: redis.Redis, model: str, drain: Drain) -> int:
    """Return how many messages a worker of `model` should take now: none while it drains.

    Raises redis.RedisError also when Redis answers and refuses writes, because then it hands no message out.
    """
    if drain.is_draining:
        return 0
    with client.pipeline(transaction=False) as pipe:
        pipe.hdel(names.WATCH_KEY, "")  # a write that changes nothing
        for step in names.PRIORITY_STEPS:
            pipe.llen(names.queue_list(model, step))
        return sum(pipe.execute()[1:])
