"""Decides what each step feeds to the model: first come, first served, under a budget of tokens.

Knows requests and counts, no tensors. Every running decode gets its token in every step; what the budget leaves goes
to prompts, chunk by chunk, so that a long prompt never stalls a decode. When KV space runs out the youngest request
gives its space up and is read again later.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import Protocol

from worker.engine.batch import Chunk
from worker.engine.config import SchedulerLimits
from worker.engine.request import Request, RequestState


class KVSpace(Protocol):
    """Where keys and values go; a runner."""

    def can_allocate(self, num_tokens: int, num_running: int) -> bool:
        """Whether a request of that size may start."""

    def append(self, request: Request) -> bool:
        """Make room for the newest token."""

    def free(self, request: Request) -> None:
        """Give the request's space up."""


class Scheduler:
    """Waiting and running requests of one engine. Engine thread only; counts may be read from any thread.

    running: oldest first. A request that has to go back to the queue is the youngest, so it is next to run again.
    """

    def __init__(self, limits: SchedulerLimits, space: KVSpace) -> None:
        self._limits = limits
        self._space = space
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._running_by_id: dict[str, Request] = {}
        self.running: list[Request] = []
        self.num_preempted = 0
        self._is_held = False

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

    def next_in_line(self) -> list[Request]:
        """Return the waiting requests for which there are places, the oldest first."""
        return list(islice(self._waiting.values(), self._limits.max_num_seqs - len(self.running)))

    def next_to_start(self) -> Request | None:
        """Return the oldest waiting request if there is a place, budget and space for it in this step."""
        if not self._waiting or len(self.running) == self._limits.max_num_seqs or (self._is_held and self.running):
            return None
        if sum(request.num_unread for request in self.running) >= self._limits.max_num_batched_tokens:
            return None
        request = next(iter(self._waiting.values()))
        num_tokens = request.inputs.num_prompt_tokens + len(request.output_ids)
        return request if self._space.can_allocate(num_tokens, len(self.running)) else None

    def start(self, request: Request) -> None:
        """Move the oldest waiting request, which a runner has opened, to the running ones."""
        del self._waiting[request.request_id]
        request.enter(RequestState.RUNNING)
        self.running.append(request)
        self._running_by_id[request.request_id] = request

    def schedule(self) -> list[Chunk]:
        """Return what this step feeds: decodes first, then prompts, both oldest first."""
        self._make_room()
        chunks = [Chunk(request, 1) for request in self.running if request.is_decoding and not request.is_full]
        num_left = self._limits.max_num_batched_tokens - len(chunks)
        is_first = True
        for request in self.running:
            if request.is_decoding:
                continue
            num_tokens = _chunk_size(request, num_left, is_first=is_first)
            if num_tokens == 0:
                break
            chunks.append(Chunk(request, num_tokens))
            num_left -= num_tokens
            is_first = False
        return chunks

    def end(self, request: Request) -> None:
        """Take a request out, wherever it is, and give its space up."""
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
            del self._running_by_id[request.request_id]
            self._is_held = False
        else:
            self._waiting.pop(request.request_id, None)
        self._space.free(request)
        request.enter(RequestState.ENDED)

    def send_back(self, request: Request) -> None:
        """Let a running request, and those younger than it, wait until one of the others has ended.

        For a step that memory did not hold; requests must be able to give their KV space up.
        """
        while request.state is RequestState.RUNNING:
            self._preempt()
        self._is_held = True

    def everything(self) -> list[Request]:
        """Return running and waiting requests."""
        return [*self.running, *self._waiting.values()]

    def _make_room(self) -> None:
        """Give every decode room for its newest token, the oldest first."""
        index = 0
        while index < len(self.running):
            request = self.running[index]
            if request.is_decoding and not request.is_full and not self._space.append(request):
                self._preempt()
            else:
                index += 1

    def _preempt(self) -> None:
        """Send the youngest running request back to the head of the queue; it keeps its tokens."""
        youngest = self.running.pop()
        del self._running_by_id[youngest.request_id]
        self._space.free(youngest)
        youngest.num_cached_tokens = 0
        youngest.enter(RequestState.WAITING)
        self._waiting[youngest.request_id] = youngest
        self._waiting.move_to_end(youngest.request_id, last=False)
        self.num_preempted += 1


def _chunk_size(request: Request, num_left: int, *, is_first: bool) -> int:
    """Return how many tokens of a prompt this step reads, 0 for none."""
    num_prompt_left = request.num_prompt_cached - request.num_cached_tokens
    if request.is_chunkable or num_prompt_left <= 0:
        return max(0, min(request.num_unread, num_left))
    return num_prompt_left if is_first or num_prompt_left <= num_left else 0
