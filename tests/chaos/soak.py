"""`python -m tests.chaos.soak`: steady load, nothing broken; does anything grow? Status 1 if it does.

Memory of workers and Redis, threads, open files and keys are sampled; slopes are least squares over all samples after
the warm-up, in which caches, pools and the results that are kept fill up.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import linear_regression
from typing import Annotated, Final

import typer

from tests.chaos import leaks
from tests.chaos.people import Producer, Readers
from tests.chaos.plant import Plant, plant
from tests.chaos.run import Book
from tests.chaos.workload import Plan, Ticket, TicketOffice, stored_requests, with_answers
from tests.servers import eventually

logger = logging.getLogger(__name__)

MEBIBYTE: Final = 1024 * 1024
NUM_WORKERS: Final = 2
QUIET_S: Final = 120.0
#: How long after their time keys may be there: Redis removes them on its own pace when nobody asks.
LEFT_S: Final = 20.0
#: The share of a run, and the least time, after which results expire as fast as new ones are made.
WARM_UP_SHARE: Final = 0.25


@dataclass(frozen=True, slots=True)
class Gauge:
    """Something that must not grow: by more than `max_growth` over the run it does."""

    name: str
    unit: str
    max_growth: float


WORKER_MEMORY: Final = Gauge("worker memory", "MiB", 24.0)
REDIS_MEMORY: Final = Gauge("Redis memory", "MiB", 4.0)
THREADS: Final = Gauge("worker threads", "", 2.0)
#: Without those of decoders, see `leaks.Usage`.
HANDLES: Final = Gauge("worker open files", "", 6.0)
#: Jobs under way have keys of both sorts, so their numbers swing with the load.
KEYS: Final = Gauge("keys that never expire", "", 40.0)
EXPIRING: Final = Gauge("keys that expire", "", 200.0)


ALL_GAUGES: Final = (WORKER_MEMORY, REDIS_MEMORY, THREADS, HANDLES, KEYS, EXPIRING)


@dataclass(frozen=True, slots=True)
class Options:
    """What to run."""

    minutes: float = 60.0
    jobs_per_s: float = 4.0
    seed: int = 1
    every_s: float = 2.0
    num_pictures: int = 12
    num_clips: int = 3
    kept_s: int = 20


@dataclass(slots=True)
class Series:
    """The samples of one gauge: seconds since the start, and values."""

    gauge: Gauge
    label: str
    at_s: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def slope_per_hour(self) -> float:
        """Least-squares slope."""
        return linear_regression(self.at_s, self.values).slope * 3600

    def growth(self) -> float:
        """What the slope makes of the whole time sampled."""
        return self.slope_per_hour() * (self.at_s[-1] - self.at_s[0]) / 3600

    @property
    def has_grown(self) -> bool:
        """True when the growth is beyond the gauge's limit."""
        return self.growth() > self.gauge.max_growth

    def line(self) -> str:
        """One row of the table."""
        verdict = "GROWS" if self.has_grown else "flat"
        return (
            f"{self.label:<28} {self.values[0]:9.1f} → {self.values[-1]:9.1f} {self.gauge.unit:<4}"
            f"slope {self.slope_per_hour():+9.2f} per hour, {self.growth():+7.2f} over the samples  {verdict}"
        )


@dataclass(slots=True)
class Soaked:
    """What a run has shown."""

    series: list[Series]
    num_jobs: int
    problems: list[str]

    def lines(self) -> str:
        """The table."""
        return "\n".join(
            [
                *(series.line() for series in self.series),
                f"jobs {self.num_jobs}, wrong or unread {len(self.problems)}",
                *self.problems[:20],
            ]
        )

    def grown(self, gauges: Collection[Gauge] = ALL_GAUGES) -> list[str]:
        """Return the rows of what has grown."""
        return [series.line() for series in self.series if series.gauge in gauges and series.has_grown]


