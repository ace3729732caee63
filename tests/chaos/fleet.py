"""Worker processes that are started again whenever they end, as a supervisor would, and the record of their lives."""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.processes import READY_S, WorkerProcess
from tests.servers import eventually

logger = logging.getLogger(__name__)

POLL_S: Final = 0.2
#: A worker that meets no Redis at its start refuses (78); the next start waits a little.
RESTART_PAUSE_S: Final = 1.0
#: Beyond its drain a worker may need this long to end.
STOP_MARGIN_S: Final = 25.0


@dataclass(slots=True)
class Life:
    """One worker process. Times are seconds since 1970; `asked` is the signal that was to end it.

    `num_others`: how many other workers served at that moment.
    """

    slot: int
    worker: WorkerProcess
    started_at: float
    ready_at: float | None = None
    asked: signal.Signals | None = None
    asked_at: float | None = None
    num_others: int = 0
    is_stopped: bool = False
    ended_at: float | None = None
    status: int | None = None
    log_length: int = 0

    @property
    def pid(self) -> int:
        """The process id, which is also the end of the worker's name in the ledger."""
        return self.worker.process.pid

    @property
    def is_ready(self) -> bool:
        """True while it serves and nobody has asked it to end."""
        return self.ready_at is not None and self.asked is None and self.ended_at is None and not self.is_stopped


@dataclass(slots=True)
class Slot:
    """A place for a worker: the proxies it sees Redis and S3 through, and who fills it now."""

    number: int
    redis_url: str
    s3_url: str
    life: Life | None = None
    start_at: float = field(default_factory=time.monotonic)


class Fleet:
    """Keeps one worker per Redis URL and S3 URL alive until `stop`."""

    def __init__(
        self,
        directory: Path,
        redis_urls: Sequence[str],
        s3_urls: Sequence[str],
        *,
        variables: Mapping[str, str],
        settings: Mapping[str, object],
    ) -> None:
        self._directory = directory
        self._variables, self._settings = variables, settings
        ways = zip(redis_urls, s3_urls, strict=True)
        self._slots = [Slot(number, redis_url, s3_url) for number, (redis_url, s3_url) in enumerate(ways)]
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)
        self.lives: list[Life] = []

    def start(self) -> None:
        """Start all workers and wait until they serve."""
        self._thread.start()
        eventually(self._all_serve, READY_S, "all workers serve")

    def wait_ready(self, count: int, timeout_s: float) -> None:
        """Wait until at least `count` workers serve."""
        eventually(lambda: len(self.ready()) >= count, timeout_s, f"{count} workers serve")

    def ready(self) -> list[Life]:
        """The workers that serve now."""
        return [slot.life for slot in self._slots if slot.life is not None and slot.life.is_ready]

    def _all_serve(self) -> bool:
        for life in self.lives:
            assert life.ended_at is None, f"a worker ended at its start:\n{life.worker.text()[-3000:]}"
        return len(self.ready()) == len(self._slots)

    def signal(self, life: Life, signum: signal.Signals) -> None:
        """Send a signal and write it down."""
        with self._lock:
            if signum in (signal.SIGKILL, signal.SIGTERM):
                life.num_others = sum(other is not life for other in self.ready())
                life.asked, life.asked_at = signum, time.time()
            else:
                life.is_stopped = signum == signal.SIGSTOP
            if life.worker.process.poll() is None:
                life.worker.process.send_signal(signum)

    def stop(self) -> None:
        """Ask every worker to end; those that do not are killed."""
        self._stopping.set()
        self._thread.join(10)
        living = [slot.life for slot in self._slots if slot.life is not None and slot.life.ended_at is None]
        for life in living:
            self.signal(life, signal.SIGTERM)
        give_up_at = time.monotonic() + float(str(self._settings["drain_s"])) + STOP_MARGIN_S
        for life in living:
            try:
                life.worker.process.wait(max(0.1, give_up_at - time.monotonic()))
            except subprocess.TimeoutExpired:
                life.worker.kill()
            self._note_end(life)

    def kill(self) -> None:
        """End everything at once."""
        self._stopping.set()
        self._thread.join(10)
        for life in self.lives:
            life.worker.kill()

    def _run(self) -> None:
        while not self._stopping.wait(POLL_S):
            for slot in self._slots:
                self._tend(slot)

    def _tend(self, slot: Slot) -> None:
        life = slot.life
        if life is None:
            if time.monotonic() >= slot.start_at:
                slot.life = self._start(slot)
        elif life.worker.process.poll() is not None:
            self._note_end(life)
            slot.life, slot.start_at = None, time.monotonic() + RESTART_PAUSE_S
        elif life.ready_at is None:
            text = life.worker.text()
            life.ready_at = time.time() if '"worker ready"' in text else None
        elif life.asked is signal.SIGTERM and life.asked_at is not None:
            self._end_the_deaf(life, life.asked_at)

    def _end_the_deaf(self, life: Life, asked_at: float) -> None:
        if time.time() - asked_at > float(str(self._settings["drain_s"])) + STOP_MARGIN_S:
            logger.warning("worker %s did not end after SIGTERM", life.pid)
            life.worker.kill()

    def _start(self, slot: Slot) -> Life:
        worker = WorkerProcess(
            self._directory, slot.redis_url, slot.s3_url, variables=self._variables, **self._settings
        )
        life = Life(slot.number, worker, time.time())
        self.lives.append(life)
        return life

    def _note_end(self, life: Life) -> None:
        life.ended_at, life.status = time.time(), life.worker.process.wait(20)
