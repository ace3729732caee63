"""Processes that the zygote of this pytest process forks, used like `subprocess.Popen`."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tests.zygote import MODULES, READ_BYTES, Launch

IMPORTS_S = 180.0
FORK_S = 60.0
POLL_S = 0.02
#: Variables that no library reads while it is imported. A worker that is given others is executed, not forked.
LATE = ("VISIONQ_", "AWS_", "CELERY_BROKER_URL", "HF_TOKEN", "TMPDIR")
#: Of the whole run; tests change their own copy.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(LATE[:2])} | {
    "HF_HUB_OFFLINE": "1",
    "OPENBLAS_NUM_THREADS": "1",  # NumPy's would start its threads when it is imported
}


class ZygoteEnded(AssertionError):
    """Raised when the process that forks has ended before its time; what it forked has ended with it."""


class Forks:
    """The zygote of this process, started by the first fork and ended with this process."""

    def __init__(self, modules: tuple[str, ...] = MODULES) -> None:
        self._modules = modules
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pids: list[int] = []
        self._statuses: dict[int, int] = {}
        self._rest = b""
        self._is_ready = False

    def launch(self, launch: Launch) -> int:
        """Fork; return the process id."""
        with self._lock:
            if self._process is None:
                self._start()
            self._read_until(lambda: self._is_ready, IMPORTS_S)
            try:
                self._socket.sendall(launch.line())
            except OSError as error:
                raise self._ended() from error
            self._read_until(lambda: bool(self._pids), FORK_S)
            return self._pids.pop(0)

    def status(self, pid: int) -> int | None:
        """How a process ended, None while it runs."""
        with self._lock:
            self._read(0.0)
            return self._statuses.get(pid)

    def stop(self) -> None:
        """End the zygote and what it forked."""
        with self._lock:
            process, self._process = self._process, None
            if process is not None:
                self._socket.close()
                process.wait(20)
                os.close(self._log)

    @property
    def pid(self) -> int:
        """The zygote's process id."""
        assert self._process is not None
        return self._process.pid

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._log = os.memfd_create("zygote")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote", str(theirs.fileno()), *self._modules],
            cwd=Path(__file__).parents[1], env=ENVIRONMENT, pass_fds=[theirs.fileno()], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        theirs.close()
        atexit.register(self.stop)

    def _read_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"no answer of the zygote within {timeout_s} s"
            self._read(POLL_S)

    def _read(self, timeout_s: float) -> None:
        """Take in what the zygote has said, after waiting for it for a while."""
        if self._process is None:
            return
        self._socket.settimeout(timeout_s)
        try:
            received = self._socket.recv(READ_BYTES)
        except (BlockingIOError, TimeoutError):
            return
        except OSError as error:
            raise self._ended() from error
        finally:
            self._socket.settimeout(None)
        if not received:
            raise self._ended()
        *lines, self._rest = (self._rest + received).split(b"\n")
        for line in lines:
            match json.loads(line):
                case {"pid": int(pid)}:
                    self._pids.append(pid)
                case {"ended": int(pid), "status": int(status)}:
                    self._statuses[pid] = status
                case {"ready": True}:
                    self._is_ready = True

    def _ended(self) -> ZygoteEnded:
        assert self._process is not None
        status = self._process.wait(20)
        text = os.pread(self._log, READ_BYTES, 0).decode(errors="replace")
        return ZygoteEnded(f"the zygote has ended with {status}:\n{text[-4000:]}")


FORKS = Forks()


def can_fork(variables: Iterable[str]) -> bool:
    """Whether a program that is given these variables is the same when its libraries were imported without them."""
    return all(name.startswith(LATE) for name in variables)


class ForkedProcess:
    """`python -m module options` in a session of its own, forked; with what tests use of `subprocess.Popen`.

    Processes that it leaves behind, its exit status and its death by a signal are those of an executed program. It is
    no child of this process, and `/proc/PID/cmdline` and `environ` are the zygote's. Raises ZygoteEnded, from `poll`
    and `wait` too, when nobody is left to tell its exit status.
    """

    def __init__(self, module: str, options: tuple[str, ...], environment: Mapping[str, str], log: Path) -> None:
        self.returncode: int | None = None
        self.pid = FORKS.launch(Launch(module, options, dict(environment), str(Path.cwd()), str(log.resolve())))

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        if self.returncode is None:
            self.returncode = FORKS.status(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, waited for; raises TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout or 0.0)
            time.sleep(POLL_S)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)
