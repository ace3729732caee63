"""One chaos run from start to verdict: load, faults, quiet, audit."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

from tests.chaos import audit, leaks
from tests.chaos.faults import FaultKind, schedule
from tests.chaos.injector import Injector
from tests.chaos.listener import ResultListener
from tests.chaos.outage import live_through
from tests.chaos.people import Producer, Readers, submit
from tests.chaos.plant import LEASE_S, MAX_NUM_SEQS, NUM_WORKERS, PREPARE_AHEAD, Plant, plant
from tests.chaos.report import Report, life_problems
from tests.chaos.takeover import live_through_failover
from tests.chaos.workload import ROUNDS, Plan, Ticket, TicketOffice, stored_requests, with_answers
from tests.servers import eventually

logger = logging.getLogger(__name__)

NUM_PRODUCERS: Final = 4
NUM_READERS: Final = 16
NUM_CANCELLERS: Final = 4
NUM_CALM_CANCELS: Final = 20
#: A machine that is too slow for the jobs makes the run, faults and all, so many times longer at most.
MAX_LONGER: Final = 4
#: How long all jobs may take to end, and their readers, once nothing is broken any more.
QUIET_S: Final = 240.0


@dataclass(frozen=True, slots=True)
class Options:
    """What to run. The same options run the same jobs and faults; how they meet is up to the machine."""

    seconds: float = 600.0
    jobs: int = 3000
    seed: int = 1
    every_s: float = 4.0
    kinds: tuple[FaultKind, ...] = tuple(FaultKind)
    max_faults: int | None = None
    #: A worker is broken only while so many others serve, in turns. Two mostly, so that recovery is the ledger's and
    #: not the start of another worker.
    min_others: tuple[int, ...] = (1, 2, 2, 2)
    num_pictures: int = 12
    num_clips: int = 3
    num_calm_cancels: int = NUM_CALM_CANCELS
    outage_s: float = 30.0
    #: Measure a planned failover by itself at the end, with the old server read-only for so long before the name moves.
    takeover_s: float = 2.0


class Book:
    """Gives producers their jobs, spread evenly over the run."""

    def __init__(self, office: TicketOffice, jobs: int, seconds: float) -> None:
        self._office, self._jobs, self._pause_s = office, jobs, seconds / jobs
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._num_given = 0

    def __call__(self) -> tuple[float, Ticket] | None:
        """Return when to hand in which job next; None when there are no more."""
        with self._lock:
            if self._num_given == self._jobs:
                return None
            self._num_given += 1
            return self._began + self._num_given * self._pause_s, self._office.ticket()


def run(options: Options, directory: Path, command: str) -> Report:
    """Run; the report says whether every promise was kept."""
    report = Report(command)
    with plant(directory) as system:
        with system.client() as client:
            drawn = stored_requests(system.s3_client, directory, options.num_pictures, options.num_clips)
            requests = with_answers(client, drawn)
        logger.info("%d fault-free texts are known", len(requests))
        with ResultListener(system.redis) as listener:
            tickets = _load_and_break(system, options, TicketOffice(Random(options.seed), requests), report)
            calm = TicketOffice(Random(f"{options.seed} calm"), requests)
            tickets += _cancel_calmly(system, calm, options.num_calm_cancels, report)
            if options.outage_s:
                report.outage = live_through(system, calm, options.outage_s)
                tickets += report.outage.tickets
            if options.takeover_s:
                report.takeover = live_through_failover(system, calm, options.takeover_s)
                tickets += report.takeover.tickets
        logger.info("all is quiet")
        _audit(system, tickets, report)
        with system.redis.client() as direct:
            num_adopted = audit.num_known(direct, report.junk_ids)
            num_before = ROUNDS * len(requests)
            report.problems += audit.count_problems(
                direct, report.outcomes, listener.published, num_before, num_adopted
            )
        _check_leaks(system, report)
        system.fleet.stop()
        report.problems += leaks.remains(system.scratch)
    report.lives = system.fleet.lives
    report.problems += life_problems(report.lives)
    return report


def _load_and_break(system: Plant, options: Options, office: TicketOffice, report: Report) -> list[Ticket]:
    """Let producers, readers and faults loose; return every ticket once all its jobs are final and read."""
    readers = Readers(system.client, NUM_READERS, NUM_CANCELLERS, options.seed)
    book = Book(office, options.jobs, options.seconds)
    stop = threading.Event()
    producers = [Producer(system.client, book, readers, stop) for _ in range(NUM_PRODUCERS)]
    faults = schedule(
        Random(options.seed),
        options.kinds,
        seconds=MAX_LONGER * options.seconds,
        every_s=options.every_s,
        num_workers=NUM_WORKERS,
        lease_s=LEASE_S,
    )
    orphans = TicketOffice(Random(f"{options.seed} orphans"), office.requests)
    injector = Injector(system, faults[: options.max_faults], orphans, readers, options.min_others)
    readers.start()
    for producer in producers:
        producer.start()
    injector.run(
        options.seconds if options.max_faults is None else math.inf,
        lambda: all(producer.join(0) for producer in producers),
    )
    stop.set()
    system.heal()
    logger.info("%d faults are over", len(injector.done))
    report.junk_ids = injector.junk_ids
    report.problems += [] if all(producer.join(QUIET_S) for producer in producers) else ["a producer did not end"]
    tickets = [ticket for producer in producers for ticket in producer.tickets] + injector.orphans
    _wait_for_quiet(system, tickets, report)
    report.problems += [] if readers.finish(QUIET_S) else ["a reader did not end"]
    report.injected, report.num_skipped = injector.done, len(injector.skipped)
    report.problems += injector.problems
    return tickets


def _wait_for_quiet(system: Plant, tickets: Sequence[Ticket], report: Report) -> None:
    job_ids = [*(ticket.job_id for ticket in tickets), *report.junk_ids]
    with system.redis.client() as direct:
        try:
            eventually(lambda: not leaks.junk_held(direct), 60, "junk is held no longer")
            eventually(lambda: audit.is_quiet(direct, job_ids), QUIET_S, "all jobs are final")
            eventually(lambda: leaks.queued_messages(direct) == 0, 30, "all doorbells are taken")
            system.fleet.wait_ready(NUM_WORKERS, QUIET_S)
        except AssertionError as error:
            report.problems.append(str(error))


def _cancel_calmly(system: Plant, office: TicketOffice, count: int, report: Report) -> list[Ticket]:
    """Cancel some running jobs while nothing is broken: how soon do they end?"""
    readers = Readers(system.client, 0, 2, 0)
    readers.start()
    tickets = [office.ticket(Plan.CANCEL_RUNNING) for _ in range(count)]
    with system.client() as client:
        for ticket in tickets:
            submit(client, ticket)
            readers.put(ticket)
    report.problems += [] if readers.finish(QUIET_S) else ["a reader did not end"]
    with system.redis.client() as direct:
        outcomes, _ = audit.read_outcomes(direct, tickets)
    report.calm_cancels_s = Report("", outcomes=outcomes).cancels_s
    return tickets


def _audit(system: Plant, tickets: Sequence[Ticket], report: Report) -> None:
    with system.redis.client() as direct:
        report.outcomes, problems = audit.read_outcomes(direct, tickets)
    report.problems += problems
    report.handovers = audit.handovers(report.outcomes)


def _check_leaks(system: Plant, report: Report) -> None:
    with system.redis.client() as direct:
        report.problems += leaks.key_problems(direct) + leaks.message_problems(direct, report.junk_ids)
    for life in system.fleet.ready():
        usage = leaks.usage_of(life.pid)
        report.problems += leaks.usage_problems(life.pid, usage, MAX_NUM_SEQS + PREPARE_AHEAD)
