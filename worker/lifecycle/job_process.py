"""What every process that takes jobs from a queue has, whatever it does with them: its threads, their order, its end.

`on_ready` runs once the process consumes, `fail` and `stop` at its end; worker.broker calls them. Subclasses add what
does the work.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import redis

from api_stub.contract import names
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.reaper import Reaper
from worker.jobs.attempt import Attempts
from worker.jobs.circuit import Circuit
from worker.jobs.claim import ClaimedJob, Claimer
from worker.lifecycle.admission import Admission
from worker.lifecycle.consumption import Consumption
from worker.lifecycle.drain import Drain
from worker.lifecycle.health import Health
from worker.lifecycle.heartbeat import Heartbeat
from worker.lifecycle.watchdog import (
    FROZEN_MARGIN_S,
    Finding,
    PublisherWatch,
    QueueWatch,
    ThreadWatch,
    Trouble,
    Watch,
    Watchdog,
    end_within,
    look_s,
)
from worker.observability.metrics import Metrics
from worker.settings import WorkerSettings
from worker.streaming.publisher import Publisher

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S: Final = 5.0
#: A worker that fails and has no jobs to finish exits within this time, else the process is ended by force.
LAST_RESORT_S: Final = 30.0
#: The publisher's stall limit is no shorter than this: one call to a silent Redis takes it several socket timeouts.
MIN_PUBLISHER_STALL_S: Final = 60.0


class JobRunner(Protocol):
    """Brings one claimed job to its end."""

    def run(self, claimed: ClaimedJob) -> None: ...


@dataclass(slots=True, kw_only=True)
class JobProcess:
    """The components of a process that takes jobs.

    exit_status: not 0 after `fail`. starts_again: the process shall begin anew when it has ended.
    """

    worker_name: str
    settings: WorkerSettings
    ledger: Ledger
    publisher: Publisher
    pipeline: JobRunner
    claimer: Claimer
    circuit: Circuit
    drain: Drain
    heartbeat: Heartbeat
    attempts: Attempts
    consumption: Consumption
    health: Health
    metrics: Metrics
    exit_status: int = 0
    starts_again: bool = False
    admission: Admission = field(default_factory=Admission)
    watchdog: Watchdog = field(init=False)
    _awaits_own_signal: bool = False
    _stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        settings = self.settings
        self.watchdog = Watchdog(
            self.watches(),
            self.fail,
            interval_s=look_s(min(settings.stall_s, settings.mute_s)),
            frozen_s=settings.stall_s + FROZEN_MARGIN_S,
        )

    def watches(self) -> tuple[Watch, ...]:
        """Return what the watchdog looks at."""
        return (
            ThreadWatch(Trouble.PUBLISHER_DEAD, lambda: self.publisher.is_alive),
            PublisherWatch(self.publisher, self._is_redis_there, max(self.settings.stall_s, MIN_PUBLISHER_STALL_S)),
            QueueWatch(self.consumption, self._num_consumable, self.settings.mute_s),
        )

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
        logger.critical("worker ends after a fault", extra=facts)
        self.exit_status = 1
        was_draining = self.drain.is_draining
        self.drain.begin()
        if not may_finish:
            self.drain.give_back()
        if not was_draining:
            os.kill(os.getpid(), signal.SIGTERM)

    @property
    def may_consume(self) -> bool:
        """Whether messages may be received now."""
        return self.circuit.may_consume and self.admission.is_open

    def shut_down(self) -> None:
        """Note a signal to end. One that comes from outside while the process is to begin anew ends it for good."""
        self.starts_again, self._awaits_own_signal = self.starts_again and self._awaits_own_signal, False
        self.drain.begin()

    def start_again(self) -> None:
        """End the process as SIGTERM does, so that it begins anew in its place. Any thread."""
        self.starts_again = self._awaits_own_signal = True
        self.drain.begin()
        os.kill(os.getpid(), signal.SIGTERM)

    def stop(self) -> None:
        """Stop all components, those that pass work on before those that receive it."""
        self._stopping.set()
        self.watchdog.stop(STOP_TIMEOUT_S)
        if self.exit_status:
            end_within(LAST_RESORT_S)  # stopping the watchdog has cancelled the timer
        self.claimer.close()
        self.stop_work()
        self.publisher.stop(STOP_TIMEOUT_S)
        self.heartbeat.stop(STOP_TIMEOUT_S)

    def stop_work(self) -> None:
        """Stop what a subclass has added."""

    def own_readings(self) -> Mapping[str, float]:
        """Return the metrics that every process has at scrape time, by name without prefix."""
        return {
            "num_jobs_held": len(self.attempts),
            "num_slots": self.consumption.num_threads,
            "redis_silent_seconds": time.monotonic() - self.heartbeat.last_beat_at,
            "is_ready": self.health.readiness().is_good,
            "is_draining": self.drain.is_draining,
        }

    def _is_redis_there(self) -> bool:
        return time.monotonic() - self.heartbeat.last_beat_at < self.settings.lease_s

    def _num_consumable(self) -> int:
        if not self.may_consume:
            return 0  # an open circuit breaker, and a worker that changes what it serves, leave the queue to others
        return num_consumable(self.ledger.client, self.settings.model_name, self.drain)


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
