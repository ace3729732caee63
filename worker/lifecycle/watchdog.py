"""Notices a worker that looks alive and does nothing: mute towards its queue, or with an engine or a publisher that
stands still.

Silence is what was watched: a process that was stopped for a while (SIGSTOP, a suspended machine) has not been silent
in that time. Loading and warming up come before the watch begins; an absent Redis is nobody's silence.
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

from worker.lifecycle.drain import Consumption

logger = logging.getLogger(__name__)

MAX_LOOK_S: Final = 2.0
STDERR: Final = 2  # also where nobody can write to sys.stderr any more
#: Of each thread's stack; the innermost frames tell where it waits.
MAX_FRAMES: Final = 25
#: Beyond `stall_s`: so long may no Python code run at all (a library holds the interpreter's lock).
FROZEN_MARGIN_S: Final = 60.0


class Trouble(StrEnum):
    """What can be wrong with a worker that has to be restarted."""

    MUTE = "mute"
    STALLED = "stalled"
    ENGINE_DEAD = "engine_dead"
    PUBLISHER_DEAD = "publisher_dead"
    PUBLISHER_STALLED = "publisher_stalled"


@dataclass(frozen=True, slots=True)
class Finding:
    """A trouble and the facts about it."""

    trouble: Trouble
    facts: str


class Watch(Protocol):
    """One thing to look at, again and again."""

    def look(self, now: float) -> Finding | None:
        """Return what is wrong, if anything; `now` is monotonic."""


class Silence:
    """Adds up the time in which something was seen to be silent. A gap between two looks counts `max_gap_s` at most."""

    def __init__(self, max_gap_s: float) -> None:
        self._max_gap_s = max_gap_s
        self._seconds = 0.0
        self._looked_at: float | None = None

    def note(self, now: float, *, is_silent: bool) -> float:
        """Return the seconds of silence up to `now`."""
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
    """Finds an engine that has work and makes no step for `stall_s`. The longest single step must take less."""

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
    """Finds a worker that takes nothing for `mute_s` while its queue is not empty and slots are free.

    `queue_length` asks the broker; it raises redis.RedisError when there is no answer.
    """

    def __init__(self, consumption: Consumption, queue_length: Callable[[], int], mute_s: float) -> None:
        self._consumption, self._queue_length, self._mute_s = consumption, queue_length, mute_s
        self._silence = Silence(2 * look_s(mute_s))
        self._num_signs = 0

    def look(self, now: float) -> Finding | None:
        consumption = self._consumption
        num_signs, num_free = consumption.num_signs, consumption.num_free
        has_taken, self._num_signs = num_signs != self._num_signs, num_signs
        try:
            length = self._queue_length()
        except redis.RedisError:
            length = 0
        is_silent = length > 0 and num_free > 0 and not has_taken
        silent_s = self._silence.note(now, is_silent=is_silent)
        if silent_s < self._mute_s:
            return None
        state = "subscribed" if consumption.is_consuming else "not subscribed"
        facts = f"{length} messages in the queue, {num_free} free slots, {state}"
        return Finding(Trouble.MUTE, f"nothing taken for {silent_s:.0f} s: {facts}")


class PublisherToWatch(Protocol):
    """What the watch needs of a publisher."""

    @property
    def is_busy(self) -> bool: ...
    @property
    def num_turns(self) -> int: ...


class PublisherWatch:
    """Finds a publisher that has events and does nothing about them for `stall_s` while Redis answers others.

    Trying again is doing something: a Redis that is full refuses events and nothing else.
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
    """Finds a thread that has ended and must not."""

    def __init__(self, trouble: Trouble, is_alive: Callable[[], bool]) -> None:
        self._trouble, self._is_alive = trouble, is_alive

    def look(self, now: float) -> Finding | None:
        return None if self._is_alive() else Finding(self._trouble, "the thread has ended")


class Watchdog:
    """Looks every `interval_s` and tells the first finding, once, on its own thread, with all stacks in the log.

    `frozen_s`: the process ends at once, by C code, when not even this thread has run for so long.
    """

    def __init__(
        self, watches: Sequence[Watch], on_finding: Callable[[Finding], None], *, interval_s: float, frozen_s: float
    ) -> None:
        self._watches, self._on_finding = watches, on_finding
        self._interval_s, self._frozen_s = interval_s, frozen_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the watch. After a finding it has ended by itself."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            end_within(self._frozen_s)
            try:
                finding = self._look()
            except Exception:
                logger.exception("watchdog stumbled", extra={"action": "watch"})
                continue
            if finding is not None:
                facts = {"action": "watch", "trouble": finding.trouble.value, "facts": finding.facts}
                logger.critical("worker is stuck", extra=facts | {"stacks": stacks()})
                faulthandler.cancel_dump_traceback_later()  # who is told says how long the end may take
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
    """Return how often to look for a silence of `limit_s`."""
    return min(MAX_LOOK_S, limit_s / 5)


def stacks() -> dict[str, list[str]]:
    """Return where every thread is: file, line and function of its innermost frames, outermost first. No values."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        f"{names.get(ident, 'unknown')} ({ident})": [
            f"{place.filename}:{place.lineno} {place.name}" for place in traceback.extract_stack(frame)[-MAX_FRAMES:]
        ]
        for ident, frame in sys._current_frames().items()
    }
