"""Real workers as child processes, started and killed as an operator would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import redis

from api_stub.contract import names
from tests.forks import ForkedProcess, can_fork
from tests.servers import RedisServer, S3Server, eventually

READY_S = 120.0


@contextmanager
def ctrl_c_is_heard() -> Iterator[None]:
    """While entered, SIGINT raises KeyboardInterrupt here, and children that are started have its default. Main thread.

    A shell's background job and some CI runners have their programs ignore SIGINT, and children inherit that. A signal
    with a handler is set back to its default when a program is executed; Popen's `restore_signals` leaves SIGINT out.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class WorkerProcess:
    """`visionq-worker start` with its own log file. `settings` are VISIONQ_ variables without the prefix.

    It is forked from a process that has imported the worker's libraries (tests/zygote.py): a fifth of the work. What is
    executed: other programs, one with options (a supervisor), one with `variables` that libraries read while they are
    imported, one with `is_executed`.
    """

    program: tuple[str, ...] = ("-m", "worker.cli", "start")
    options: tuple[str, ...] = ()

    def __init__(
        self,
        directory: Path,
        redis_url: str,
        s3_url: str,
        *,
        variables: Mapping[str, str] | None = None,
        is_executed: bool = False,
        **settings: object,
    ) -> None:
        self.model_name = str(settings.get("model_name", "default"))
        self.redis_url = redis_url
        self.log = directory / f"worker-{self.model_name}-{os.urandom(3).hex()}.log"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VISIONQ_")} | {
            "VISIONQ_REDIS_URL": redis_url,
            "AWS_ENDPOINT_URL_S3": s3_url,
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_REGION": "us-east-1",
            "VISIONQ_TORCH_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "CELERY_BROKER_URL": "redis://127.0.0.1:1/0",  # another project's: must not lead the worker astray
            **{f"VISIONQ_{name.upper()}": str(value) for name, value in settings.items()},
            **(variables or {}),
        }
        self.log.touch()
        self.process = self._start(environment, is_forked=not is_executed and can_fork(variables or {}))

    def _start(self, environment: Mapping[str, str], *, is_forked: bool) -> subprocess.Popen[bytes] | ForkedProcess:
        if is_forked and (self.program, self.options) == (WorkerProcess.program, ()):
            return ForkedProcess("worker.cli", ("start",), environment, self.log)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *self.program, *self.options],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace")

    def wait_ready(self) -> WorkerProcess:
        """Wait until the worker consumes; fail at once with its log when it has died."""
        eventually(self._is_ready, READY_S, f"worker ready:\n{self.text()[-4000:]}")
        return self

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, f"worker died with {self.process.returncode}:\n{self.text()[-4000:]}"
        return '"worker ready"' in self.text()

    def kill(self) -> None:
        """SIGKILL."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)

    def terminate(self, timeout_s: float = 60.0) -> int:
        """SIGTERM; return the exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout_s)


def start_workers(
    count: int, directory: Path, redis_server: RedisServer, s3: S3Server, **settings: object
) -> list[WorkerProcess]:
    """Start some workers at once and wait for all of them."""
    workers = [WorkerProcess(directory, redis_server.url, s3.url, **settings) for _ in range(count)]
    try:
        return [worker.wait_ready() for worker in workers]
    except BaseException:
        for worker in workers:
            worker.kill()
        raise


def num_workers(client: redis.Redis, model: str = "default") -> int:
    """Workers in the ledger's registry."""
    return int(client.zcard(names.workers_key(model)))
