"""Detects a worker that is alive but makes no progress: it receives no messages, or its engine or publisher stalls.

Only observed time counts: while the process was suspended (SIGSTOP, a sleeping machine) nothing was observed. Watching
begins after loading and warm-up. While Redis is away, neither the queue nor the publisher counts as stalled.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

import redis

from worker.lifecycle.consumption import Consumption

logger = logging.getLogger(__name__)

MAX_LOOK_S: Final = 2.0
STDERR: Final = 2  # the descriptor, which also works when sys.stderr is closed
#: Innermost frames of each thread's stack in the log.
MAX_FRAMES: Final = 25
#: Beyond `stall_s`: the longest time in which no Python code may run (a library holds the interpreter's lock).
FROZEN_MARGIN_S: Final = 60.0


class Trouble(StrEnum):
    """Faults for which a worker has to be restarted. MUTE: it receives nothing although messages wait."""

    MUTE = "mute"
    STALLED = "stalled"
    ENGINE_DEAD = "engine_dead"
    PUBLISHER_DEAD = "publisher_dead"
    PUBLISHER_STALLED = "publisher_stalled"


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault and the facts about it, for the log and the probes."""

    trouble: Trouble
    facts: str


class Watch(Protocol):
    """One check that the watchdog repeats."""

    def look(self, now: float) -> Finding | None:
        """Return a fault, if there is one; `now` is monotonic."""


class Silence:
    """Adds up the observed time without progress. The time between two observations counts `max_gap_s` at most."""

    def __init__(self, max_gap_s: float) -> None:
        self._max_gap_s = max_gap_s
        self._seconds = 0.0
        self._looked_at: float | None = None

    def note(self, now: float, *, is_silent: bool) -> float:
        """Add an observation; return the seconds without progress up to `now`."""
        gap_s = 0.0 if self._looked_at is None else min(now - self._looked_at, self._max_gap_s)
        self._seconds = self._seconds + gap_s if is_silent else 0.0
        self._looked_at = now
        return self._seconds


class EngineToWatch(Protocol):
    """What the watch needs of an engine."""

    @property
    def is_alive(self) -> bool: ...
    @property
    def last_step_at(self) -> float: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...


class EngineWatch:
    """Detects an engine that has work and completes no step for `stall_s`, longer than any single step takes."""

    def __init__(self, engine: EngineToWatch, stall_s: float) -> None:
        self._engine, self._stall_s = engine, stall_s
        self._silence = Silence(2 * look_s(stall_s))
        self._step_at = engine.last_step_at

    def look(self, now: float) -> Finding | None:
        engine = self._engine
        if not engine.is_alive:
            return Finding(Trouble.ENGINE_DEAD, "the engine thread has ended")
        num_running, num_waiting, step_at = engine.num_running, engine.num_waiting, engine.last_step_at
        has_stepped, self._step_at = step_at != self._step_at, step_at
        has_work = num_running + num_waiting > 0
        silent_s = self._silence.note(now, is_silent=has_work and not has_stepped)
        if silent_s < self._stall_s:
            return None
        work = f"{num_running} running and {num_waiting} waiting requests"
        return Finding(Trouble.STALLED, f"no step for {silent_s:.0f} s with {work}")


class QueueWatch:
    """Detects a worker that receives nothing for `mute_s` while its queue is not empty and threads are free.

    `queue_length` asks the broker; it raises redis.RedisError when there is no answer.
    """

    def __init__(self, consumption: Consumption, queue_length: Callable[[], int], mute_s: float) -> None:
        self._consumption, self._queue_length, self._mute_s = consumption, queue_length, mute_s
        self._silence = Silence(2 * look_s(mute_s))
        self._num_signs = 0

    def look(self, now: float) -> Finding | None:
        consumption = self._consumption
        num_signs, num_free = consumption.num_signs, consumption.num_free
        has_received, self._num_signs = num_signs != self._num_signs, num_signs
        try:
            length = self._queue_length()
        except redis.RedisError:
            length = 0
        is_silent = length > 0 and num_free > 0 and not has_received
        silent_s = self._silence.note(now, is_silent=is_silent)
        if silent_s < self._mute_s:
            return None
        state = "subscribed" if consumption.is_consuming else "not subscribed"
        facts = f"{length} messages in the queue, {num_free} free threads, {state}"
        return Finding(Trouble.MUTE, f"nothing received for {silent_s:.0f} s: {facts}")


