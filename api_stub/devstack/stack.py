"""The whole service on one machine: Redis, S3, gateway and workers as child processes in a temporary directory.

`with Stack(options, signals) as stack: stack.start()` returns when every part answers; leaving the block ends every
part in reverse order. Waits are bounded, stop for a signal, and fail at once with a child's last words when it ends.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

from api_stub.contract import names
from api_stub.devstack.child import Child, CleanupProcess, StackFailed
from api_stub.devstack.servers import BUCKET, HOST, REGION, ApiServer, RedisServer, S3Server, free_port, worker_command
from api_stub.devstack.signals import Interrupted, StopSignals
from api_stub.ledger import pools

logger = logging.getLogger(__name__)

SERVER_START_S = 60.0
WORKER_START_S = 600.0  # a real checkpoint may have to be downloaded first
PORT_ATTEMPTS = 3
DRAIN_S = 5.0
STOP_GRACE_S = 10.0
MAX_RESTARTS = 5
RESTART_WINDOW_S = 300.0
LOOK_S = 0.5
TRAINER = "trainer"


_FOREIGN = frozenset(
    {
        "VISIONQ_REDIS_URL",
        "VISIONQ_MEDIA_BUCKET",
        "VISIONQ_ALLOWED_BUCKETS",
        "VISIONQ_S3_PUBLIC_URL",
        "VISIONQ_API_URL",
        "VISIONQ_API_HOST",
        "VISIONQ_API_PORT",
    }
)


class _Server(Protocol):
    def command(self) -> list[str]: ...
    def answers(self) -> bool: ...


ServerType = TypeVar("ServerType", bound=_Server)


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What to start. None leaves a choice to the environment and the worker's defaults.

    `model` is a checkpoint (VISIONQ_MODEL), `concurrency` the jobs a worker generates at once (VISIONQ_MAX_NUM_SEQS).
    `training`: also a worker that takes fine-tuning jobs.
    """

    num_workers: int = 1
    model: str | None = None
    concurrency: int | None = None
    training: bool = False
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def model_name(self) -> str:
        """Name under which the workers serve."""
        return self.environment.get("VISIONQ_MODEL_NAME") or names.DEFAULT_MODEL_NAME


