"""What the queue costs per job: submit → result of a text-only, one-token job, beside a bare Celery no-op task.

Both run in the same run against the same Redis, turn by turn, one job at a time, after a warm-up. The model is of the
demo checkpoint's family, with random weights and one layer: its own forward is part of the job's time.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from api_stub.client.client import Client
from api_stub.devstack.child import Child
from api_stub.devstack.signals import StopSignals
from api_stub.devstack.stack import Stack, StackOptions
from worker.bench.noop import NOOP_TASK, noop_app
from worker.demo_model import CHECKPOINT

WARM_UP_JOBS: Final = 20
TIMEOUT_S: Final = 30.0
QUESTION: Final = "hello"


@dataclass(frozen=True, slots=True)
class QueueReport:
    """Seconds from submit to result of each measured job, in order."""

    celery_s: Sequence[float]
    visionq_s: Sequence[float]

    @property
    def ratio(self) -> float:
        """Median of our jobs over median of Celery's no-op."""
        return statistics.median(self.visionq_s) / statistics.median(self.celery_s)

    def lines(self) -> str:
        """Return the report as a table."""
        rows = (("bare Celery no-op", self.celery_s), ("visionq job, 1 token", self.visionq_s))
        table = "\n".join(
            f"{name:<22} p50 {_ms(times, 50):7.2f} ms   p95 {_ms(times, 95):7.2f} ms   n {len(times)}"
            for name, times in rows
        )
        return f"{table}\nratio of medians       {self.ratio:.2f}"


def bench_queue(num_jobs: int) -> QueueReport:
    """Start Redis, a worker and a plain Celery worker; measure `num_jobs` of each kind in turns."""
    with tempfile.TemporaryDirectory(prefix="visionq-bench-") as directory:
        model = random_checkpoint(Path(directory))
        options = StackOptions(num_workers=1, model=str(model), concurrency=1)
        with StopSignals() as signals, Stack(options, signals) as stack:
            stack.start()
            redis_url = stack.endpoints["VISIONQ_REDIS_URL"]
            command = [sys.executable, "-P", "-m", "worker.bench.noop"]
            environment = dict(options.environment) | stack.endpoints
            plain = Child("noop", command, environment, stack.directory, stack.cleanup_process)
            try:
                return _measure(redis_url, num_jobs)
            finally:
                plain.stop(TIMEOUT_S)


def random_checkpoint(directory: Path) -> Path:
    """Save the demo model's architecture with random weights and one layer, and its processor."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(CHECKPOINT)
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    AutoProcessor.from_pretrained(CHECKPOINT).save_pretrained(directory)
    return directory


def _measure(redis_url: str, num_jobs: int) -> QueueReport:
    app = noop_app(redis_url)
    with Client(redis_url) as client:

        def celery_job() -> None:
            app.send_task(NOOP_TASK).get(timeout=TIMEOUT_S)

        def visionq_job() -> None:
            client.vqa(question=QUESTION, max_new_tokens=1).result(timeout=TIMEOUT_S)

        for _ in range(WARM_UP_JOBS):
            celery_job()
            visionq_job()
        times = [(_seconds(celery_job), _seconds(visionq_job)) for _ in range(num_jobs)]
    app.close()
    return QueueReport([celery_s for celery_s, _ in times], [visionq_s for _, visionq_s in times])


def _seconds(job: Callable[[], None]) -> float:
    started_at = time.perf_counter()
    job()
    return time.perf_counter() - started_at


def _ms(times: Sequence[float], percent: int) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[percent - 1] * 1e3
