"""Decides which requests run: first come, first served, into a batch of bounded size.

Knows requests and counts, no tensors and no KV back end. `running` is the batch in row order; it stays without gaps
because the last row takes the place of one that leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from worker.engine.request import Request, RequestState


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """max_num_seqs: rows of the batch. max_prefill_tokens: prompt tokens read between two decode steps, so that
    running streams do not stall; a longer prompt is read alone."""

    max_num_seqs: int
    max_prefill_tokens: int


class Scheduler:
    """Waiting and running requests of one engine. Engine thread only; counts may be read from any thread."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self._waiting: dict[str, Request] = {}
        self._running_by_id: dict[str, Request] = {}
        self.running: list[Request] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def is_idle(self) -> bool:
        return not self.running and not self._waiting

    def add(self, request: Request) -> None:
        """Queue a request behind those that wait."""
        self._waiting[request.request_id] = request

    def find(self, request_id: str) -> Request | None:
        """Return the waiting or running request of that id."""
        return self._waiting.get(request_id) or self._running_by_id.get(request_id)

    def admit(self) -> list[Request]:
        """Take the requests that are to be prefilled in this step out of the queue, oldest first."""
        admitted: list[Request] = []
        num_free = self._limits.max_num_seqs - len(self.running)
        num_left = self._limits.max_prefill_tokens
        for request in self._waiting.values():
            num_left -= request.inputs.num_prompt_tokens
            if len(admitted) == num_free or (admitted and num_left < 0):
                break
            admitted.append(request)
        for request in admitted:
            del self._waiting[request.request_id]
        return admitted

    def start(self, request: Request) -> None:
        """Give a prefilled request the next row."""
        request.enter(RequestState.RUNNING)
        request.row = len(self.running)
        self.running.append(request)
        self._running_by_id[request.request_id] = request

    def end(self, request: Request, release: Callable[[Request, Request], None]) -> None:
        """Take a request out, wherever it is.

        `release(request, last)` is called for a running one before the request of the last row, `last`, moves into
        its row, so that a KV back end can move that row too.
        """
        if request.state is RequestState.RUNNING:
            last = self.running[-1]
            release(request, last)
            self.running.pop()
            if last is not request:
                self.running[request.row] = last
                last.row = request.row
            del self._running_by_id[request.request_id]
        else:
            self._waiting.pop(request.request_id, None)
        request.enter(RequestState.ENDED)

    def everything(self) -> list[Request]:
        """Return running and waiting requests."""
        return [*self.running, *self._waiting.values()]