class PublisherToWatch(Protocol):
    """What the watch needs of a publisher."""

    @property
    def is_busy(self) -> bool: ...
    @property
    def num_turns(self) -> int: ...


class PublisherWatch:
    """Detects a publisher that has events and makes no attempt to send them for `stall_s` while Redis answers others.

    A refused attempt counts as progress: a full Redis refuses events, and restarting the worker would not help.
    """

    def __init__(self, publisher: PublisherToWatch, is_redis_there: Callable[[], bool], stall_s: float) -> None:
        self._publisher, self._is_redis_there, self._stall_s = publisher, is_redis_there, stall_s
        self._silence = Silence(2 * look_s(stall_s))
        self._num_turns = 0

    def look(self, now: float) -> Finding | None:
        is_busy, num_turns = self._publisher.is_busy, self._publisher.num_turns
        has_turned, self._num_turns = num_turns != self._num_turns, num_turns
        silent_s = self._silence.note(now, is_silent=is_busy and not has_turned and self._is_redis_there())
        if silent_s < self._stall_s:
            return None
        return Finding(Trouble.PUBLISHER_STALLED, f"events wait and none was sent for {silent_s:.0f} s")


class ThreadWatch:
    """Detects a thread that has ended and must not."""

    def __init__(self, trouble: Trouble, is_alive: Callable[[], bool]) -> None:
        self._trouble, self._is_alive = trouble, is_alive

    def look(self, now: float) -> Finding | None:
        return None if self._is_alive() else Finding(self._trouble, "the thread has ended")


class Watchdog:
    """Runs all watches every `interval_s` on a thread of its own and reports the first finding, once.

    All threads' stacks go into the log before `on_finding` is called. frozen_s: when the watchdog's own thread does not
    run for this long, faulthandler, which needs no Python code to run, ends the process.
    """

    def __init__(
        self, watches: Sequence[Watch], on_finding: Callable[[Finding], None], *, interval_s: float, frozen_s: float
    ) -> None:
        self._watches, self._on_finding = watches, on_finding
        self._interval_s, self._frozen_s = interval_s, frozen_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the thread, which has ended by itself after a finding."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            end_within(self._frozen_s)
            try:
                finding = self._look()
            except Exception:
                logger.exception("watchdog check failed", extra={"action": "watch"})
                continue
            if finding is not None:
                facts = {"action": "watch", "trouble": finding.trouble.value, "facts": finding.facts}
                logger.critical("worker is stuck", extra=facts | {"stacks": stacks()})
                faulthandler.cancel_dump_traceback_later()  # on_finding sets its own limit
                self._on_finding(finding)
                return
        faulthandler.cancel_dump_traceback_later()

    def _look(self) -> Finding | None:
        for watch in self._watches:
            finding = watch.look(time.monotonic())
            if finding is not None:
                return finding
        return None


def end_within(seconds: float) -> None:
    """End the process with status 1 after `seconds`, whatever its threads do then; stacks go to stderr."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)


def look_s(limit_s: float) -> float:
    """Return the seconds between two observations that detect a stall of `limit_s`."""
    return min(MAX_LOOK_S, limit_s / 5)


def stacks() -> dict[str, list[str]]:
    """Return file, line and function of every thread's innermost frames, outermost first, without any values."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        f"{names.get(ident, 'unknown')} ({ident})": [
            f"{place.filename}:{place.lineno} {place.name}" for place in traceback.extract_stack(frame)[-MAX_FRAMES:]
        ]
        for ident, frame in sys._current_frames().items()
    }
