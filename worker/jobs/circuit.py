"""A circuit breaker per worker: stops a worker that fails every job from failing the whole queue.

A fault may be the job's own or the worker's. When `MAX_FAULTS` different jobs in a row meet a fault in the same
component, without a success of that component in between, the worker tests the component without any job. If the test
passes, the jobs were at fault. Else the breaker opens ("the worker is sick"): no job is claimed but one now and then,
to try again. The breaker closes with the first job that passes the component, or when the component passes its test
after a job that failed. In: faults and successes, from any thread. Knows no queue and no job's content.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Final

from worker.errors import Component

logger = logging.getLogger(__name__)

#: Different jobs in a row that must have met a fault. Fewer, and a few bad objects look like a faulty worker; more, and
#: a faulty worker costs more jobs a try.
MAX_FAULTS: Final = 5
#: How long an open breaker waits before one job may try; doubles with each that fails, up to the maximum. Overloaded
#: storage is back in seconds; a rotated key needs an operator.
FIRST_PAUSE_S: Final = 2.0
MAX_PAUSE_S: Final = 60.0


class CircuitState(StrEnum):
    """PROVING: the suspect component is being tested. OPEN: no job is claimed. TRYING: one job is, to find out."""

    CLOSED = "closed"
    PROVING = "proving"
    OPEN = "open"
    TRYING = "trying"


class Circuit:
    """The circuit breaker of one worker.

    proves: tests a component without any job, on the thread of the job that made it suspect; False or an exception
        means that the component does not work, or cannot be tested.
    on_change: called with a component, and True when the breaker opens for it, False when it closes again.
    """

    def __init__(
        self,
        proves: Callable[[Component], bool],
        on_change: Callable[[Component, bool], None] = lambda component, is_sick: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._proves, self._on_change, self._clock = proves, on_change, clock
        self._lock = threading.Lock()
        self._proof = threading.Lock()  # one at a time
        self._faulty: dict[Component, set[str]] = {component: set() for component in Component}
        self._state = CircuitState.CLOSED
        self._component: Component | None = None
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
        """The component and its last fault while the breaker is open; else empty."""
        with self._lock:
            return f"{self._component}: {self._words}" if self._is_sick and self._component is not None else ""

    @property
    def may_consume(self) -> bool:
        """Whether messages may be received now."""
        with self._lock:
            return self._state is CircuitState.CLOSED or self._is_due

    def begin(self, job_id: str) -> bool:
        """Return whether a job may be claimed; if so, the caller calls `end` when the job is over."""
        with self._lock:
            if self._state is CircuitState.CLOSED:
                return True
            if not self._is_due:
                return False
            self._state, self._trying = CircuitState.TRYING, job_id
            return True

    def end(self, job_id: str) -> None:
        """Note that a job is over. If it was the one trying and met neither fault nor success, the next may try at
        once.
        """
        with self._lock:
            if self._state is CircuitState.TRYING and self._trying == job_id:
                self._state, self._try_at = CircuitState.OPEN, self._clock()

    def fault(self, component: Component, job_id: str, words: str, *, is_proven: bool = False) -> bool:
        """Note that a job met a fault; return whether the worker is at fault, so that it must not count against the
        job.

        `words` describe the fault; `is_proven`: any job would meet it.
        """
        with self._lock:
            was_trying, was_same = self._state is CircuitState.TRYING, self._component is component
            if was_trying:
                self._pause_s = min(MAX_PAUSE_S, 2 * self._pause_s)
                self._open(component, words)
            elif self._state is not CircuitState.CLOSED:
                return True
            else:
                faulty = self._faulty[component]
                faulty.add(job_id)
                if not is_proven and len(faulty) < MAX_FAULTS:
                    return False
                self._state, self._component, self._pause_s = CircuitState.PROVING, component, FIRST_PAUSE_S
        if was_trying:
            return is_proven or not was_same or not self._has_recovered(component)
        works = not is_proven and self._prove(component)
        with self._lock:
            if self._state is not CircuitState.PROVING or self._component is not component:
                return False  # meanwhile another job succeeded with the component
            if works:
                self._close()
                return False
            self._open(component, words)
        logger.error("worker is sick, no more jobs are claimed", extra=_facts(component) | {"reason": words})
        return True

    def success(self, *components: Component) -> None:
        """Note that components have worked for a job."""
        with self._lock:
            for component in components:
                self._faulty[component].clear()
            if self._component not in components:
                return
            component, was_sick = self._component, self._is_sick
            self._close()
        if was_sick:
            logger.warning("worker is well again", extra=_facts(component))

    def _has_recovered(self, component: Component) -> bool:
        """Test the component of an open breaker: a job that fails by its own fault must not keep it open for ever."""
        if not self._prove(component):
            return False
        self.success(component)
        return True

    def _prove(self, component: Component) -> bool:
        logger.info("worker tries a suspect component", extra=_facts(component))
        try:
            with self._proof:
                return self._proves(component)
        except Exception as error:  # noqa: BLE001 - any exception means that the component does not work
            logger.info("component does not work", extra=_facts(component) | {"error": type(error).__name__})
            return False

    @property
    def _is_sick(self) -> bool:
        return self._state in (CircuitState.OPEN, CircuitState.TRYING)

    @property
    def _is_due(self) -> bool:
        return self._state is CircuitState.OPEN and self._clock() >= self._try_at

    def _open(self, component: Component, words: str) -> None:
        if self._component is not None and self._component is not component:
            self._on_change(self._component, False)
        self._state, self._component, self._words = CircuitState.OPEN, component, words
        self._try_at = self._clock() + self._pause_s
        self._on_change(component, True)

    def _close(self) -> None:
        assert self._component is not None
        self._faulty[self._component].clear()
        self._on_change(self._component, False)
        self._state, self._component = CircuitState.CLOSED, None


def _facts(component: Component) -> dict[str, object]:
    return {"action": "circuit", "part": component.value}
