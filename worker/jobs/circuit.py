"""Keeps a worker that fails every job from eating the queue: a circuit breaker for all that its jobs need.

A fault may be the job's own or the worker's. Five different jobs in a row that met one in the same part of the worker,
without a success there in between, are suspect. Then the worker proves that part without any job. If it can, the jobs
were to blame; else the worker is sick: it claims nothing more, lets one job try now and then, and is well again with
the first that gets past the part, or when it can prove the part after one that did not. In: faults and successes, from
any thread. Knows no queue and no job's content.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Final

from worker.errors import Part

logger = logging.getLogger(__name__)

#: Different jobs in a row that must have met a fault. Fewer, and a few bad objects would look like a bad worker; more,
#: and each of them costs other jobs of the queue a try.
MAX_FAULTS: Final = 5
#: Before the next job may try; doubles with each that fails. Storage that was overloaded is back in seconds; of a key
#: that was rotated somebody has to be told.
FIRST_PAUSE_S: Final = 2.0
MAX_PAUSE_S: Final = 60.0


class CircuitState(StrEnum):
    """PROVING: the worker is suspect. OPEN: it is sick. TRYING: one job finds out whether it still is."""

    CLOSED = "closed"
    PROVING = "proving"
    OPEN = "open"
    TRYING = "trying"


class Circuit:
    """The circuit breaker of one worker.

    `proves(part)` tries a part without any job, on the thread of the job that made it suspect; False or an exception:
    it does not work, or nobody can tell. `on_change(part, is_sick)` is told when the worker falls sick and gets well.
    """

    def __init__(
        self,
        proves: Callable[[Part], bool],
        on_change: Callable[[Part, bool], None] = lambda part, is_sick: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._proves, self._on_change, self._clock = proves, on_change, clock
        self._lock = threading.Lock()
        self._proof = threading.Lock()  # one at a time
        self._faulty: dict[Part, set[str]] = {part: set() for part in Part}
        self._state = CircuitState.CLOSED
        self._part: Part | None = None
        self._words = ""
        self._pause_s = FIRST_PAUSE_S
        self._try_at = 0.0
        self._trying = ""

    @property
    def state(self) -> CircuitState:
        """The state at this moment."""
        return self._state

    @property
    def reason(self) -> str:
        """Why the worker is sick, in words; empty while it is not."""
        with self._lock:
            return f"{self._part}: {self._words}" if self._is_sick and self._part is not None else ""

    @property
    def may_take(self) -> bool:
        """Whether the queue may be read now."""
        with self._lock:
            return self._state is CircuitState.CLOSED or self._is_due

    def begin(self, job_id: str) -> bool:
        """Ask whether a job may be claimed. Whoever hears yes says `end` when it is over."""
        with self._lock:
            if self._state is CircuitState.CLOSED:
                return True
            if not self._is_due:
                return False
            self._state, self._trying = CircuitState.TRYING, job_id
            return True

    def end(self, job_id: str) -> None:
        """The job is over. If it was the one that tries and has found nothing out, the next may try at once."""
        with self._lock:
            if self._state is CircuitState.TRYING and self._trying == job_id:
                self._state, self._try_at = CircuitState.OPEN, self._clock()

    def fault(self, part: Part, job_id: str, words: str, *, is_proven: bool = False) -> bool:
        """A job met a fault. Return whether the worker is to blame, so that the job must not pay for it.

        `words` say what went wrong, `is_proven` that it would go wrong with any job.
        """
        with self._lock:
            was_trying, was_same = self._state is CircuitState.TRYING, self._part is part
            if was_trying:
                self._pause_s = min(MAX_PAUSE_S, 2 * self._pause_s)
                self._open(part, words)
            elif self._state is not CircuitState.CLOSED:
                return True
            else:
                faulty = self._faulty[part]
                faulty.add(job_id)
                if not is_proven and len(faulty) < MAX_FAULTS:
                    return False
                self._state, self._part, self._pause_s = CircuitState.PROVING, part, FIRST_PAUSE_S
        if was_trying:
            return is_proven or not was_same or not self._has_recovered(part)
        works = not is_proven and self._prove(part)
        with self._lock:
            if self._state is not CircuitState.PROVING or self._part is not part:
                return False  # another job has got past the part meanwhile
            if works:
                self._close()
                return False
            self._open(part, words)
        logger.error("worker is sick, no more jobs are claimed", extra=_facts(part) | {"reason": words})
        return True

    def success(self, *parts: Part) -> None:
        """A job got past some parts of the worker."""
        with self._lock:
            for part in parts:
                self._faulty[part].clear()
            if self._part not in parts:
                return
            part, was_sick = self._part, self._is_sick
            self._close()
        if was_sick:
            logger.warning("worker is well again", extra=_facts(part))

    def _has_recovered(self, part: Part) -> bool:
        """Prove the part of a sick worker: a job that fails by itself would keep it sick, and never end."""
        if not self._prove(part):
            return False
        self.success(part)
        return True

    def _prove(self, part: Part) -> bool:
        logger.info("worker is suspect", extra=_facts(part))
        try:
            with self._proof:
                return self._proves(part)
        except Exception as error:  # noqa: BLE001 - whatever is wrong, the part does not work
            logger.info("part does not work", extra=_facts(part) | {"error": type(error).__name__})
            return False

    @property
    def _is_sick(self) -> bool:
        return self._state in (CircuitState.OPEN, CircuitState.TRYING)

    @property
    def _is_due(self) -> bool:
        return self._state is CircuitState.OPEN and self._clock() >= self._try_at

    def _open(self, part: Part, words: str) -> None:
        if self._part is not None and self._part is not part:
            self._on_change(self._part, False)
        self._state, self._part, self._words = CircuitState.OPEN, part, words
        self._try_at = self._clock() + self._pause_s
        self._on_change(part, True)

    def _close(self) -> None:
        assert self._part is not None
        self._faulty[self._part].clear()
        self._on_change(self._part, False)
        self._state, self._part = CircuitState.CLOSED, None


def _facts(part: Part) -> dict[str, object]:
    return {"action": "circuit", "part": part.value}
