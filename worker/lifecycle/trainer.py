"""The process of a worker that trains: it takes fine-tuning jobs, one at a time, and serves no model.

In: the objects that worker.bootstrap builds. `start` runs before it consumes; the rest is `JobProcess`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from worker.lifecycle.health import Vitals
from worker.lifecycle.job_process import JobProcess


@dataclass(slots=True, kw_only=True)
class TrainerProcess(JobProcess):
    """The components of one trainer process."""

    def start(self) -> None:
        """Start the publisher; models are loaded by the jobs that name them."""
        self.publisher.start()
        self.health.serve(self.vitals)
        self.metrics.read_at_scrape(self.own_readings)

    def vitals(self) -> Vitals:
        """Return the state that the probes report; there is no engine that could die, and none waits inside."""
        num_held = len(self.attempts)
        return Vitals(
            is_engine_alive=True,
            is_publisher_alive=self.publisher.is_alive,
            is_consuming=self.consumption.is_consuming,
            is_draining=self.drain.is_draining,
            sick_of=self.circuit.reason,
            redis_silent_s=round(time.monotonic() - self.heartbeat.last_beat_at, 3),
            redis_refusal=self.heartbeat.refusal,
            num_held=num_held,
            num_running=num_held,
            num_waiting=0,
        )
