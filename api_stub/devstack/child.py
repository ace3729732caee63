"""One child process: its own session, its own log, an end that is bounded and leaves nothing.

A session of its own keeps Ctrl-C away from the child, so that the parent alone decides the order of the end; the
cleanup process ends the children of a parent that was killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from api_stub.errors import VisionqError

KILL_WAIT_S = 10.0
LOG_TAIL_LINES = 20
LOG_TAIL_BYTES = 16 * 1024
CLEANUP_SCRIPT = Path(__file__).with_name("cleanup.py")


class StackFailed(VisionqError):
    """Raised when a part of the local stack cannot start, or ended when it should not have."""

    code = "stack_failed"


class CleanupProcess:
    """A process that ends the children and removes the files of this one after its end, also after SIGKILL.

    `close()` has it do so now and waits for it.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(CLEANUP_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def send(self, verb: str, value: int | str) -> None:
        """Send `watch` or `forget` with a process group, or `remove` with a path."""
        assert self._process.stdin is not None
        # A cleanup process that somebody killed is no reason to fail: it is only the second line of defence.
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([verb, value]).encode() + b"\n")
            self._process.stdin.flush()

    def watch_me(self) -> None:
        """Have this process's group watched. Runs in a new process, before its program.

        A parent that told of it once it knows the id could be killed in between and leave the child behind.
        """
        assert self._process.stdin is not None
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # Popen has just set it to its default
        with suppress(BrokenPipeError):
            os.write(self._process.stdin.fileno(), f'["watch", {os.getpid()}]\n'.encode())
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)

    def close(self) -> None:
        """Close the pipe: what is still watched is killed, what is to be removed is removed."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(KILL_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(KILL_WAIT_S)


class Child:
    """A running program. `directory` gets its `output` (stdout) and its `log` (stderr). Main thread only."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        directory: Path,
        cleanup_process: CleanupProcess,
    ) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        self.output = directory / f"{name}.out"
        self._cleanup = cleanup_process
        try:
            with self.output.open("ab") as output, self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=cleanup_process.watch_me,
                )
        except OSError as error:
            raise StackFailed(f"{name} cannot be started: {error}") from error

    @property
    def pid(self) -> int:
        """The process id; also the id of its session and process group."""
        return self._process.pid

    def exit_status(self) -> int | None:
        """Return the exit status once the child has ended (negative: by that signal)."""
        return self._process.poll()

    def require_alive(self) -> None:
        """Raise StackFailed when the child has ended."""
        if self.exit_status() is not None:
            raise self.failure()

    def failure(self) -> StackFailed:
        """Return the error that tells how the child ended and what it wrote last."""
        return StackFailed(f"{self.name} ended with exit status {self.exit_status()}. {self._last_words()}")

    def ask_to_stop(self) -> None:
        """Send SIGTERM; `stop` does so too."""
        if self._process.poll() is None:
            self._process.terminate()

    def stop(self, grace_s: float) -> None:
        """End the child: SIGTERM, at most `grace_s` seconds, then SIGKILL to all of its process group."""
        self.ask_to_stop()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(KILL_WAIT_S)
        self._cleanup.send("forget", self.pid)

    def _last_words(self) -> str:
        lines = (_tail(self.output) + _tail(self.log))[-LOG_TAIL_LINES:]
        return "Its last words:\n  " + "\n  ".join(lines) if lines else "It wrote nothing."


def _tail(path: Path) -> list[str]:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()
