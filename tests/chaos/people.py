"""Producers and readers with real clients: they repeat what failed, wander off in mid-answer and come back."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from random import Random
from typing import Final

from api_stub.client.client import Client
from api_stub.client.handle import JobHandle
from api_stub.contract.event import FinalEvent, OutputDelta
from api_stub.cursor import TextCursor
from api_stub.errors import JobFailed, StoreUnavailable
from tests.chaos.workload import Plan, Ticket

#: Producers wait while so many jobs have not been read to their end: a slow machine makes a run longer.
MAX_OPEN: Final = 80
#: Producers give up on a submit that failed for so long; that counts as a violation.
SUBMIT_PATIENCE_S: Final = 120.0
RETRY_PAUSE_S: Final = 0.2
#: Silence after which a reader comes back with a new question.
SILENCE_S: Final = 20.0

Connect = Callable[[], Client]


class Producer:
    """Hands in what `book` gives, each at its time, and hands the ticket on to the readers."""

    def __init__(
        self, connect: Connect, book: Callable[[], tuple[float, Ticket] | None], readers: Readers, stop: threading.Event
    ) -> None:
        self._connect, self._book, self._readers, self._stop = connect, book, readers, stop
        self._thread = threading.Thread(target=self._run, name="producer", daemon=True)
        self.tickets: list[Ticket] = []

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end; tell whether it has come."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        with self._connect() as client:
            while not self._stop.is_set() and (entry := self._book()) is not None:
                due_at, ticket = entry
                self._stop.wait(max(0.0, due_at - time.monotonic()))
                self._readers.make_room(self._stop)
                self.tickets.append(ticket)
                submit(client, ticket)
                if ticket.plan is Plan.CANCEL_QUEUED:
                    cancel(client.job(ticket.job_id), ticket)
                self._readers.put(ticket)


def submit(client: Client, ticket: Ticket) -> None:
    """Hand a job in; repeat the same call until it is known to have worked."""
    give_up_at = time.monotonic() + SUBMIT_PATIENCE_S
    while time.monotonic() < give_up_at:
        began = time.monotonic()
        ticket.num_submits += 1
        try:
            client.submit(ticket.fields, job_id=ticket.job_id)
        except StoreUnavailable:
            time.sleep(RETRY_PAUSE_S)
        else:
            ticket.is_submitted = True
            return
        finally:
            ticket.slowest_submit_s = max(ticket.slowest_submit_s, time.monotonic() - began)
    ticket.problems.append("could not be submitted")


def cancel(handle: JobHandle, ticket: Ticket) -> None:
    """Cancel a job; repeat the call until it is known to have worked."""
    give_up_at = time.monotonic() + SUBMIT_PATIENCE_S
    while time.monotonic() < give_up_at:
        asked_at = time.time()
        try:
            ticket.cancel_answer = handle.cancel().value
        except StoreUnavailable:
            time.sleep(RETRY_PAUSE_S)
        else:
            ticket.cancel_at = asked_at
            return
    ticket.problems.append("could not be cancelled")


class Readers:
    """A pool of readers; jobs that wait for their cancel have their own few, so that it comes while they run."""

    def __init__(self, connect: Connect, num_readers: int, num_cancellers: int, seed: int) -> None:
        self._connect = connect
        self._patient: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._urgent: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        lines = [self._patient] * num_readers + [self._urgent] * num_cancellers
        self._threads = [
            threading.Thread(target=self._run, args=(line, Random(seed + number)), name="reader", daemon=True)
            for number, line in enumerate(lines)
        ]
        self._lines = lines
        self._room = threading.Semaphore(MAX_OPEN)

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def make_room(self, stop: threading.Event) -> None:
        """Wait until fewer than MAX_OPEN jobs are unread; whoever was let through puts a job."""
        while not self._room.acquire(timeout=0.5) and not stop.is_set():
            pass

    def put(self, ticket: Ticket) -> None:
        """Have a job read."""
        (self._urgent if ticket.plan is Plan.CANCEL_RUNNING else self._patient).put(ticket)

    def finish(self, timeout_s: float) -> bool:
        """Let everything that was put be read; tell whether that was done in time."""
        for line in self._lines:
            line.put(None)
        give_up_at = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.1, give_up_at - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, line: queue.SimpleQueue[Ticket | None], rng: Random) -> None:
        with self._connect() as client:
            while (ticket := line.get()) is not None:
                try:
                    read(client, ticket, rng)
                except Exception as error:  # noqa: BLE001 - whatever a reader meets is the finding
                    ticket.problems.append(f"its reader met {type(error).__name__}: {error}")
                if ticket.plan is not Plan.ORPHAN:  # nobody made room for it
                    self._room.release()


def read(client: Client, ticket: Ticket, rng: Random) -> None:
    """Read a job to its end: in one go by `stream`, or by `events` in visits that end in mid-answer."""
    if ticket.plan is not Plan.CANCEL_RUNNING and rng.random() < 0.4:
        _stream(client.job(ticket.job_id), ticket)
    else:
        _visit(client.job(ticket.job_id), ticket, rng)


def _stream(handle: JobHandle, ticket: Ticket) -> None:
    """Read by `stream`; after an outage that was too long for it begin from the start."""
    while ticket.read_text is None and ticket.read_code is None:
        ticket.num_visits += 1
        try:
            ticket.read_text = "".join(handle.stream(timeout=SILENCE_S))
        except JobFailed as failure:
            ticket.read_code = failure.code
        except (StoreUnavailable, TimeoutError):
            time.sleep(RETRY_PAUSE_S)


def _visit(handle: JobHandle, ticket: Ticket, rng: Random) -> None:
    """Read by `events`, leaving after a few of them and coming back behind the last one seen."""
    text, last_seq, is_final = TextCursor(), 0, False
    while not is_final:
        ticket.num_visits += 1
        try:
            with closing(handle.events(after=last_seq, timeout=SILENCE_S)) as events:
                for event in islice(events, rng.randrange(3, 60)):
                    last_seq, is_final = event.seq, isinstance(event, FinalEvent)
                    text.take(event)
                    is_talking = isinstance(event, OutputDelta) and ticket.cancel_at is None
                    if is_talking and ticket.plan is Plan.CANCEL_RUNNING:
                        cancel(handle, ticket)
        except JobFailed as failure:
            ticket.read_code = failure.code
            return
        except (StoreUnavailable, TimeoutError):
            time.sleep(RETRY_PAUSE_S)
    ticket.read_text = text.text