class Sampler:
    """Samples every gauge of a plant."""

    def __init__(self, system: Plant) -> None:
        self._system = system
        self._began = time.monotonic()
        self._series: dict[str, Series] = {}

    def sample(self) -> None:
        """Take one sample of everything."""
        for number, life in enumerate(self._system.fleet.ready()):
            usage = leaks.usage_of(life.pid)
            self._note(WORKER_MEMORY, usage.resident_bytes / MEBIBYTE, number)
            self._note(THREADS, usage.num_threads, number)
            self._note(HANDLES, usage.num_other_handles, number)
        with self._system.redis.client() as direct:
            self._note(REDIS_MEMORY, direct.info("memory")["used_memory"] / MEBIBYTE)
            space = direct.info("keyspace").get("db0", {"keys": 0, "expires": 0})
            self._note(KEYS, space["keys"] - space["expires"])
            self._note(EXPIRING, space["expires"])

    def series(self) -> list[Series]:
        """All series so far."""
        return list(self._series.values())

    def _note(self, gauge: Gauge, value: float, number: int | None = None) -> None:
        label = gauge.name if number is None else f"{gauge.name} ({number})"
        series = self._series.setdefault(label, Series(gauge, label))
        series.at_s.append(time.monotonic() - self._began)
        series.values.append(value)


def soak(options: Options, directory: Path) -> Soaked:
    """Run; the result tells what has grown and which answers were wrong."""
    seconds = options.minutes * 60
    with plant(directory, NUM_WORKERS, options.kept_s) as system:
        with system.client() as client:
            drawn = stored_requests(system.s3_client, directory, options.num_pictures, options.num_clips)
            requests = with_answers(client, drawn)
        readers = Readers(system.client, 8, 2, options.seed)
        book = Book(TicketOffice(Random(options.seed), requests), max(1, round(seconds * options.jobs_per_s)), seconds)
        producer = Producer(system.client, book, readers, threading.Event())
        readers.start()
        producer.start()
        sampler = _sample(system, options)
        is_done = producer.join(QUIET_S) and readers.finish(QUIET_S)
        problems = [] if is_done else ["producer or readers did not end"]
        problems += _left_keys(system, options.kept_s)
        system.fleet.stop()
        problems += leaks.remains(system.scratch)
    return Soaked(sampler.series(), len(producer.tickets), problems + _wrong(producer.tickets))


def _sample(system: Plant, options: Options) -> Sampler:
    seconds = options.minutes * 60
    warm_up_s = max(seconds * WARM_UP_SHARE, min(1.2 * options.kept_s, seconds / 2))
    began, pause = time.monotonic(), threading.Event()
    pause.wait(warm_up_s)
    logger.info("warm after %.0f s", warm_up_s)
    sampler = Sampler(system)
    while time.monotonic() - began < seconds:
        sampler.sample()
        pause.wait(options.every_s)
    return sampler


def _left_keys(system: Plant, kept_s: int) -> list[str]:
    """Return the keys that are left once everything that is kept for a while has gone."""
    with system.redis.client() as direct:
        with suppress(AssertionError):
            eventually(lambda: not leaks.passing_keys(direct), kept_s + LEFT_S, "everything has expired")
        return leaks.key_problems(direct) + [f"key that should be gone: {key!r}" for key in leaks.passing_keys(direct)]


def _wrong(tickets: Sequence[Ticket]) -> list[str]:
    """Return the jobs whose readers did not get the fault-free answer, where there is one."""
    problems = [f"{ticket.job_id}: {problem}" for ticket in tickets for problem in ticket.problems]
    asked = [ticket for ticket in tickets if ticket.plan is Plan.PLAIN]
    return problems + [
        f"{t.job_id}: {t.read_text or t.read_code!r:.80}" for t in asked if t.read_text != t.request.text
    ]


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="how long the load lasts")] = 60.0,
    jobs_per_s: Annotated[float, typer.Option(min=0.1, help="jobs handed in per second")] = 4.0,
    seed: Annotated[int, typer.Option(help="the same seed makes the same jobs")] = 1,
) -> None:
    """Run real servers and workers under steady load; print what grows."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO, stream=sys.stderr)
    os.environ |= {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_REGION": "us-east-1"}
    options = Options(minutes=minutes, jobs_per_s=jobs_per_s, seed=seed, every_s=max(1.0, minutes / 5))
    directory = Path(tempfile.mkdtemp(prefix="visionq-soak-"))
    typer.echo(f"logs in {directory}")
    soaked = soak(options, directory)
    typer.echo(soaked.lines())
    sys.exit(1 if soaked.problems or soaked.grown() else 0)


if __name__ == "__main__":
    typer.run(main)
