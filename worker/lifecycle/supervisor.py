"""One worker process per GPU: starts them, restarts those that die, ends all of them on SIGTERM.

In: the devices and the settings. Out: an exit status. Knows processes only: no torch, no Redis, no model.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Final

from api_stub.ledger.backoff import Backoff
from worker.errors import CannotStart
from worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

EXIT_CANNOT_START: Final = 78  # EX_CONFIG: restarting without a change would fail again
RESTARTS: Final = Backoff(first_s=1.0, max_s=60.0)
#: A worker that lived this long starts with the first backoff again.
HEALTHY_S: Final = 120.0
#: A worker needs this much beyond its drain to end: message loops, the last events.
STOP_MARGIN_S: Final = 20.0
POLL_S: Final = 0.1

_STOPPING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class Device:
    """The device of one worker: the GPUs that its process may see, none for a CPU worker."""

    name: str
    visible_gpus: str

    @property
    def environment(self) -> dict[str, str]:
        """Variables that keep a process to this device."""
        # A worker with several GPUs decides by itself whether its model needs them.
        kind = "cpu" if not self.visible_gpus else "auto" if "," in self.visible_gpus else "cuda"
        return {"CUDA_VISIBLE_DEVICES": self.visible_gpus, "VISIONQ_DEVICE": kind}


@dataclass(slots=True)
class _Worker:
    """One supervised worker: its device, and the process that runs at the moment, if any."""

    number: int
    device: Device
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    num_starts: int = 0
    num_failures: int = 0
    start_at: float = field(default_factory=time.monotonic)
    is_done: bool = False


def parse_devices(value: str, visible_gpus: str | None) -> tuple[Device, ...]:
    """Read `0,1`, `0+1,2+3` (two GPUs each) or `cpu,cpu`; one worker per comma-separated entry.

    Numbers count within `visible_gpus`, the CUDA_VISIBLE_DEVICES of this process; other names of GPUs (`GPU-…`,
    `MIG-…`) stay as they are. Raises CannotStart.
    """
    entries = [entry.strip() for entry in value.split(",")]
    if not all(entries):
        raise CannotStart(f"--devices {value}: use numbers of GPUs or cpu, separated by commas, as in 0,1")
    visible = visible_gpus.split(",") if visible_gpus else None
    devices = tuple(
        Device(entry, "" if entry == "cpu" else ",".join(_gpu(value, part, visible) for part in entry.split("+")))
        for entry in entries
    )
    taken = [gpu for device in devices for gpu in device.visible_gpus.split(",") if gpu]
    if len(set(taken)) < len(taken):
        raise CannotStart(f"--devices {value}: a GPU is named twice; one worker already keeps it busy")
    return devices


def _gpu(value: str, name: str, visible: Sequence[str] | None) -> str:
    if name.startswith(("GPU-", "MIG-")):
        return name
    if not name.isdecimal():
        raise CannotStart(f"--devices {value}: {name!r} is no GPU; use numbers of GPUs or cpu, as in 0,1 or cpu,cpu")
    if visible is None:
        return name
    if int(name) >= len(visible):
        raise CannotStart(f"--devices {value}: no GPU {name}; CUDA_VISIBLE_DEVICES has {len(visible)}")
    return visible[int(name)]


class Supervisor:
    """Keeps one worker per device running. `command` starts a worker; all share `environment`.

    A worker that exits with a failing status is restarted after an exponential backoff; one that exits with 0 was asked
    to and is not. A worker that exits with EXIT_CANNOT_START ends the supervisor, because the others have the same
    settings; unless it was started before and others are running: then it is restarted as well. Main thread only.
    """

    def __init__(
        self,
        command: Sequence[str],
        devices: Sequence[Device],
        environment: Mapping[str, str],
        settings: WorkerSettings,
    ) -> None:
        self._command = command
        self._environment = dict(environment)
        self._stop_s = settings.drain_s + STOP_MARGIN_S
        self._http_port = settings.http_port
        self._workers = [_Worker(number, device) for number, device in enumerate(devices)]
        self._signals: list[int] = []
        if not settings.torch_threads and len(devices) > 1:
            # Workers on one machine's cores: each torch would take all of them.
            self._environment["VISIONQ_TORCH_THREADS"] = str(max(1, (os.cpu_count() or 1) // len(devices)))

    def run(self) -> int:
        """Run until SIGTERM, SIGINT or SIGHUP, or until all workers have exited with 0; return the exit status."""
        with self._recording_signals():
            status = self._watch()
            is_clean = self._stop()
        return status or int(not is_clean)

    @contextmanager
    def _recording_signals(self) -> Iterator[None]:
        """Record signals in a list: a handler that raised could interrupt between a child's start and recording its
        id.
        """

        def record(signum: int, frame: FrameType | None) -> None:
            self._signals.append(signum)

        previous = {signum: signal.signal(signum, record) for signum in _STOPPING}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def _watch(self) -> int:
        """Start and restart workers; return the exit status when a signal came or a worker ends the supervisor."""
        while not self._signals and not all(worker.is_done for worker in self._workers):
            for worker in self._workers:
                if worker.process is None and not worker.is_done and time.monotonic() >= worker.start_at:
                    self._start(worker)
                elif worker.process is not None and (status := worker.process.poll()) is not None:
                    self._on_exit(worker, status)
                    if status == EXIT_CANNOT_START and not self._may_be_transient(worker):
                        return status
            time.sleep(POLL_S)
        return 0

    def _start(self, worker: _Worker) -> None:
        worker.process = subprocess.Popen(
            self._command,
            env=self._environment | worker.device.environment | self._port(worker),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's Ctrl-C reaches the supervisor only, which ends its workers
            preexec_fn=_die_with_parent,
        )
        worker.started_at = time.monotonic()
        worker.num_starts += 1
        logger.info("worker started", extra=_facts(worker) | {"pid": worker.process.pid})

    def _port(self, worker: _Worker) -> dict[str, str]:
        return {"VISIONQ_HTTP_PORT": str(self._http_port + worker.number)} if self._http_port else {}

    def _on_exit(self, worker: _Worker, status: int) -> None:
        lived_s = time.monotonic() - worker.started_at
        worker.process = None
        if status == 0:
            worker.is_done = True
            logger.info("worker ended", extra=_facts(worker))
            return
        worker.num_failures = 1 if lived_s >= HEALTHY_S else worker.num_failures + 1
        backoff_s = RESTARTS.delay_s(worker.num_failures)
        worker.start_at = time.monotonic() + backoff_s
        facts = {"status": status, "lived_s": round(lived_s, 1), "backoff_s": backoff_s}
        logger.error("worker died", extra=_facts(worker) | facts)

    def _may_be_transient(self, worker: _Worker) -> bool:
        return worker.num_starts > 1 and any(other.process is not None for other in self._workers)

    def _stop(self) -> bool:
        """End all workers: SIGTERM, then SIGKILL after `drain_s` and a margin, or at a second Ctrl-C.

        Return whether all ended without SIGKILL.
        """
        left = [(worker, worker.process) for worker in self._workers if worker.process is not None]
        for _, process in left:
            process.terminate()
        deadline = time.monotonic() + self._stop_s
        while left and time.monotonic() < deadline and self._signals.count(signal.SIGINT) < 2:
            time.sleep(POLL_S)
            left = [(worker, process) for worker, process in left if process.poll() is None]
        for worker, process in left:
            logger.error("worker killed", extra=_facts(worker))
            process.kill()
            process.wait()
        return not left


def _facts(worker: _Worker) -> dict[str, object]:
    return {"action": "supervise", "number": worker.number, "device": worker.device.name}


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    """Runs in the new process: has the kernel end it with its supervisor, so that no GPU stays occupied."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
