"""Redis, S3, trainers and workers of one run, each in its own process, and what is asked of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from api_stub.client.client import Client
from api_stub.client.handle import JobHandle
from api_stub.contract.event import JobProgress, Stage
from api_stub.contract.result import Result
from tests.processes import WorkerProcess
from tests.servers import RedisServer, S3Server

BUCKET: Final = "media"
#: More than any run trains.
TRAINING_S: Final = 3_600.0
ANSWER_S: Final = 300.0


class Trainer(WorkerProcess):
    """`visionq-worker start --training`."""

    options = ("--training",)


@dataclass(frozen=True, slots=True)
class Trained:
    """A job of fine-tuning that is over. training_s: from its first step to its last, evaluations included."""

    result: Result
    training_s: float
    progress: Sequence[JobProgress]

    @property
    def output(self) -> str:
        """Where its best checkpoint is."""
        assert self.result.output_uri is not None
        return self.result.output_uri

    def losses(self) -> list[tuple[int, float]]:
        """Return the losses that were told, by step."""
        return [(event.done, event.metrics["loss"]) for event in self.progress if event.metrics]


@dataclass(frozen=True, slots=True)
class Stack:
    """The servers of one run. Whatever is started in `directory` ends with the run."""

    directory: Path
    redis: RedisServer
    s3: S3Server

    def client(self) -> Client:
        """Return a producer's client."""
        return Client(self.redis.url)

    def upload(self, folder: Path, prefix: str) -> str:
        """Store a data set; return its URI."""
        s3 = self.s3.client()
        for path in sorted(folder.iterdir()):
            s3.upload_file(str(path), BUCKET, f"{prefix}/{path.name}")
        s3.close()
        return f"s3://{BUCKET}/{prefix}/"

    @contextmanager
    def trainer(self, **settings: object) -> Iterator[Trainer]:
        """Start a trainer of two threads for the block."""
        options = {"device": "cpu", "torch_threads": 2, "media_bucket": BUCKET} | settings
        running = Trainer(self.directory, self.redis.url, self.s3.url, **options)
        try:
            running.wait_ready()
            yield running
        finally:
            running.kill()

    @contextmanager
    def worker(self, model: str, **settings: object) -> Iterator[WorkerProcess]:
        """Start a worker with a checkpoint for the block."""
        options = {"device": "cpu", "model": model, "torch_threads": 2, "model_cache": self.directory / "cache"}
        running = WorkerProcess(self.directory, self.redis.url, self.s3.url, **options | settings)
        try:
            running.wait_ready()
            yield running
        finally:
            running.kill()

    def follow(self, job: JobHandle) -> Trained:
        """Print a job's progress until it is over. Raises JobFailed."""
        told: list[JobProgress] = []
        for event in job.events(timeout=TRAINING_S):
            if isinstance(event, JobProgress) and event.stage is Stage.TRAINING:
                told.append(event)
                figures = {name: round(value, 4) for name, value in (event.metrics or {}).items()}
                say(f"  step {event.done}/{event.total} {json.dumps(figures)}")
        result = job.result(timeout=ANSWER_S)
        return Trained(result, told[-1].ts - told[0].ts if told else 0.0, told)

    def evaluate(self, data: str, model: str, **settings: object) -> Mapping[str, Any]:
        """Return the record of `visionq-worker evaluate` on the validation split."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VISIONQ_")} | {
            "AWS_ENDPOINT_URL_S3": self.s3.url,
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_REGION": "us-east-1",
            "VISIONQ_MODEL_CACHE": str(self.directory / "cache"),
            "VISIONQ_DEVICE": "cpu",
            **{f"VISIONQ_{name.upper()}": str(value) for name, value in settings.items()},
        }
        command = [sys.executable, "-m", "worker.cli", "evaluate", data, "--model", model, "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TRAINING_S, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stderr[-4000:]}")
        record: Mapping[str, Any] = json.loads(done.stdout)
        return record


@contextmanager
def stack(directory: Path) -> Iterator[Stack]:
    """Start Redis and S3 for the block."""
    redis_server = RedisServer(directory)
    try:
        s3 = S3Server(directory)
        try:
            yield Stack(directory, redis_server, s3)
        finally:
            s3.stop()
    finally:
        redis_server.stop()


def say(line: str) -> None:
    """Tell at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
