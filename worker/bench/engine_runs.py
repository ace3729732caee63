"""Runs the worker's engine on bench jobs, and the two situations it was built for: a long prompt that arrives among
streams, and many rows at once.
"""

from __future__ import annotations

import queue
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Final

from api_stub.contract.sampling import SamplingParams
from worker.bench.run import Answer, Answering, BenchJob, long_job, percentile
from worker.engine.config import EngineConfig, PagedConfig
from worker.engine.engine import Engine
from worker.engine.request import Ended, GenerationRequest, RequestOutput
from worker.engine.step_times import Stage, Step, StepTimes
from worker.models.loader import LoadedModel

#: KV back ends by name, as the engine is told about them. Nothing is kept of one job for another, as by `generate`.
BACK_ENDS: Final[Mapping[str, PagedConfig | None]] = {"slots": None, "paged": PagedConfig(reuses_prefixes=False)}
#: The same as a worker runs it, which keeps what it can.
REUSING: Final = "paged-reuse"
TIMEOUT_S: Final = 600.0
#: Tokens of a request of the engine that is only asked for its back end.
PROBE_LENGTH: Final = 64
#: Tokens fed in one step, prompts and streams together.
TOKEN_BUDGET: Final = 512
#: Tokens that each stream has got when the long prompt arrives, and what it wants in all.
TOKENS_BEFORE, STREAM_TOKENS = 8, 96
#: What a step does beside the model's and the sampler's work.
OVERHEAD: Final = (Stage.SCHEDULE, Stage.DETOKENISE, Stage.HAND_OVER)


@dataclass(slots=True)
class _Reader:
    """What came out of an engine. `put` is its outbox."""

    came: queue.SimpleQueue[tuple[float, list[RequestOutput]]] = field(default_factory=queue.SimpleQueue)
    answers: dict[str, Answer] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)

    def put(self, outputs: list[RequestOutput]) -> None:
        self.came.put((time.perf_counter(), outputs))

    def read(self) -> None:
        """Wait for the outputs of a step. Raises RuntimeError when a job failed, queue.Empty when nothing comes."""
        now, outputs = self.came.get(timeout=TIMEOUT_S)
        for output in outputs:
            answer = self.answers.setdefault(output.request_id, Answer())
            answer.text += output.text
            answer.num_tokens += output.num_tokens
            if output.num_tokens or output.is_first:
                answer.told_at.append(now)
            if output.finish is not None:
                if isinstance(output.finish.reason, Ended):
                    raise RuntimeError(f"{output.request_id} {output.finish.reason}: {output.finish.error}")
                self.ended.add(output.request_id)

    def read_all(self, num_jobs: int) -> None:
        """Read until so many jobs have ended."""
        while len(self.ended) < num_jobs:
            self.read()


@contextmanager
def serving(
    loaded: LoadedModel, back_end: PagedConfig | None, num_seqs: int, jobs: Sequence[BenchJob]
) -> Iterator[Answering]:
    """Answer all jobs that come, `num_seqs` at a time, in an engine sized for `jobs`."""
    with _running(loaded, _config(back_end, num_seqs, jobs)) as (running, reader, times):
        yield partial(_serve, running, reader, times)


def automatic_back_end(loaded: LoadedModel) -> tuple[str, str | None]:
    """Return the KV back end that a worker takes for a model unless told otherwise, and why not paged if so."""
    engine = Engine(loaded.model, loaded.tokenizer, EngineConfig(1, PROBE_LENGTH, paged=PagedConfig()), lambda _: None)
    engine.stop(TIMEOUT_S)
    return engine.kv_backend, engine.why_not_paged


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """What streams notice of a long prompt that arrives among them.

    median_step_s: of the steps that read a full piece of it. decode_step_s: of steps without prompts, median.
    p99_gap_s: between pieces of the other streams' answers while it was read.
    """

    name: str
    num_prompt_tokens: int
    num_streams: int
    token_budget: int
    max_prompt_tokens_per_step: int
    max_tokens_per_step: int
    median_step_s: float
    decode_step_s: float
    p99_gap_s: float

    @property
    def gap_ratio(self) -> float:
        """How much longer than an ordinary step of that size the streams wait, at the worst."""
        return self.p99_gap_s / self.median_step_s


