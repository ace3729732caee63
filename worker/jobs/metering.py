"""Counts the engine's steps and how jobs begin and end, in the terms of observability/metrics.py.

Nothing here decides anything. Engine steps are counted on the engine thread (a few microseconds), jobs on their own;
tokens are counted by `streaming.token_meter`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from api_stub.contract.error import ErrorCode
from api_stub.contract.event import CompletedBody, FinalBody, RetryReason
from api_stub.contract.result import FinishReason
from api_stub.ledger.rows import RefusalReason
from worker.engine.batch import Chunk, PrefixStats, VisionStats
from worker.engine.step_times import StepClock, StepStage
from worker.errors import Component
from worker.jobs.attempt import Attempt, StopReason, Stopwatch
from worker.jobs.entry import DropReason
from worker.jobs.outcome import GiveBack
from worker.media.budget import BudgetStats
from worker.media.cache import MediaCacheStats
from worker.observability.metrics import Metrics


class StepMeter(StepClock):
    """Tells how long the engine's steps take, once `is_on`: warming up is not counted."""

    def __init__(self, metrics: Metrics) -> None:
        self.is_on = False
        self._step = metrics.engine_step
        self._stages = {stage: metrics.engine_stage.labels(stage.value) for stage in StepStage}
        self._began_at = self._lapped_at = 0.0

    def begin(self) -> None:
        self._began_at = self._lapped_at = time.perf_counter()

    def feed(self, chunks: Sequence[Chunk]) -> None:
        """What a step feeds is not counted here."""

    def lap(self, stage: StepStage) -> None:
        if not self.is_on:
            return
        now = time.perf_counter()
        self._stages[stage].inc(now - self._lapped_at)
        self._lapped_at = now
        if stage is StepStage.HAND_OVER:
            self._step.observe(now - self._began_at)


class JobMeter:
    """Counts how claims begin and end. Any thread."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        # A series that appears with its first event hides that event from rate().
        for family, values in (
            (metrics.request_success, FinishReason),
            (metrics.request_failure, ErrorCode),
            (metrics.request_retry, RetryReason),
            (metrics.attempts_stopped, StopReason),
            (metrics.claims_refused, RefusalReason),
            (metrics.messages_dropped, DropReason),
            (metrics.worker_sick, Component),
        ):
            for value in values:
                family.labels(value.value)

    def fell_sick(self, component: Component, is_sick: bool) -> None:
        """The worker fell sick, or is well again."""
        self._metrics.worker_sick.labels(component.value).set(is_sick)

    def begins(self, attempt: Attempt) -> None:
        """A job was claimed."""
        self._metrics.request_queue_time.observe(attempt.claim.queued_s)

    def collected(self, fetch_s: float, decode_s: float, num_bytes: int) -> None:
        """A job has its media; what came from the cache cost no bytes and no decoding."""
        self._metrics.media_fetch.observe(fetch_s)
        self._metrics.media_fetch_bytes.inc(num_bytes)
        if decode_s:
            self._metrics.media_decode.observe(decode_s)

    def answered(self, first_token_s: float) -> None:
        """An answer is complete; its first token came that long after the job's submission."""
        self._metrics.time_to_first_token.observe(first_token_s)

    def refused(self, reason: RefusalReason) -> None:
        """A doorbell rang for nothing."""
        self._metrics.claims_refused.labels(reason.value).inc()

    def ends(self, attempt: Attempt, body: FinalBody | GiveBack | None, outcome: str, watch: Stopwatch) -> None:
        """An attempt is over: `outcome` is what became of the `body` that it would end with."""
        metrics = self._metrics
        status, _, answer = outcome.removeprefix("job.").partition(":")
        is_ours = "lost" not in (status, answer)
        metrics.attempts.labels(status if is_ours else "lost").inc()
        if attempt.stop_reason is not None:
            metrics.attempts_stopped.labels(attempt.stop_reason.value).inc()
        if not is_ours or status == "unsettled" or body is None:
            return
        if isinstance(body, GiveBack):
            metrics.request_retry.labels(body.reason.value).inc()
        elif isinstance(body, CompletedBody):
            metrics.request_success.labels(body.result.finish_reason.value).inc()
            metrics.e2e_request_latency.observe(watch.total_s)
        else:
            metrics.request_failure.labels(body.error.code.value).inc()


class CountingEngine(Protocol):
    """What is read of an engine at scrape time."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_preempted(self) -> int: ...
    def kv_usage(self) -> float: ...
    def prefix_stats(self) -> PrefixStats: ...
    def vision_stats(self) -> VisionStats: ...


def engine_readings(engine: CountingEngine) -> Mapping[str, float]:
    """Return what the engine counts itself."""
    prefix, vision = engine.prefix_stats(), engine.vision_stats()
    return {
        "num_requests_running": engine.num_running,
        "num_requests_waiting": engine.num_waiting,
        "kv_cache_usage_perc": engine.kv_usage(),
        "num_preemptions_total": engine.num_preempted,
        "prefix_cache_queries_total": prefix.num_queried_tokens,
        "prefix_cache_hits_total": prefix.num_reused_tokens,
        "vision_cache_queries_total": vision.hits + vision.misses,
        "vision_cache_hits_total": vision.hits,
        "vision_cache_evictions_total": vision.evictions,
        "vision_cache_bytes": vision.num_bytes,
        "vision_encoded_total": vision.num_encoded,
    }


def media_readings(stats: MediaCacheStats, budget: BudgetStats) -> Mapping[str, float]:
    """Return what the cache of decoded media and their memory budget count themselves."""
    return {
        "mm_cache_queries_total": stats.hits + stats.misses,
        "mm_cache_hits_total": stats.hits,
        "mm_cache_evictions_total": stats.evictions,
        "mm_cache_bytes": stats.num_bytes,
        "mm_memory_bytes": budget.num_bytes,
        "mm_memory_num_waiting": budget.num_waiting,
        "mm_memory_waits_total": budget.num_waited,
    }
