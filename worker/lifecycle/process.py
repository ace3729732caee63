"""The process of a worker that serves a model: starts and stops its threads in order, and reports their state.

In: the objects that worker.bootstrap builds. `start` runs before the worker consumes; the rest is `JobProcess`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from worker.engine.engine import Engine
from worker.errors import CannotStart, WorkerError
from worker.jobs.metering import StepMeter, engine_readings, media_readings
from worker.lifecycle.health import Vitals
from worker.lifecycle.job_process import STOP_TIMEOUT_S, JobProcess
from worker.lifecycle.self_test import TriedOut
from worker.lifecycle.watchdog import EngineWatch, Watch
from worker.media.budget import MemoryBudget
from worker.media.cache import MediaCache
from worker.media.decoders import Decoders


@dataclass(slots=True, kw_only=True)
class WorkerProcess(JobProcess):
    """The components of one worker process."""

    engine: Engine
    media_cache: MediaCache
    memory_budget: MemoryBudget
    decoders: Decoders
    try_out: Callable[[], TriedOut]
    step_meter: StepMeter

    def watches(self) -> tuple[Watch, ...]:
        """Return what the watchdog looks at."""
        return (EngineWatch(self.engine, self.settings.stall_s), *JobProcess.watches(self))

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
        media = media_readings(self.media_cache.stats(), self.memory_budget.stats())
        return dict(self.own_readings()) | dict(engine_readings(self.engine)) | dict(media)

    def stop_work(self) -> None:
        """Stop decoders, then the engine."""
        self.decoders.close()
        self.engine.stop(STOP_TIMEOUT_S)