def long_prompt(
    loaded: LoadedModel, name: str, back_end: PagedConfig | None, streams: Sequence[BenchJob], num_tokens: int
) -> LongPrompt:
    """Let a prompt of `num_tokens` tokens arrive when every stream has its first tokens."""
    streams = [BenchJob(job.job_id, job.inputs, STREAM_TOKENS) for job in streams]
    late = long_job(loaded, num_tokens, max_new_tokens=2)
    config = _config(back_end, len(streams) + 1, [*streams, late])
    with _running(loaded, config) as (running, reader, times):
        for job in streams:
            running.submit(_request(job))
        while any(_is_young(reader, job) for job in streams):
            reader.read()
        arrived_at = time.perf_counter()
        running.submit(_request(late))
        reader.read_all(len(streams) + 1)
    reading = [step for step in times.steps if step.num_prompt_tokens and step.at_s + step.total_s > arrived_at]
    decoding = [step.total_s for step in times.steps if step.num_streams and not step.num_prompt_tokens]
    largest = max(step.num_prompt_tokens for step in reading)
    seen = [gap for job in streams for gap in _gaps_during(reader.answers[job.job_id].told_at, reading)]
    return LongPrompt(
        name=name,
        num_prompt_tokens=late.inputs.num_prompt_tokens,
        num_streams=len(streams),
        token_budget=config.max_num_batched_tokens,
        max_prompt_tokens_per_step=largest,
        max_tokens_per_step=max(step.num_prompt_tokens + step.num_streams for step in reading),
        median_step_s=statistics.median(step.total_s for step in reading if step.num_prompt_tokens == largest),
        decode_step_s=statistics.median(decoding) if decoding else 0.0,
        p99_gap_s=percentile(seen, 99),
    )


@dataclass(frozen=True, slots=True)
class WideBatch:
    """Median seconds of the stages of a step that feeds `num_rows` streams and nothing else.

    overhead_s: scheduling, detokenising and handing over, all but model and sampler; the median step's. overhead_cpu_s:
        the same as the engine thread computed, without waiting for a core or for Python's lock.
    """

    name: str
    num_rows: int
    num_steps: int
    stage_s: Mapping[Stage, float]
    overhead_s: float
    overhead_cpu_s: float


def wide_batch(loaded: LoadedModel, name: str, back_end: PagedConfig | None, jobs: Sequence[BenchJob]) -> WideBatch:
    """Serve all jobs together and look at the steps that they are all in."""
    with serving(loaded, back_end, len(jobs), jobs) as answering:
        _, steps = answering(jobs)
    full = [step for step in steps if step.num_streams == len(jobs) and not step.num_prompt_tokens]
    stages = {stage: statistics.median(step.stage_s[stage] for step in full) for stage in Stage}
    overhead_s = statistics.median(sum(step.stage_s[stage] for stage in OVERHEAD) for step in full)
    overhead_cpu_s = statistics.median(sum(step.cpu_s[stage] for stage in OVERHEAD) for step in full)
    return WideBatch(name, len(jobs), len(full), stages, overhead_s, overhead_cpu_s)


def mean_stages(steps: Sequence[Step]) -> Mapping[Stage, float]:
    """Return the mean seconds of each stage, 0 without steps."""
    return {stage: sum(step.stage_s.get(stage, 0.0) for step in steps) / max(len(steps), 1) for stage in Stage}


def _serve(
    running: Engine, reader: _Reader, times: StepTimes, jobs: Sequence[BenchJob]
) -> tuple[Mapping[str, Answer], Sequence[Step]]:
    reader.answers, reader.ended = {}, set()
    num_before = len(times.steps)
    for job in jobs:
        running.submit(_request(job))
    reader.read_all(len(jobs))
    return reader.answers, times.steps[num_before:]


@contextmanager
def _running(loaded: LoadedModel, config: EngineConfig) -> Iterator[tuple[Engine, _Reader, StepTimes]]:
    reader, times = _Reader(), StepTimes()
    running = Engine(loaded.model, loaded.tokenizer, config, reader.put, times)
    running.start()
    try:
        yield running, reader, times
    finally:
        running.stop(TIMEOUT_S)


def _config(back_end: PagedConfig | None, num_seqs: int, jobs: Sequence[BenchJob]) -> EngineConfig:
    return EngineConfig(
        max_num_seqs=num_seqs,
        max_model_len=max(job.inputs.num_prompt_tokens + job.max_new_tokens for job in jobs),
        max_num_batched_tokens=max(TOKEN_BUDGET, 2 * num_seqs),
        paged=back_end,
    )


def _request(job: BenchJob) -> GenerationRequest:
    return GenerationRequest(job.job_id, job.inputs, SamplingParams(max_new_tokens=job.max_new_tokens, seed=0))


def _is_young(reader: _Reader, job: BenchJob) -> bool:
    answer = reader.answers.get(job.job_id)
    return job.job_id not in reader.ended and (answer is None or answer.num_tokens < TOKENS_BEFORE)


def _gaps_during(times: Sequence[float], steps: Sequence[Step]) -> list[float]:
    """Return the gaps that these steps, which follow one another, are part of."""
    pairs = [(earlier, later) for earlier, later in pairwise(times) if later > steps[0].at_s]
    return [later - earlier for earlier, later in pairs if earlier < steps[-1].at_s]
