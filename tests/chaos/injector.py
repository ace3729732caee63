"""Makes the schedule happen: one thread per plane, so that faults of different planes meet and those of one do not."""

from __future__ import annotations

import json
import logging
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from random import Random
from typing import Final

import redis

from tests.chaos import junk
from tests.chaos.faults import Fault, FaultKind, Plane
from tests.chaos.fleet import Life
from tests.chaos.people import Readers
from tests.chaos.plant import LEASE_S, Plant
from tests.chaos.proxy import BOTH_WAYS, TcpProxy, Way
from tests.chaos.workload import Plan, Ticket, TicketOffice
from tests.servers import eventually
from tests.storage_faults import Drip, Status, Truncate
from tests.storage_faults import Fault as StorageFault

logger = logging.getLogger(__name__)

#: A fault of a worker waits this long for enough others that serve.
PATIENCE_S: Final = 60.0
#: How long the last fault may take, and how far behind its schedule a slow machine may have put each of them.
LAST_FAULT_S: Final = 240.0
BEHIND_S: Final = 30.0
ORPHANS: Final = 3
NUM_JUNK: Final = 20

STORAGE_FAULTS: Final[dict[FaultKind, StorageFault]] = {
    FaultKind.S3_ERRORS: Status(500, "InternalError"),
    FaultKind.S3_SLOW: Drip(0.3, 2048),
    FaultKind.S3_TRUNCATED: Truncate(700),
    FaultKind.S3_REFUSES_ONE: Status(403, "AccessDenied"),
}
CUTS: Final = {
    FaultKind.CUT_REQUESTS: frozenset({Way.REQUESTS}),
    FaultKind.CUT_REPLIES: frozenset({Way.REPLIES}),
    FaultKind.SILENCE: BOTH_WAYS,
}


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that happened, in seconds since 1970."""

    fault: Fault
    began_at: float
    ended_at: float


class Injector:
    """Runs a schedule against a plant. `done` grows as faults end; `skipped` are those that found no victim."""

    def __init__(
        self,
        plant: Plant,
        faults: Sequence[Fault],
        office: TicketOffice,
        readers: Readers,
        min_others: Sequence[int],
    ) -> None:
        self._plant, self._faults = plant, faults
        self._office, self._readers = office, readers
        self._junk = Random(len(faults))
        self._min_others = cycle(min_others)
        self._stop = threading.Event()
        self._queues: dict[Plane, queue.SimpleQueue[Fault | None]] = {plane: queue.SimpleQueue() for plane in Plane}
        self._threads = [
            threading.Thread(target=self._work, args=(line,), name=f"faults-{plane}", daemon=True)
            for plane, line in self._queues.items()
        ]
        self.done: list[Injected] = []
        self.skipped: list[Fault] = []
        self.problems: list[str] = []
        self.orphans: list[Ticket] = []
        #: Ids that junk is answered under: jobs that nobody asked for, and that must come to an end.
        self.junk_ids: set[str] = set()

    def run(self, at_least_s: float, is_enough: Callable[[], bool]) -> None:
        """Let faults happen at their times, for so long and until it is enough; return when the last has ended."""
        for thread in self._threads:
            thread.start()
        began = time.monotonic()
        for fault in self._faults:
            if fault.at_s > at_least_s and is_enough():
                break
            self._stop.wait(max(0.0, began + fault.at_s - time.monotonic()))
            self._queues[fault.kind.plane].put(fault)
        for line in self._queues.values():
            line.put(None)
        for thread in self._threads:
            thread.join(LAST_FAULT_S + BEHIND_S * len(self._faults))
            if thread.is_alive():
                self.problems.append(f"the fault did not end: {thread.name}")

    def _work(self, line: queue.SimpleQueue[Fault | None]) -> None:
        while (fault := line.get()) is not None:
            began_at = time.time()
            logger.info("%s (%d, %.1f s)", fault.kind.value, fault.target, fault.duration_s)
            try:
                happened = self._inject(fault)
            except Exception as error:
                logger.exception("fault failed")
                self.problems.append(f"{fault.kind.value} failed: {type(error).__name__}: {error}")
                continue
            if happened:
                self.done.append(Injected(fault, began_at, time.time()))
            else:
                self.skipped.append(fault)

    def _inject(self, fault: Fault) -> bool:
        match fault.kind.plane:
            case Plane.WORKER:
                return self._break_worker(fault)
            case Plane.NETWORK:
                self._break_network(fault)
            case Plane.REDIS:
                self._break_redis(fault)
            case Plane.BROKER:
                self._throw_junk()
            case Plane.STORAGE:
                self._break_storage(fault)
            case Plane.PRODUCER:
                self._kill_producer()
        return True

    def _break_worker(self, fault: Fault) -> bool:
        victim = self._victim(fault.target)
        if victim is None:
            return False
        match fault.kind:
            case FaultKind.SIGKILL:
                self._plant.fleet.signal(victim, signal.SIGKILL)
            case FaultKind.SIGTERM:
                self._plant.fleet.signal(victim, signal.SIGTERM)
            case _:
                self._plant.fleet.signal(victim, signal.SIGSTOP)
                self._stop.wait(fault.duration_s)
                self._plant.fleet.signal(victim, signal.SIGCONT)
        return True

    def _victim(self, target: int) -> Life | None:
        fleet = self._plant.fleet
        with suppress(AssertionError):
            fleet.wait_ready(1 + next(self._min_others), PATIENCE_S)
            ready = fleet.ready()
            return next((life for life in ready if life.slot == target), ready[0])
        return None

    def _break_network(self, fault: Fault) -> None:
        plant = self._plant
        link = plant.links[fault.target] if fault.target < len(plant.links) else plant.producers_link
        if fault.kind is FaultKind.RESET:
            link.reset()
        elif fault.kind is FaultKind.SLOW_NETWORK:
            self._while(fault, link, lambda: link.delay(0.05))
        else:
            self._while(fault, link, lambda: link.cut(CUTS[fault.kind]))

    def _while(self, fault: Fault, link: TcpProxy, begin: Callable[[], None]) -> None:
        begin()
        self._stop.wait(fault.duration_s)
        link.heal()

    def _break_redis(self, fault: Fault) -> None:
        if fault.kind is FaultKind.REDIS_KILL:
            self._plant.redis.kill()
            self._stop.wait(fault.duration_s)
            self._plant.redis.start()
            return
        if fault.kind is FaultKind.FAILOVER:
            self._plant.fail_over(fault.duration_s)
            return
        with self._plant.redis.client() as direct, _refusing(direct, fault.kind):
            self._stop.wait(fault.duration_s)

    def _throw_junk(self) -> None:
        """Push odd entries into the broker's lists and its table of held messages, and good jobs behind them."""
        thrown = junk.draw(self._junk, NUM_JUNK)
        eventually(lambda: junk.throw(self._plant.redis, thrown), 60, "junk is thrown")
        self.junk_ids.update(entry.job_id for entry in thrown if entry.job_id is not None)

    def _break_storage(self, fault: Fault) -> None:
        storages = self._plant.storages
        hit = storages if fault.kind is not FaultKind.S3_REFUSES_ONE else (storages[fault.target],)
        for storage in hit:
            storage.always = STORAGE_FAULTS[fault.kind]
        self._stop.wait(fault.duration_s)
        for storage in hit:
            storage.always = None

    def _kill_producer(self) -> None:
        tickets = [self._office.ticket(Plan.ORPHAN) for _ in range(ORPHANS)]
        jobs = json.dumps({ticket.job_id: ticket.fields for ticket in tickets})
        with self._plant.redis.client() as direct:
            eventually(lambda: _takes_writes(direct), 60, "Redis takes writes")
        command = [sys.executable, "-m", "tests.chaos.dying_producer", self._plant.redis.url, str(LEASE_S)]
        died = subprocess.run(command, input=jobs, text=True, capture_output=True, timeout=120, check=False)
        self.orphans.extend(tickets)
        if died.returncode == -signal.SIGKILL:
            for ticket in tickets:
                ticket.is_submitted = True
                self._readers.put(ticket)
        else:  # Redis failed it before its time: nobody knows which of its jobs there are
            logger.info("the producer ended with %d: %s", died.returncode, died.stderr[-300:])


@contextmanager
def _refusing(direct: redis.Redis, kind: FaultKind) -> Iterator[None]:
    """Have Redis answer every write with an error."""
    if kind is FaultKind.REDIS_READ_ONLY:
        # A replica of nobody, as after a failover: it keeps its data and refuses writes with READONLY.
        direct.replicaof("127.0.0.1", 1)
        try:
            yield
        finally:
            direct.replicaof("NO", "ONE")
        return
    # After a failover there is one good replica.
    name, bad, good = ("maxmemory", 1, 0) if kind is FaultKind.REDIS_FULL else ("min-replicas-to-write", 2, 0)
    direct.config_set(name, bad)
    try:
        yield
    finally:
        direct.config_set(name, good)


def _takes_writes(direct: redis.Redis) -> bool:
    try:
        return bool(direct.set("chaos:probe", 1, px=1000))
    except redis.RedisError:
        return False
