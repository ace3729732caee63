"""The process of a worker that serves a model: starts and stops its threads in order, and reports their state.

In: the objects that worker.bootstrap builds. `start` runs before the worker consumes; the rest is `JobProcess`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from worker.errors import CannotStart, WorkerError
from worker.jobs.metering import StepMeter, engine_readings, media_readings
from worker.lifecycle.engine_slot import EngineSlot
from worker.lifecycle.exchange import StartAgain
from worker.lifecycle.health import Vitals
from worker.lifecycle.job_process import STOP_TIMEOUT_S, JobProcess
from worker.lifecycle.rollout import Rollout
from worker.lifecycle.watchdog import EngineWatch, Watch
from worker.media.budget import MemoryBudget
from worker.media.cache import MediaCache
from worker.media.decoders import Decoders


@dataclass(slots=True, kw_only=True)
class WorkerProcess(JobProcess):
    """The components of one worker process.

    tries: asks the model what it must answer before it serves.
    """

    engine: EngineSlot
    media_cache: MediaCache
    memory_budget: MemoryBudget
    decoders: Decoders
    tries: Callable[[], None]
    step_meter: StepMeter
    rollout: Rollout = field(init=False)

    def watches(self) -> tuple[Watch, ...]:
        """Return what the watchdog looks at."""
        return (EngineWatch(self.engine, self.settings.stall_s), *JobProcess.watches(self))

    def start(self) -> None:
        """Start decoders, engine and publisher, and answer one prompt, so that the first job finds everything warm.

        Raises CannotStart when the model cannot answer or media cannot be decoded, StartAgain when what operators want
        cannot be served: then something else is wanted now.
        """
        self.decoders.start()
        self.engine.start()
        self.publisher.start()
        try:
            self.tries()
        except WorkerError as error:
            if self.rollout.give_up(f"the model does not answer: {error}"):
                self.stop_work()
                raise StartAgain(str(error)) from error
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

    def on_ready(self) -> None:
        """Start what every process has, and look what operators want."""
        JobProcess.on_ready(self)
        self.rollout.start()

    def stop_work(self) -> None:
        """Stop decoders, then the engine."""
        self.rollout.stop()
        self.decoders.close()
        self.engine.stop(STOP_TIMEOUT_S)