class Stack:
    """A context manager for the main thread. `endpoints` are complete once `start()` has returned."""

    def __init__(self, options: StackOptions, signals: StopSignals) -> None:
        self.options = options
        self.endpoints: dict[str, str] = {}
        self._signals = signals
        self._servers: list[Child] = []
        self._workers: list[Child] = []  # the one that trains is the last
        self._restarts: list[float] = []

    def __enter__(self) -> Stack:
        with ExitStack() as cleanup:
            self.cleanup_process = CleanupProcess()
            cleanup.callback(self.cleanup_process.close)
            self.directory = Path(tempfile.mkdtemp(prefix="visionq-"))
            cleanup.callback(shutil.rmtree, self.directory, ignore_errors=True)
            self.cleanup_process.send("remove", str(self.directory))
            (self.directory / "tmp").mkdir()
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # All workers drain at the same time; the servers they need for it end after them.
        for worker in self._workers:
            worker.ask_to_stop()
        deadline = time.monotonic() + STOP_GRACE_S
        for worker in self._workers:
            worker.stop(max(0.0, deadline - time.monotonic()))
        self._cleanup.close()

    def start(self) -> None:
        """Start everything and wait until it serves. Raises StackFailed and Interrupted."""
        self.start_servers()
        self.start_workers()
        self.start_gateway()
        self.wait_for_workers()

    def start_servers(self) -> None:
        """Start Redis and S3 and wait until both answer; afterwards `endpoints` are complete."""
        redis_server = self._serve("redis", lambda: RedisServer(self.directory, free_port()))
        s3_server = self._serve("s3", lambda: S3Server(free_port()))
        s3_server.make_bucket()
        self.endpoints = {
            "VISIONQ_REDIS_URL": redis_server.url,
            "AWS_ENDPOINT_URL_S3": s3_server.url,
            "AWS_ACCESS_KEY_ID": s3_server.access_key,
            "AWS_SECRET_ACCESS_KEY": s3_server.secret_key,
            "AWS_REGION": REGION,
            "VISIONQ_MEDIA_BUCKET": BUCKET,
        }

    def start_gateway(self) -> None:
        """Start the HTTP gateway, where it is installed, and wait until it answers; then `endpoints` name it."""
        if ApiServer.is_installed():
            self.endpoints["VISIONQ_API_URL"] = self._serve("api", lambda: ApiServer(free_port())).url

    def start_workers(self) -> None:
        """Start the workers; they load their models while the caller does something else."""
        for number in range(1, self.options.num_workers + 1):
            self._workers.append(self._start_worker(f"worker-{number}"))
        if self.options.training:
            self._workers.append(self._start_worker(TRAINER))

    def wait_for_workers(self) -> None:
        """Wait until every worker consumes: a worker enters the ledger's registry when it does."""
        registries = [(names.workers_key(self.options.model_name), self.options.num_workers)]
        if self.options.training:
            registries.append((names.workers_key(names.TRAINING_MODEL_NAME), 1))
        with pools.client(self.endpoints["VISIONQ_REDIS_URL"], timeout_s=5) as ledger:

            def all_consume() -> bool:
                self._require_alive()
                return all(int(ledger.zcard(registry)) >= number for registry, number in registries)

            self._wait_for(all_consume, WORKER_START_S, "the workers to consume")

    def supervise(self) -> None:
        """Look after the children once: a dead worker is replaced, a dead server ends the stack (StackFailed)."""
        for server in self._servers:
            server.require_alive()
        for index, worker in enumerate(self._workers):
            if worker.exit_status() is not None:
                self._workers[index] = self._replace(worker)

    def enter(self) -> None:
        """Point this process itself at the stack: boto3 takes credentials and proxies from the environment only."""
        for name in filter(_points_elsewhere, list(os.environ)):
            del os.environ[name]
        os.environ.update(without_proxy(os.environ) | self.endpoints)

    def stay(self) -> None:
        """Supervise until a signal comes. Raises StackFailed as `supervise` does."""
        with suppress(Interrupted):
            while True:
                self.supervise()
                self._signals.pause(LOOK_S)

    def run_child(self, name: str, command: Sequence[str], timeout_s: float) -> str:
        """Run a program to its end and return its output. Raises StackFailed when it fails or takes too long."""
        child = self._spawn(name, command)
        try:
            self._wait_for(lambda: child.exit_status() is not None, timeout_s, f"{name} to end")
            if child.exit_status() != 0:
                raise child.failure()
            return child.output.read_text()
        finally:
            child.stop(0)

    def _serve(self, name: str, make: Callable[[], ServerType]) -> ServerType:
        # Another program may take a port between the moment it was found free and the server's start.
        for _ in range(PORT_ATTEMPTS):
            server = make()
            child = self._spawn(name, server.command())
            self._cleanup.callback(child.stop, STOP_GRACE_S)
            if self._comes_up(child, server):
                self._servers.append(child)
                return server
        raise child.failure()

    def _comes_up(self, child: Child, server: _Server) -> bool:
        self._wait_for(
            lambda: child.exit_status() is not None or server.answers(), SERVER_START_S, f"{child.name} to answer"
        )
        return child.exit_status() is None

    def _start_worker(self, name: str) -> Child:
        options = ["--training"] if name == TRAINER else []
        return self._spawn(name, [*worker_command("worker.cli"), "start", *options])

    def _replace(self, worker: Child) -> Child:
        now = time.monotonic()
        self._restarts = [at for at in self._restarts if now - at < RESTART_WINDOW_S]
        if len(self._restarts) >= MAX_RESTARTS:
            raise worker.failure()
        self._restarts.append(now)
        logger.warning(
            "%s ended with exit status %s; starting it again (%d of %d restarts within %g s)",
            worker.name, worker.exit_status(), len(self._restarts), MAX_RESTARTS, RESTART_WINDOW_S,
        )  # fmt: skip
        worker.stop(0)
        return self._start_worker(worker.name)

    def _spawn(self, name: str, command: Sequence[str]) -> Child:
        return Child(name, command, self._child_environment(), self.directory, self.cleanup_process)

    def _child_environment(self) -> dict[str, str]:
        options = self.options
        # Settings for another Redis, bucket or AWS account must not lead a worker away from this stack.
        kept = {name: value for name, value in options.environment.items() if not _points_elsewhere(name)}
        kept.setdefault("VISIONQ_DRAIN_S", str(DRAIN_S))
        known = [options.model_name, *([names.TRAINING_MODEL_NAME] if options.training else [])]
        kept.setdefault("VISIONQ_API_MODELS", ",".join(known))  # known before, and without, their workers
        if options.num_workers > 1:
            kept.setdefault("VISIONQ_TORCH_THREADS", str(max(1, (os.cpu_count() or 1) // options.num_workers)))
        if options.model is not None:
            kept["VISIONQ_MODEL"] = options.model
        if options.concurrency is not None:
            kept["VISIONQ_MAX_NUM_SEQS"] = str(options.concurrency)
        return kept | without_proxy(kept) | self.endpoints | {"TMPDIR": str(self.directory / "tmp")}

    def _require_alive(self) -> None:
        for child in (*self._servers, *self._workers):
            child.require_alive()

    def _wait_for(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        if not self._signals.wait_for(condition, timeout_s):
            raise StackFailed(f"waited {timeout_s:g} s in vain for {what}; logs lay in {self.directory}")


def without_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that keep a machine's HTTP proxy away from the stack's loopback addresses."""
    listed = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    value = ",".join(filter(None, (listed, HOST, "localhost")))
    return {"NO_PROXY": value, "no_proxy": value}


def _points_elsewhere(name: str) -> bool:
    return name in _FOREIGN or (name.startswith("AWS_") and name != "AWS_CA_BUNDLE")
