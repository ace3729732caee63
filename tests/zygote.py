"""A process that imports the worker's libraries once and forks workers: `python -m tests.zygote SOCKET MODULE…`.

In, over the socket of this number: one JSON object per line, a `Launch`. Out: `{"pid"}` of what was launched, in order,
and `{"ended", "status"}` when one has ended, as `subprocess` counts (negative: the signal). When the socket closes, it
ends what it forked and itself. It only imports: no thread, no connection, no setting exists before a fork.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

#: What a worker imports before it is ready, all but `worker.cli`: that is run anew, as `python -m` does.
MODULES = (
    "worker.bootstrap", "worker.broker.app", "worker.broker.link_sender", "worker.broker.tasks", "worker.check",
    "worker.lifecycle.process", "worker.lifecycle.probes", "worker.lifecycle.supervisor", "typer.main",
    "celery.apps.worker", "celery.backends.redis", "celery.concurrency.thread", "celery.events.receiver",
    "celery.worker.consumer", "celery.worker.control", "celery.worker.loops", "celery.worker.pidbox", "kombu.mixins",
    "kombu.asynchronous.hub", "kombu.transport.redis", "transformers.modeling_layers", "PIL.ImageFile",
)  # fmt: skip
READ_BYTES = 1 << 16
#: Of prctl(2): the signal that a process gets when its parent ends.
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Launch:
    """What `Popen([python, "-m", module, *options], env=…, cwd=…, stdout=log, start_new_session=True)` would run."""

    module: str
    options: tuple[str, ...]
    environment: dict[str, str]
    directory: str
    log: str

    def line(self) -> bytes:
        """As it is sent."""
        return json.dumps(asdict(self)).encode() + b"\n"


class Zygote:
    """Forks what it is told and says how it ends."""

    def __init__(self, told: socket.socket) -> None:
        self._told = told
        self._children: set[int] = set()
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _nothing)

    def serve(self) -> Launch | None:
        """Answer until the socket closes: None. In a forked child: return what it shall run."""
        self._say(ready=True)
        rest = b""
        with selectors.DefaultSelector() as ready:
            ready.register(self._told, selectors.EVENT_READ)
            ready.register(self._woken, selectors.EVENT_READ)
            while True:
                for key, _ in ready.select():
                    if key.fileobj is self._woken:
                        self._woken.recv(READ_BYTES)
                        continue
                    received = self._told.recv(READ_BYTES)
                    if not received:
                        return self._end()
                    *lines, rest = (rest + received).split(b"\n")
                    for line in lines:
                        launch = Launch(**json.loads(line))
                        if self._fork() == 0:
                            return launch
                self._reap()

    def _fork(self) -> int:
        threads = list(Path("/proc/self/task").iterdir())
        assert len(threads) == 1, f"{len(threads)} threads in the zygote: a fork would copy their locks"
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (self._wake, self._woken, self._told):
                end.close()
        else:
            self._children.add(pid)
            self._say(pid=pid)
        return pid

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._children.remove(pid)
            self._say(ended=pid, status=os.waitstatus_to_exitcode(status))

    def _end(self) -> None:
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)

    def _say(self, **said: object) -> None:
        self._told.sendall(json.dumps(said).encode() + b"\n")


def run(launch: Launch) -> NoReturn:
    """Become what `python -m module` is, in a session, a directory and an environment of its own; end as it does."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the zygote may be killed, too
    os.setsid()
    log = os.open(launch.log, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.chdir(launch.directory)
    os.environ.clear()
    os.environ.update(launch.environment)
    tempfile.tempdir = None  # TMPDIR may be another's
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv[1:] = launch.options
    runpy.run_module(launch.module, run_name="__main__", alter_sys=True)
    sys.exit(0)


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler, so that SIGCHLD wakes `select`."""


def main() -> None:
    """Import, then serve."""
    told = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # forks share these objects' pages for longer
    launch = Zygote(told).serve()
    if launch is not None:
        run(launch)


if __name__ == "__main__":
    main()
